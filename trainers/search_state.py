"""What a search knows: a prompt's candidates so far, what they have cost, and all prompts that are under way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor, nn

from flowalign.accounting import Rows
from flowalign.pictures import to_bytes
from flowalign.records import Scores
from trainers.search_cost import Prices, Spent


@dataclass(frozen=True)
class Candidate:
    """A scored sample. number: which of its prompt's tries it is. media: in 8 bits. noise: what it was made from."""

    number: int
    score: float
    parts: dict[str, float]
    noise: Float[Tensor, "*d"]
    media: UInt8[Tensor, "*frames 3 h w"]


@dataclass(frozen=True)
class Made:
    """A call's samples: all but `pixels` on the CPU. spent: of each of them. seconds: of the call."""

    noise: Float[Tensor, b * d]
    pixels: Float[Tensor, "b *frames 3 h w"]
    scores: Scores
    gradient: Float[Tensor, b * d] | None
    spent: Spent
    seconds: float

    def candidate(self, lane: int, number: int) -> Candidate:
        """The sample of a lane."""
        parts = {name: float(value[lane]) for name, value in self.scores.parts.items()}
        media = to_bytes(self.pixels[lane])
        return Candidate(number, float(self.scores.total[lane]), parts, self.noise[lane].clone(), media)


@dataclass(eq=False)
class Line:
    """A prompt's search under way: `tried` candidates, of which `invalid` had no valid score. state: the method's own.

    first: the plain sample, if its score was valid. best: the first of those with the highest score.
    """

    number: int
    tried: int = 0
    invalid: int = 0
    stopped: str = ""
    seconds: float = 0.0
    first: Candidate | None = None
    best: Candidate | None = None
    spent: Spent = Spent()
    state: dict[str, Tensor] = field(default_factory=dict)

    def take(self, made: Made, lane: int, number: int, seconds: float) -> None:
        """Count a candidate, and keep it where it is the first or the best so far."""
        self.tried, self.spent, self.seconds = self.tried + 1, self.spent + made.spent, self.seconds + seconds
        if not bool(made.scores.valid[lane]):
            self.invalid += 1
            return
        better = self.best is None or float(made.scores.total[lane]) > self.best.score
        if number and not better:
            return
        candidate = made.candidate(lane, number)
        self.first = self.first if number else candidate
        self.best = candidate if better else self.best


@dataclass(frozen=True)
class Found:
    """What a prompt's search has come to; `first` and `best` are None where no score was valid.

    tried: candidates, of which `invalid` had no valid score. stopped: why it ended before its last try, if it did.
    cost: of `spent`, in forwards of one network row. seconds: its share of the calls that it was in.
    """

    number: int
    prompt: str
    first: Candidate | None
    best: Candidate | None
    tried: int
    invalid: int
    stopped: str
    spent: Spent
    cost: float
    seconds: float

    @classmethod
    def of(cls, line: Line, prompt: str, prices: Prices) -> Found:
        """The end of a line."""
        cost = line.spent.cost(prices)
        return cls(
            line.number, prompt, line.first, line.best, line.tried, line.invalid, line.stopped, line.spent, cost,
            line.seconds,
        )  # fmt: skip


@dataclass
class SearchState:
    """All that a search has become. most: candidates of a prompt. started, finished: prompts, in the search's order.

    rounds: calls so far. padding: samples that filled them up.
    """

    prices: Prices
    most: int
    open: list[Line] = field(default_factory=list)
    started: int = 0
    finished: int = 0
    rounds: int = 0
    padding: int = 0

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> SearchState:
        """The state again, from a checkpoint."""
        lines = [_line(one) for one in tree["open"]]
        return cls(**{**tree, "prices": Prices(**tree["prices"]), "open": lines})


def _line(tree: Mapping[str, Any]) -> Line:
    kept = {name: None if tree[name] is None else Candidate(**tree[name]) for name in ("first", "best")}
    spent = Spent(**{name: Rows(**rows) for name, rows in tree["spent"].items()})
    return Line(**{**tree, **kept, "spent": spent})


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While entered, these take no gradient, and nothing is kept for one."""
    held = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)

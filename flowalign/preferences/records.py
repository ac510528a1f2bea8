"""What is preferred to what: pairs of pictures or videos, and rankings of several, which become pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

Label = Literal["first", "second", "tie", "invalid"]
LABELS: tuple[Label, ...] = ("first", "second", "tie", "invalid")


@dataclass(frozen=True)
class Medium:
    """A picture or video: a file, or, where `data` holds its bytes, what those of a table are called."""

    path: Path
    data: bytes | None = None

    def read(self) -> bytes:
        """Its bytes, as they are stored. Raises: ValueError where there is no such file."""
        if self.data is not None:
            return self.data
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class Preference:
    """Two media of one prompt, and which of them is preferred.

    label: "first" or "second" is preferred; "tie", neither; "invalid", it is not known, and nothing is learnt from it.
    where: its file and row. scores: of the two, by a reward. margin: by how much the preferred one leads, at least 0,
    in any unit, or None. weight: of the pair among others, at least 0.
    """

    prompt: str
    metadata: dict[str, Any]
    first: Medium
    second: Medium
    label: Label
    where: str
    margin: float | None = None
    scores: tuple[float, float] | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Ranking:
    """k >= 2 media of one prompt in no order, and how good each is; a pair is one of two media.

    standing: a number for each, higher is better, of which only the order counts (a rank is its negative); None where
    it is not known. The other fields are those of `Preference`.
    """

    prompt: str
    metadata: dict[str, Any]
    media: tuple[Medium, ...]
    standing: tuple[float, ...] | None
    where: str
    scores: tuple[float, ...] | None = None
    margin: float | None = None
    weight: float = 1.0

    def pair(self, first: int, second: int) -> Preference:
        """Two of its media."""
        scores = None if self.scores is None else (self.scores[first], self.scores[second])
        lead = self.margin
        if lead is None and scores is not None:
            lead = abs(scores[0] - scores[1])
        return Preference(
            self.prompt, self.metadata, self.media[first], self.media[second], self.label(first, second), self.where,
            lead, scores, self.weight,
        )  # fmt: skip

    def label(self, first: int, second: int) -> Label:
        """Which of two media is preferred."""
        if self.standing is None:
            return "invalid"
        difference = self.standing[first] - self.standing[second]
        return "tie" if difference == 0 else "first" if difference > 0 else "second"


Places = tuple[tuple[int, int], ...]  # of the two media of each pair
Pairing = Callable[[Ranking], Places]  # which pairs a ranking of three media or more becomes


def all_pairs(ranking: Ranking) -> Places:
    """Each two media once, k (k - 1) / 2 pairs, in their order; equals are ties."""
    return tuple(combinations(range(len(ranking.media)), 2))


def best_and_worst(ranking: Ranking) -> Places:
    """One pair, the best first: of equals the first one, and for the worst the last one.

    West-of-N (arXiv:2401.12086). A ranking that is not known gives none.
    """
    if ranking.standing is None:
        return ()
    numbers, standing = range(len(ranking.media)), ranking.standing
    best, worst = max(numbers, key=lambda i: (standing[i], -i)), min(numbers, key=lambda i: (standing[i], -i))
    return ((best, worst),)


def pairs_of(ranking: Ranking, pairing: Pairing = all_pairs) -> Places:
    """Of two media the one pair there is, as they stand; of more what `pairing` says."""
    return ((0, 1),) if len(ranking.media) == 2 else pairing(ranking)


class PreferenceSet(ABC):
    """Preferences by their number, read when they are asked for."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, index: Sequence[int]) -> tuple[Preference, ...]:
        """The chosen preferences, in the order given."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Tells this set from any other by its tables' contents; files that they name count by name."""


class Chosen(PreferenceSet):
    """Some of a set's preferences."""

    def __init__(self, whole: PreferenceSet, index: Sequence[int]) -> None:
        self.whole, self.index = whole, tuple(index)

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, index: Sequence[int]) -> tuple[Preference, ...]:
        return self.whole.rows([self.index[i] for i in index])

    def fingerprint(self) -> str:
        told = sha256(repr(self.index).encode()).hexdigest()
        return f"{len(self)} of {self.whole.fingerprint()}, SHA-256 {told}"

"""The one record of what a run has become, and its way into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from flowalign.accounting import Meter, Rows
from flowalign.distributed import sum_over_data
from flowalign.records import Interval, Scores, Step


@dataclass(frozen=True)
class Collected:
    """A scored micro-batch of rollouts, without its padding: its stochastic steps, or the latents it has ended at."""

    steps: tuple[Step, ...]
    scores: Scores
    latents: Tensor | None = None


@dataclass
class State:
    """All that a run has become: whatever is not here is a function of the config.

    epoch: epochs finished. part: optimizer steps of the present epoch that are done.
    seen: the numbers of each of those. buffer: the present epoch's micro-batches that this process has collected.
    skipped: optimizer steps left out in a row. best, best_epoch, best_checkpoint: of the held-out metric, and where it
    is kept. history: all evaluations.
    rows, seconds: the present epoch's costs so far, on this process.
    clock: seconds since the run's start. logs: sizes of its logs in bytes.
    normalisers: statistics of the reward's running normalisers, by name.
    noise: of a trainer that measures its steps before it trains, where that stands: see `trainers.noise_calibration`
    and `trainers.active_steps`.
    older: an older policy that a trainer samples by or compares with; empty for what the run has started from.
    kl_coef: of a trainer whose coefficient follows the KL, where it stands; None at first.
    rounds: the groups that the present epoch has sampled again, a list for each further round.
    policy, average, moments, steps, scaler: the optimizer's, see `trainers.optim.PolicyOptimizer`.
    """

    epoch: int = 0
    part: int = 0
    skipped: int = 0
    best: float | None = None
    kl_coef: float | None = None
    best_epoch: int = 0
    best_checkpoint: str = ""
    clock: float = 0.0
    steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    seen: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[list[int]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    logs: dict[str, int] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    normalisers: dict[str, dict[str, float]] = field(default_factory=dict)
    noise: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    older: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: Rows = Rows()
    buffer: dict[int, Collected] = field(default_factory=dict)

    def trees(self, told: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
        """What all processes share, and what is this one's own; none of it where another has the same and tells it."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        own = {"rows": held.pop("rows"), "buffer": held.pop("buffer")}
        return held, own if told else {"rows": Rows(), "buffer": {}}

    def costs(self, needed: Rows) -> dict[str, float]:
        """The epoch's network rows over all processes, the fewest possible, and seconds of the first by phase."""
        spent = torch.tensor([self.rows.forward, self.rows.gradient])
        sum_over_data([spent])
        seconds = {f"time/{name}": round(value, 4) for name, value in sorted(self.seconds.items())}
        return {
            "rows/forward": int(spent[0]),
            "rows/gradient": int(spent[1]),
            "floor/forward": needed.forward,
            "floor/gradient": needed.gradient,
            **seconds,
        }

    def spend(self, meter: Meter) -> None:
        """Take over what the meter has counted since the last time."""
        _, rows, seconds = meter.take()
        self.rows += rows
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    @classmethod
    def from_trees(
        cls,
        shared: Mapping[str, Any],
        own: Sequence[Mapping[str, Any]],
        mine: Sequence[int],
        first: bool,
        device: torch.device | str = "cpu",
    ) -> State:
        """The record again, for any number of processes.

        Args:
            own: what each of the processes held that wrote the checkpoint.
            mine: the micro-batches that are this process's now. first: whether it is the first one, which takes over
                the costs so far.
        """
        buffers = {int(index): tree for one in own for index, tree in one["buffer"].items()}
        spent = sum((Rows(**one["rows"]) for one in own), Rows()) if first else Rows()
        kept = {index: _collected(buffers[index], device) for index in mine if index in buffers}
        return cls(**shared, rows=spent, buffer=kept)


def _collected(tree: Mapping[str, Any], device: torch.device | str) -> Collected:
    names = ("latents", "latents_next", "log_probs")
    steps = [Step(Interval(**one["interval"]), *(one[name].to(device) for name in names)) for one in tree["steps"]]
    latents = tree.get("latents")  # not in checkpoints of before there were any
    return Collected(tuple(steps), Scores(**tree["scores"]), None if latents is None else latents.to(device))

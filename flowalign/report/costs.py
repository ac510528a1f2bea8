"""Where the time went, and how much of the network's work the method's maths needed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowalign.report.reading import RunRecord

BESIDE = "beside/"  # before the name of what took its time while a phase went on
GRADIENT = 3  # a forward with its backward, in forwards: the backward is about twice the forward


@dataclass(frozen=True)
class Phase:
    """Seconds of a phase over the whole run, per epoch, and as a share of the run."""

    name: str
    seconds: float
    per_epoch: float
    share: float


@dataclass(frozen=True)
class Work:
    """Network rows that were computed, and the fewest that the maths need."""

    name: str
    measured: float
    floor: float

    @property
    def ratio(self) -> float:
        """Measured / floor; nan where there is no floor."""
        return self.measured / self.floor if self.floor else math.nan


def phases(run: RunRecord) -> tuple[Phase, ...]:
    """Time by phase, in the order of the metrics; "other" is what no phase measured (start-up, loading, logging)."""
    totals = {name: spent for name, spent in _seconds(run).items() if not name.startswith(BESIDE)}
    if not totals:
        return ()
    rest = run.seconds - sum(totals.values())
    if rest > 0:
        totals["other"] = rest
    whole = sum(totals.values()) or 1.0
    epochs = max(len(run.epochs), 1)
    return tuple(Phase(name, spent, spent / epochs, spent / whole) for name, spent in totals.items())


def beside(run: RunRecord) -> tuple[Phase, ...]:
    """What ran beside the phases, in threads of its own; shares are of the run too, and add up with nothing."""
    spent = {name.removeprefix(BESIDE): value for name, value in _seconds(run).items() if name.startswith(BESIDE)}
    whole, epochs = run.seconds or 1.0, max(len(run.epochs), 1)
    return tuple(Phase(name, value, value / epochs, value / whole) for name, value in spent.items())


def _seconds(run: RunRecord) -> dict[str, float]:
    totals: dict[str, float] = {}
    for row in run.epochs + run.evaluations:
        for name, value in row.values.items():
            if name.startswith("time/") and math.isfinite(value):
                totals[name.removeprefix("time/")] = totals.get(name.removeprefix("time/"), 0.0) + value
    return totals


def work(run: RunRecord) -> tuple[Work, ...]:
    """Rows without gradient, with gradient, and both together in forwards; empty where they were not counted."""
    names = ("rows/forward", "rows/gradient", "floor/forward", "floor/gradient")
    counted = [row for row in run.epochs if all(math.isfinite(row.get(name)) for name in names)]
    if not counted:
        return ()
    forward, gradient, least_forward, least_gradient = (sum(row.get(name) for row in counted) for name in names)
    return (
        Work("forward only", forward, least_forward),
        Work("forward and backward", gradient, least_gradient),
        Work("together, in forwards", forward + GRADIENT * gradient, least_forward + GRADIENT * least_gradient),
    )


def samples_per_second(run: RunRecord) -> float:
    """Training samples over the wall time of the whole run; nan where the config does not tell how many."""
    groups, members = run.number("sampling", "groups"), run.number("sampling", "group_size")
    if groups is None or members is None or not run.seconds > 0:
        return math.nan
    return groups * members * len(run.epochs) / run.seconds

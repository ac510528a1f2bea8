"""Runs beside each other: what each gained, what it cost, and whether one is really above the first."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from flowalign.report.comparing import CLAUSE, Comparison, Difference, compare, difference
from flowalign.report.costs import GRADIENT
from flowalign.report.reading import PromptScores, RunRecord, read_run

FLATTERED = (
    "each kept policy is the best of its run's evaluations on these same prompts, which flatters it slightly; for "
    "prompts that no run has looked at: flowalign eval"
)
APART = ("seed", "folder")  # keys in which runs of one method may differ and be its seeds


@dataclass(frozen=True)
class Point:
    """An evaluation: epochs and network rows (with gradient counted as three) until then, and the metric's mean."""

    epoch: int
    compute: float
    score: float


@dataclass(frozen=True)
class Compared:
    """A run among others.

    own: its kept policy against what it started from. change: of the metric, over prompts; None where scores of prompts
    are missing. lead: of its kept policy over the first run's, on the same prompts; None of the first, and of a run
    that was evaluated on others. curve: its evaluations.
    """

    name: str
    run: RunRecord
    own: Comparison | None
    change: Difference | None
    lead: Difference | None
    curve: tuple[Point, ...]

    @property
    def compute(self) -> float:
        """Network rows of the whole run, a row with gradient counted as three; nan where they were not counted."""
        return _compute(self.run, self.run.done)

    @property
    def kept(self) -> PromptScores:
        """The kept policy's scores of each prompt."""
        return self.own.after if self.own is not None else ()

    def mean(self, name: str, *, before: bool = False) -> float:
        """The mean of a score over the prompts that have it; nan without any."""
        scores = self.kept if not before or self.own is None else self.own.before
        known = [row[name] for row in scores if name in row]
        return fmean(known) if known else math.nan


@dataclass(frozen=True)
class Seeds:
    """Runs that differ by their seed alone: their names, and the mean, least and most of what they gained."""

    names: tuple[str, ...]
    mean: float
    least: float
    most: float


@dataclass(frozen=True)
class Gathered:
    """All runs. parts: the scores that each has, the metric first. notes: what is missing or cannot be compared."""

    metric: str
    runs: tuple[Compared, ...]
    parts: tuple[str, ...]
    seeds: tuple[Seeds, ...]
    notes: tuple[str, ...]


def gather(folders: Sequence[Path], metric: str | None = None) -> Gathered:
    """Read run folders.

    Args:
        metric: the score to compare by, by default the one by which the first run kept its policy.

    Raises: ValueError for a folder without a run, one that is given twice, and a metric that no run has.
    """
    places = [folder.resolve() for folder in folders]
    twice = next((folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is given more than once")
    runs = [read_run(folder) for folder in folders]
    chosen = metric or runs[0].metric
    made = [_compared(name, run, chosen) for name, run in zip(names(folders), runs, strict=True)]
    if all(one.change is None for one in made) and metric is not None:
        told = sorted({name for one in made for row in one.kept for name in row if not name.startswith(CLAUSE)})
        raise ValueError(f"no run has the score {metric!r}; there are {', '.join(told) or 'none'}")
    first, *others = made
    led = (first, *(replace(one, lead=_lead(first, one, chosen)) for one in others))
    return Gathered(chosen, led, _parts(led, chosen), _seeds(led), tuple(_notes(led, chosen)))


def names(folders: Sequence[Path]) -> list[str]:
    """Each folder's last words, as few of them as tell all apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        short = ["/".join(one[-count:]) for one in parts]
        if len(set(short)) == len(short):
            return short
    return [str(folder) for folder in folders]


def _compared(name: str, run: RunRecord, metric: str) -> Compared:
    found = compare(run)
    own = None if found is None else replace(found, metric=metric)
    change = None if own is None else difference([*own.pairs(metric).values()])
    series = "held-out" if metric == run.metric else f"held-out/{metric}"
    curve = tuple(Point(row.step, _compute(run, row.step), row.get(series)) for row in run.evaluations)
    return Compared(name, run, own, change, None, curve)


def _compute(run: RunRecord, epochs: int) -> float:
    made = [row for row in run.epochs if row.step <= epochs]
    return sum(row.get("rows/forward") + GRADIENT * row.get("rows/gradient") for row in made)


def same_prompts(one: Compared, other: Compared) -> bool:
    """Whether both were evaluated on the same prompts, which also are known."""
    ours, theirs = one.run.prompts, other.run.prompts
    return bool(ours) and [prompt.text for prompt in ours] == [prompt.text for prompt in theirs]


def _lead(first: Compared, other: Compared, metric: str) -> Difference | None:
    if not same_prompts(first, other):
        return None
    both = zip(first.kept, other.kept, strict=False)
    return difference([(old[metric], new[metric]) for old, new in both if metric in old and metric in new])


def _parts(runs: Sequence[Compared], metric: str) -> tuple[str, ...]:
    each = [dict.fromkeys(name for row in one.kept for name in row) for one in runs if one.kept]
    if not each:
        return ()
    shared = [name for name in each[0] if all(name in other for other in each) and not name.startswith(CLAUSE)]
    return tuple(sorted(shared, key=lambda name: name != metric))


def _seeds(runs: Sequence[Compared]) -> tuple[Seeds, ...]:
    alike: dict[str, list[Compared]] = {}
    for one in runs:
        if one.run.config and one.change is not None:
            told = {key: value for key, value in one.run.config.items() if key not in APART}
            alike.setdefault(json.dumps(told, sort_keys=True, default=str), []).append(one)
    found = []
    for group in alike.values():
        gains = [one.change.change for one in group if one.change is not None]
        if len(group) > 1:
            found.append(Seeds(tuple(one.name for one in group), fmean(gains), min(gains), max(gains)))
    return tuple(found)


def _notes(runs: Sequence[Compared], metric: str) -> list[str]:
    first, *others = runs
    apart = [one.name for one in others if not same_prompts(first, one)]
    notes = [f"{', '.join(apart)}: not evaluated on {first.name}'s prompts, so without a lead"] if apart else []
    lost = [one.name for one in runs if one.change is None]
    notes += [f"{', '.join(lost)}: no {metric} of each prompt at the start and later, so no interval"] if lost else []
    uncounted = [one.name for one in runs if not math.isfinite(one.compute)]
    notes += [f"{', '.join(uncounted)}: network rows were not counted"] if uncounted else []
    return notes

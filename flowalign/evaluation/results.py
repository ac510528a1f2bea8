"""From what was read to numbers: means with their intervals, differences to a baseline, wins, categories, compute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from flowalign.evaluation.cells import Store
from flowalign.evaluation.readings import Job, OfDistance, OfDiversity, OfJudge, OfReward, Reading
from flowalign.evaluation.running import Done
from flowalign.evaluation.statistics import Estimate, estimates, over_seeds, wins
from flowalign.evaluation.sweep import Plan
from trainers.search_cost import Spent

CLAUSE = "clause/"
Grid = Float[np.ndarray, "p s"]  # of an arm: a row for each prompt, a column for each seed; nan where there is none
Sort = Literal["score", "judge", "diversity", "distance"]


@dataclass(frozen=True)
class Lead:
    """An arm against the baseline. change: of the mean. wins: the share of pairs that it wins, ties half."""

    change: Estimate
    wins: Estimate | None = None
    real: bool = False


@dataclass(frozen=True)
class Row:
    """Every arm's mean over the same prompts, and its lead over the baseline."""

    arms: Mapping[str, Estimate]
    leads: Mapping[str, Lead]


@dataclass(frozen=True)
class Number:
    """One number of a benchmark.

    per: the breakdown over whose categories it is a mean. categories: by breakdown and label. grids: by arm, all that
    it is made of. invalid: by arm, how many media have no score. parts: means of the score's other parts, by arm.
    """

    name: str
    sort: Sort
    row: Row
    per: str | None = None
    part: str | None = None
    categories: Mapping[str, Mapping[str, Row]] = field(default_factory=dict)
    grids: Mapping[str, Grid] = field(default_factory=dict)
    invalid: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Board:
    """A benchmark's numbers, its headline first."""

    name: str
    baseline: str
    arms: tuple[str, ...]
    numbers: tuple[Number, ...]


@dataclass(frozen=True)
class Compute:
    """Of one picture of an arm. cost: in forwards of one network row, None where nothing was drawn for it."""

    spent: Spent
    pictures: int
    cost: float
    seconds: float


@dataclass(frozen=True)
class Results:
    """All of a sweep. comparisons, fine: how many differences the marks of its tables hold for together."""

    boards: tuple[Board, ...]
    compute: Mapping[str, Compute]
    comparisons: int
    fine: int


def results(plan: Plan, done: Done, store: Store) -> Results:
    """The numbers of a sweep that has run."""
    boards = tuple(_board(plan, done, store, name) for name in plan.sets)
    leads = [lead for board in boards for number in board.numbers for lead in number.row.leads.values()]
    fine = [lead for board in boards for row in fine_rows(board) for lead in row.leads.values()]
    marked = tuple(_marked(board, len(leads), len(fine)) for board in boards)
    compute = {arm.name: _compute(done, arm.name) for arm in plan.arms}
    return Results(marked, compute, len(leads), len(fine))


def fine_rows(board: Board) -> list[Row]:
    """The rows of all categories of a board's headline."""
    return [row for told in board.numbers[0].categories.values() for row in told.values()] if board.numbers else []


def _board(plan: Plan, done: Done, store: Store, name: str) -> Board:
    arms = tuple(arm.name for arm in plan.arms_of(name))
    numbers = [_number(plan, reading, jobs, store) for reading, jobs in done.readings if reading.benchmark == name]
    return Board(name, plan.baselines[name], arms, tuple(number for number in numbers if number is not None))


def _number(plan: Plan, reading: Reading, jobs: Sequence[Job], store: Store) -> Number | None:
    arms = [arm.name for arm in plan.arms_of(reading.benchmark)]
    baseline = plan.baselines[reading.benchmark]
    if not jobs:
        return None
    if isinstance(reading, OfDistance):
        values = {job.units[0].arm: _scalar(store, job) for job in jobs}
        return Number(reading.name, "distance", Row({arm: _exact(values[arm]) for arm in arms}, {}))
    if isinstance(reading, OfDiversity):
        return _diversity(plan, reading, jobs, store, arms, baseline)
    if isinstance(reading, OfJudge):
        grids = _grids(plan, reading, jobs, store, "total")
        names = [*grids]
        found = estimates(np.stack([over_seeds(grids[arm]) - 0.5 for arm in names], 1))
        told = {arm: replace(one, value=one.value + 0.5, low=one.low + 0.5, high=one.high + 0.5)
                for arm, one in zip(names, found, strict=True)}  # fmt: skip
        leads = {arm: Lead(one) for arm, one in zip(names, found, strict=True)}
        return Number(reading.name, "judge", Row(told, leads), grids=grids)
    assert isinstance(reading, OfReward)
    return _score(plan, reading, jobs, store, baseline)


def _score(plan: Plan, reading: OfReward, jobs: Sequence[Job], store: Store, baseline: str) -> Number:
    scorers = {one.name: one for one in plan.sweep.benchmarks[reading.benchmark].scorers()}
    scorer = scorers.get(reading.name)
    part = scorer.part if scorer else None
    names = _part_names(jobs, store)
    if part is not None and part not in names:
        raise ValueError(
            f"benchmarks.{reading.benchmark}: the scores of {reading.name} have no part {part!r}; theirs are "
            f"{', '.join(names)}"
        )
    grids = _grids(plan, reading, jobs, store, part or "total")
    labels = plan.sets[reading.benchmark].labels
    per = scorer.per if scorer else None
    row = compare(grids, baseline, None if per is None else labels[per])
    told = {name: _by_label(grids, baseline, own) for name, own in labels.items() if _tells(reading, own)}
    clauses = {name: _grids(plan, reading, jobs, store, name) for name in names if name.startswith(CLAUSE)}
    if clauses:
        told["clause"] = {name.removeprefix(CLAUSE): compare(one, baseline) for name, one in clauses.items()}
    rest = [name for name in names if name not in (part or "total", *clauses)]
    parts = {name: _means(_grids(plan, reading, jobs, store, name)) for name in rest}
    totals = grids if part is None else _grids(plan, reading, jobs, store, "total")
    invalid = {arm: _invalid(reading, grid) for arm, grid in totals.items()}
    return Number(reading.name, "score", row, per, part, told, grids, invalid, parts)


def _invalid(reading: OfReward, grid: Grid) -> int:
    """Media that have no score, of those that should have one."""
    rows = [*range(len(grid))] if reading.rows is None else sorted(reading.rows)
    return int((~np.isfinite(grid[rows])).sum())


def _tells(reading: OfReward, labels: Sequence[str]) -> bool:
    """Whether a breakdown tells prompts of a reading apart, and not all of them from one another."""
    own = [label for i, label in enumerate(labels) if reading.rows is None or i in reading.rows]
    return 1 < len({*own}) < len(own)


def _means(grids: Mapping[str, Grid]) -> dict[str, float]:
    return {arm: estimates(over_seeds(grid)[:, None], resamples=2)[0].value for arm, grid in grids.items()}


def compare(grids: Mapping[str, Grid], baseline: str, strata: Sequence[str] | None = None) -> Row:
    """Every arm's mean and its lead over the baseline, all from the same resampled prompts.

    A pair counts where both have a score; so arms' own means may be over a few prompts more.

    strata: the category of each prompt, where the number is the mean over categories.
    """
    base = grids[baseline]
    others = [arm for arm in grids if arm != baseline]
    columns = [over_seeds(grid) for grid in grids.values()]
    columns += [over_seeds(grids[arm] - base) for arm in others]
    columns += [over_seeds(wins(grids[arm], base) - 0.5) for arm in others]
    table = np.stack(columns, 1)
    some = np.isfinite(table).any(1)
    told = None if strata is None else [name for name, there in zip(strata, some, strict=True) if there]
    found = estimates(table[some], told) if some.any() else [NOTHING] * len(columns)
    arms = dict(zip(grids, found, strict=False))
    changes, won = found[len(grids) : len(grids) + len(others)], found[len(grids) + len(others) :]
    pairs = zip(others, changes, won, strict=True)
    return Row(arms, {arm: Lead(change, _shifted(share)) for arm, change, share in pairs})


NOTHING = Estimate(math.nan, math.nan, math.nan, math.nan, 0, 0, 0)


def _shifted(share: Estimate) -> Estimate:
    """A share of wins again, from its distance to one half."""
    return replace(share, value=share.value + 0.5, low=share.low + 0.5, high=share.high + 0.5)


def _by_label(grids: Mapping[str, Grid], baseline: str, labels: Sequence[str]) -> dict[str, Row]:
    found = {}
    for label in sorted({*labels} - {""}):
        rows = [i for i, one in enumerate(labels) if one == label]
        found[label] = compare({arm: grid[rows] for arm, grid in grids.items()}, baseline)
    return found


def _diversity(
    plan: Plan, reading: OfDiversity, jobs: Sequence[Job], store: Store, arms: Sequence[str], baseline: str
) -> Number:
    count = len(plan.sets[reading.benchmark].prompts)
    grids = {arm: np.full((count, 1), math.nan) for arm in arms}
    for job in jobs:
        grids[job.units[0].arm][[*job.units[0].rows], 0] = read(store, job)["total"]
    return Number(f"diversity ({reading.name})", "diversity", compare(grids, baseline), grids=grids)


def _grids(plan: Plan, reading: Reading, jobs: Sequence[Job], store: Store, part: str) -> dict[str, Grid]:
    """By arm: the scores of all prompts and seeds; of arms that have a job."""
    count, seeds = len(plan.sets[reading.benchmark].prompts), plan.sweep.seeds
    found = {arm: np.full((count, len(seeds)), math.nan) for arm in dict.fromkeys(job.units[0].arm for job in jobs)}
    for job in jobs:
        unit = job.units[0]
        values = read(store, job).get(part)
        if values is not None:
            found[unit.arm][[*unit.rows], seeds.index(unit.seed)] = values
    return found


def _part_names(jobs: Sequence[Job], store: Store) -> list[str]:
    return [*dict.fromkeys(name for job in jobs for name in read(store, job))]


def read(store: Store, job: Job) -> Mapping[str, tuple[float, ...]]:
    """What a job has come to. Raises: OSError where it has gone."""
    found = store.scores(job.key)
    if found is None:
        raise OSError(f"{store.folder / 'scores' / job.key}.json has gone while it was in use; start again")
    return found.parts


def _scalar(store: Store, job: Job) -> float:
    return read(store, job)["total"][0]


def _exact(value: float) -> Estimate:
    """A number without an interval."""
    return replace(NOTHING, value=value)


def _compute(done: Done, arm: str) -> Compute:
    own = dict.fromkeys(unit.key for unit in done.units if unit.arm == arm)
    kept = [done.kept[key] for key in own]
    pictures = sum(len(one.digests) for one in kept)
    spent = sum((one.spent for one in kept), Spent())
    prices = done.drawing.prices[arm].prices
    return Compute(spent, pictures, spent.cost(prices) / max(pictures, 1), sum(one.seconds for one in kept))


def _marked(board: Board, comparisons: int, fine: int) -> Board:
    """With the differences marked that are real."""
    numbers = []
    for number in board.numbers:
        own = {
            name: {label: _real(row, fine) for label, row in told.items()} for name, told in number.categories.items()
        }
        numbers.append(replace(number, row=_real(number.row, comparisons), categories=own))
    return replace(board, numbers=tuple(numbers))


def _real(row: Row, comparisons: int) -> Row:
    return replace(row, leads={arm: replace(one, real=one.change.real(comparisons)) for arm, one in row.leads.items()})

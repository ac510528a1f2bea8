"""Before and after, prompt by prompt: the same prompts from the same noise, so differences are paired."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.special import stdtrit

from flowalign.report.reading import Prompt, PromptScores, RunRecord

CLAUSE = "clause/"


@dataclass(frozen=True)
class Difference:
    """Means before and after over `count` prompts, and the 95 % interval [low, high] of after - before.

    better, worse: prompts whose own score rose or fell.
    """

    before: float
    after: float
    low: float
    high: float
    count: int
    better: int
    worse: int

    @property
    def change(self) -> float:
        """After - before."""
        return self.after - self.before

    @property
    def verdict(self) -> str:
        """What the interval says in a word."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "unclear"


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same prompts. `best` tells whether `after` is the best policy, or merely the newest."""

    metric: str
    before_epoch: int
    after_epoch: int
    best: bool
    prompts: tuple[Prompt, ...]
    before: PromptScores
    after: PromptScores

    def pairs(self, name: str) -> dict[int, tuple[float, float]]:
        """Scores of that name before and after, by the number of the prompt, where both are known."""
        both = enumerate(zip(self.before, self.after, strict=True))
        return {i: (old[name], new[name]) for i, (old, new) in both if name in old and name in new}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all scores, in the order in which they first appear."""
        return tuple(dict.fromkeys(name for scores in self.before + self.after for name in scores))


@dataclass(frozen=True)
class Changed:
    """One prompt before and after: the metric, the total, and clauses that hold now, no longer hold, or still fail."""

    index: int
    prompt: Prompt
    metric: tuple[float, float]
    total: tuple[float, float] | None
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    failing: tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """The prompts worth looking at, each list from the most telling on."""

    up: tuple[Changed, ...]
    down: tuple[Changed, ...]
    best: tuple[Changed, ...]
    worst: tuple[Changed, ...]


def difference(pairs: Sequence[tuple[float, float]]) -> Difference | None:
    """The paired difference of (before, after) scores; None without any.

    The interval is Student's: mean +- t sd / sqrt(n) with n - 1 degrees of freedom; nan for a single pair.
    """
    if not pairs:
        return None
    changes = [after - before for before, after in pairs]
    count, middle = len(changes), fmean(changes)
    reach = float(stdtrit(count - 1, 0.975)) * stdev(changes) / math.sqrt(count) if count > 1 else math.nan
    return Difference(
        before=fmean(before for before, _ in pairs),
        after=fmean(after for _, after in pairs),
        low=middle - reach,
        high=middle + reach,
        count=count,
        better=sum(change > 0 for change in changes),
        worse=sum(change < 0 for change in changes),
    )


def compare(run: RunRecord, epoch: int | None = None) -> Comparison | None:
    """The base model against the best policy, or against the newest where none beats the base; None if unknown.

    Args:
        epoch: compare with this evaluation instead of the base model.
    """
    start = 0 if epoch is None else epoch
    later = [number for number in run.scored if number > start]
    if start not in run.scored or not later:
        return None
    chosen = run.best if epoch is None and run.best in later else max(later)
    before, after = run.scored[start], run.scored[chosen]
    prompts = run.prompts or tuple(Prompt(f"prompt {i}") for i in range(len(before)))
    return Comparison(run.metric, start, chosen, chosen == run.best, prompts, before, after)


def select(comparison: Comparison, count: int) -> Selection:
    """At most `count` prompts of each sort; ties of the metric go by the total, then by the prompts' order."""
    pairs = comparison.pairs(comparison.metric)
    totals = comparison.pairs("total")

    def change(i: int) -> tuple[float, float]:
        old, new = totals.get(i, (0.0, 0.0))
        return pairs[i][1] - pairs[i][0], new - old

    def level(i: int) -> tuple[float, float]:
        return pairs[i][1], totals.get(i, (0.0, 0.0))[1]

    up = sorted((i for i in pairs if change(i)[0] > 0), key=change, reverse=True)
    down = sorted((i for i in pairs if change(i)[0] < 0), key=change)
    best, worst = sorted(pairs, key=level, reverse=True), sorted(pairs, key=level)
    chosen = [tuple(_changed(comparison, i, pairs[i]) for i in order[:count]) for order in (up, down, best, worst)]
    return Selection(*chosen)


def _changed(comparison: Comparison, index: int, metric: tuple[float, float]) -> Changed:
    old, new = comparison.before[index], comparison.after[index]
    names = [name for name in old if name.startswith(CLAUSE) and name in new]
    return Changed(
        index=index,
        prompt=comparison.prompts[index],
        metric=metric,
        total=(old["total"], new["total"]) if "total" in old and "total" in new else None,
        gained=tuple(clause_name(name) for name in names if old[name] < 0.5 <= new[name]),
        lost=tuple(clause_name(name) for name in names if new[name] < 0.5 <= old[name]),
        failing=tuple(clause_name(name) for name in names if old[name] < 0.5 and new[name] < 0.5),
    )


def clause_name(name: str) -> str:
    """The clause without its prefix."""
    return name.removeprefix(CLAUSE)


def by_clause(comparison: Comparison) -> dict[str, Difference]:
    """The share of prompts in which each clause holds, over the prompts that have it."""
    clauses = [name for name in comparison.names if name.startswith(CLAUSE)]
    named = {name: difference([*comparison.pairs(name).values()]) for name in clauses}
    return {clause_name(name): found for name, found in named.items() if found is not None}


def by_part(comparison: Comparison) -> dict[str, Difference]:
    """The parts of the score that are no clauses, and the total."""
    parts = [name for name in comparison.names if not name.startswith(CLAUSE)]
    named = {name: difference([*comparison.pairs(name).values()]) for name in parts}
    return {name: found for name, found in named.items() if found is not None}


def by_kind(comparison: Comparison) -> dict[str, Difference]:
    """The metric over the prompts of each kind, kinds in alphabetical order; empty where prompts have no kinds."""
    kinds = {i: prompt.kind for i, prompt in enumerate(comparison.prompts) if prompt.kind is not None}
    return _by_group(comparison, kinds)


def by_novelty(comparison: Comparison) -> dict[str, Difference]:
    """The metric over prompts of compositions that training prompts show, and of those that none shows."""
    words = {True: "unseen in training", False: "seen in training"}
    told = {i: words[prompt.unseen] for i, prompt in enumerate(comparison.prompts) if prompt.unseen is not None}
    return _by_group(comparison, told)


def _by_group(comparison: Comparison, groups: Mapping[int, str]) -> dict[str, Difference]:
    pairs = comparison.pairs(comparison.metric)
    members = {group: [pairs[i] for i in groups if groups[i] == group and i in pairs] for group in groups.values()}
    found = {group: difference(members[group]) for group in sorted(members)}
    return {group: known for group, known in found.items() if known is not None}

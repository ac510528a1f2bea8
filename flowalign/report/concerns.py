"""What a person should know before trusting a run, in plain words. Each check answers None where all is well."""

from __future__ import annotations

import math
from statistics import fmean

from flowalign.report.comparing import Comparison, by_part, compare, difference
from flowalign.report.costs import phases, work
from flowalign.report.formats import count, number, percent, signed
from flowalign.report.reading import Row, RunRecord

HALF = 0.5  # of the groups, of the samples: beyond it most of an epoch's work teaches nothing
WASTE = 1.1  # times the floor: a tenth above it is rounding of batches, more is repeated or padded work
WAITING = 0.2  # of the time: processes are loaded unevenly
FEW = 30  # prompts: fewer give no interval to speak of


def concerns(run: RunRecord, comparison: Comparison | None) -> tuple[str, ...]:
    """All warnings, the gravest first."""
    found = [
        _hacking(run),
        _other_parts_fell(comparison),
        _no_improvement(comparison),
        _few_prompts(comparison),
        _invalid(run),
        _skipped(run),
        _no_number(run),
        _equal_groups(run),
        _clipped(run),
        _waste(run),
        _waiting(run),
    ]
    return tuple(text for text in found if text is not None)


def _mean(rows: tuple[Row, ...], name: str) -> float:
    known = [row.get(name) for row in rows if math.isfinite(row.get(name))]
    return fmean(known) if known else math.nan


def _around(run: RunRecord, epoch: int) -> tuple[Row, ...]:
    """The epochs up to `epoch`, a tenth of the run and three at least: one epoch's reward is mostly noise."""
    width = max(3, len(run.epochs) // 10)
    before = [row for row in run.epochs if row.step <= max(epoch, width)]
    return tuple(before[-width:])


def _hacking(run: RunRecord) -> str | None:
    """Held-out scores that fall after their best while the training reward rises."""
    fallen = compare(run, run.best) if run.best is not None else None
    change = difference([*fallen.pairs(fallen.metric).values()]) if fallen is not None else None
    if fallen is None or change is None or change.verdict != "worse":
        return None
    old, new = (_mean(_around(run, epoch), "reward") for epoch in (fallen.before_epoch, fallen.after_epoch))
    fell = (
        f"since epoch {fallen.before_epoch} the held-out {fallen.metric} fell from {number(change.before)} to "
        f"{number(change.after)} (95 % {signed(change.low)} to {signed(change.high)})"
    )
    if new > old:
        return f"Possible reward hacking: {fell}, while the training reward rose from {number(old)} to {number(new)}."
    return f"The policy got worse after its best: {fell}, and the training reward did not rise either."


def _other_parts_fell(comparison: Comparison | None) -> str | None:
    parts = by_part(comparison) if comparison is not None else {}
    if comparison is None or comparison.metric not in parts or parts[comparison.metric].verdict != "better":
        return None
    fell = [f"{name} ({number(d.before)} to {number(d.after)})" for name, d in parts.items() if d.verdict == "worse"]
    if not fell:
        return None
    return f"The held-out {comparison.metric} rose, but these fell: {', '.join(fell)}. Is the gain a real one?"


def _no_improvement(comparison: Comparison | None) -> str | None:
    change = difference([*comparison.pairs(comparison.metric).values()]) if comparison is not None else None
    if comparison is None or change is None or change.verdict == "better":
        return None
    if change.verdict == "worse":
        return f"The policy of epoch {comparison.after_epoch} is worse than the base model on held-out prompts."
    return "No improvement can be told from chance: the interval of the difference includes 0."


def _few_prompts(comparison: Comparison | None) -> str | None:
    known = len(comparison.pairs(comparison.metric)) if comparison is not None else FEW
    return None if known >= FEW else f"Only {known} held-out prompts have scores: too few to tell much."


def _invalid(run: RunRecord) -> str | None:
    trained = sum(row.get("invalid") for row in run.epochs if row.get("invalid") > 0)
    held_out = sum(row.get("held-out/invalid") for row in run.evaluations if row.get("held-out/invalid") > 0)
    if not trained + held_out:
        return None
    return (
        f"Scores could not be had for {count(trained)} training samples and {count(held_out)} held-out pictures; "
        "they were left out."
    )


def _skipped(run: RunRecord) -> str | None:
    epochs = [row for row in run.epochs if row.get("skipped") > 0]
    if not epochs:
        return None
    steps = sum(row.get("skipped") for row in epochs)
    return (
        f"Optimizer steps skipped because a loss or gradient was not finite: {count(steps)}, "
        f"first in epoch {epochs[0].step}."
    )


def _no_number(run: RunRecord) -> str | None:
    epochs = [row.step for row in run.epochs if "reward" in row.values and not math.isfinite(row.get("reward"))]
    return f"The training reward was no number in {len(epochs)} epochs, first in epoch {epochs[0]}." if epochs else None


def _equal_groups(run: RunRecord) -> str | None:
    share = _mean(_around(run, run.done), "equal_groups")
    if not share > HALF:
        return None
    return (
        f"In the last epochs {percent(share)} of the groups had equal rewards and taught nothing: "
        "prompts too easy or too hard, or a reward too coarse."
    )


def _clipped(run: RunRecord) -> str | None:
    epochs = [row.step for row in run.epochs if row.get("clip_fraction") > HALF]
    if not epochs:
        return None
    return (
        f"More than half of the samples were clipped in {len(epochs)} of {len(run.epochs)} epochs, first in epoch "
        f"{epochs[0]}: lower the learning rate or the updates per epoch."
    )


def _waste(run: RunRecord) -> str | None:
    rows = work(run)
    if not rows or not rows[-1].ratio > WASTE:
        return None
    return f"The network did {rows[-1].ratio:.2f} times the work that the method needs; see the costs below."


def _waiting(run: RunRecord) -> str | None:
    share = next((phase.share for phase in phases(run) if phase.name == "wait"), 0.0)
    return f"The main process waited for others {percent(share)} of the time." if share > WAITING else None

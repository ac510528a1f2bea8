"""Which charts a run gets: curves over epochs, and histograms of its first, middle and last epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from flowalign.report.charts import Chart, Series, histogram_chart, line_chart
from flowalign.report.formats import count, number
from flowalign.report.reading import Histogram, Row, RunRecord

TITLES = {
    "approx_kl": "KL to the policy of the rollout (estimate)",
    "kl": "KL to the reference",
    "ratio_max": "Furthest ratio from 1",
    "clip_fraction": "Share of samples clipped",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "reward_std_in_group": "Spread of rewards within a group",
    "equal_groups": "Share of groups with equal rewards",
    "skipped": "Optimizer steps skipped",
    "invalid": "Scores that could not be had",
    "log_ratio": "log ratio",
}
COUNTS = ("skipped", "invalid")
# shown in charts of their own or among the costs
ELSEWHERE = ("reward/", "time/", "rows/", "floor/")


@dataclass(frozen=True)
class Curves:
    """Charts in order of weight; `constant` lists what never changed, which needs no chart."""

    scores: tuple[Chart, ...]
    clauses: tuple[Chart, ...]
    training: tuple[Chart, ...]
    constant: tuple[str, ...]


def curves(run: RunRecord) -> Curves:
    """All curves of a run."""
    names = _names(run.epochs + run.evaluations)
    parts = dict.fromkeys(
        name.split("/", 1)[1] for name in names if name.startswith(("reward/", "held-out/")) and not _is_bound(name)
    )
    both = [part for part in parts if not part.startswith("clause/")]
    watched = [name for name in _names(run.epochs) if name != "reward" and not name.startswith(ELSEWHERE)]
    moving = [name for name in watched if len(_known(run.epochs, name)) > 1]
    still = [name for name in watched if len(_known(run.epochs, name)) == 1]
    return Curves(
        scores=_drawn([held_out_chart(run), _reward_chart(run), *(_part_chart(run, part) for part in both)]),
        clauses=_drawn(_part_chart(run, part) for part in parts if part.startswith("clause/")),
        training=_drawn(_watched_chart(run, name) for name in moving),
        constant=tuple(f"{name} {number(*_known(run.epochs, name))}" for name in still),
    )


def held_out_chart(run: RunRecord) -> Chart | None:
    """The metric that decides, with its 95 % band over prompts and the base model's level."""
    rows = run.evaluations
    series = _held_out(run, "held-out")
    if all(math.isfinite(row.get(bound)) for row in rows for bound in ("held-out/low", "held-out/high")):
        low, high = (tuple(row.get(bound) for row in rows) for bound in ("held-out/low", "held-out/high"))
        series = replace(series, low=low, high=high)
    base = next((row.get("held-out") for row in rows if row.step == 0), None)
    return line_chart(f"Held-out {run.metric}", f"{_ends(series.y)}; band: 95 % over prompts", [series], base)


def _reward_chart(run: RunRecord) -> Chart | None:
    mean, spread = ([row.get(name) for row in run.epochs] for name in ("reward", "reward_std_in_group"))
    line = _training(run, "reward")
    bounds = [tuple(m + sign * s for m, s in zip(mean, spread, strict=True)) for sign in (-1, 1)]
    series = replace(line, low=bounds[0], high=bounds[1])
    return line_chart("Training reward", f"{_ends(series.y)}; band: one std within a group", [series])


def _part_chart(run: RunRecord, part: str) -> Chart | None:
    # the training reward is the total, unless evaluation has a reward of its own
    same_total = part == "total" and run.setting("evaluation", "reward") is None
    train = _training(run, "reward" if same_total else f"reward/{part}")
    held_out = _held_out(run, f"held-out/{part}")
    known = [one for one in (train, held_out) if any(math.isfinite(y) for y in one.y)]
    shown = held_out if held_out in known else train
    return line_chart(part, f"{shown.label} {_ends(shown.y)}", known)


def _watched_chart(run: RunRecord, name: str) -> Chart | None:
    series = _training(run, name)
    if name in COUNTS:
        note = f"{name}: {count(sum(y for y in series.y if math.isfinite(y)))} in all"
        return line_chart(TITLES[name], note, [replace(series, noisy=False)])
    return line_chart(TITLES.get(name, name), f"{name}: {_ends(series.y)}", [series])


def _drawn(charts: Iterable[Chart | None]) -> tuple[Chart, ...]:
    return tuple(chart for chart in charts if chart is not None)


def _names(rows: tuple[Row, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for row in rows for name in row.values))


def _is_bound(name: str) -> bool:
    """Numbers about the evaluation that are no scores."""
    return name in ("held-out/low", "held-out/high", "held-out/invalid")


def _known(rows: tuple[Row, ...], name: str) -> set[float]:
    return {row.get(name) for row in rows if math.isfinite(row.get(name))}


def _training(run: RunRecord, name: str) -> Series:
    return Series("training", "train", *_points(run.epochs, name), noisy=True)


def _held_out(run: RunRecord, name: str) -> Series:
    return Series("held-out", "held-out", *_points(run.evaluations, name), dots=True)


def _points(rows: tuple[Row, ...], name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(float(row.step) for row in rows), tuple(row.get(name) for row in rows)


def _ends(values: tuple[float, ...]) -> str:
    known = [value for value in values if math.isfinite(value)]
    return f"{number(known[0])} to {number(known[-1])}" if known else "unknown"


def histogram_rows(run: RunRecord) -> tuple[tuple[Chart, ...], ...]:
    """A row of charts per quantity, all of a row on one axis, so that a shape can be compared over the run."""
    rows = []
    for name in dict.fromkeys(one.name for one in run.histograms):
        latest = {one.step: one for one in run.histograms if one.name == name}
        steps = sorted(latest)
        chosen = dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1]))
        rows.append(_histogram_row(run, [latest[step] for step in chosen]))
    return tuple(rows)


def _histogram_row(run: RunRecord, chosen: list[Histogram]) -> tuple[Chart, ...]:
    low, high = min(one.low for one in chosen), max(one.high for one in chosen)
    clip = run.setting("clip_range")
    limits: list[float] = []
    if chosen[0].name == "log_ratio" and isinstance(clip, float) and 0 < clip < 1:
        limits = [math.log1p(-clip), math.log1p(clip)]
    return tuple(_histogram(one, low, high, limits) for one in chosen)


def _histogram(one: Histogram, low: float, high: float, limits: list[float]) -> Chart:
    total, width = sum(one.counts), (one.high - one.low) / len(one.counts)
    edges = [one.low + i * width for i in range(len(one.counts) + 1)]
    bins = [(a, b, n / total if total else 0.0) for a, b, n in zip(edges, edges[1:], one.counts, strict=False)]
    title = f"{TITLES.get(one.name, one.name)}, epoch {one.step}"
    return histogram_chart(title, f"{total:,.0f} values", bins, low, high, limits)

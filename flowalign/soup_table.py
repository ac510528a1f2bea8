"""The table of a sweep of soups, and its plot."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from flowalign.report.pareto import Point, non_dominated, pareto_svg

Weights = tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """A point's result; by reward. mean, error: over the valid scores, nan without any. invalid: how many are not.

    chord: sum_i w_i of the members' own means, what a soup gives that is no better than mixing the members' pictures.
    """

    weights: Weights
    mean: Mapping[str, float]
    error: Mapping[str, float]
    invalid: Mapping[str, int]
    chord: Mapping[str, float]
    best: bool


def table(known: Mapping[Weights, Mapping[str, Sequence[float]]]) -> list[Row]:
    """The rows of all points, with the scores of each point's prompts by reward, nan where there is none."""
    means = {weights: {name: mean_of(values) for name, values in rows.items()} for weights, rows in known.items()}
    best = non_dominated([[*mean.values()] for mean in means.values()])
    rows = []
    for (weights, scores), good in zip(known.items(), best, strict=True):
        mean = means[weights]
        error = {name: _error(values) for name, values in scores.items()}
        invalid = {name: sum(map(math.isnan, values)) for name, values in scores.items()}
        rows.append(Row(weights, mean, error, invalid, {name: _chord(means, weights, name) for name in mean}, good))
    return rows


def _chord(means: Mapping[Weights, Mapping[str, float]], weights: Weights, name: str) -> float:
    ends = [tuple(float(i == k) for i in range(len(weights))) for k in range(len(weights))]
    if any(end not in means for end in ends):
        return math.nan
    return math.fsum(weight * means[end][name] for weight, end in zip(weights, ends, strict=True) if weight)


def mean_of(values: Sequence[float]) -> float:
    """Of those that are finite, nan without any."""
    known = [value for value in values if math.isfinite(value)]
    return fmean(known) if known else math.nan


def _error(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return stdev(known) / len(known) ** 0.5 if len(known) > 1 else math.nan


def or_none(value: float) -> float | None:
    """A number as JSON has it."""
    return value if math.isfinite(value) else None


def label(weights: Weights) -> str:
    """The weights as a file's name has them."""
    return "_".join(f"{weight:.4g}" for weight in weights)


def plain(row: Row) -> dict[str, Any]:
    """A row as JSON has it."""
    numbers = {
        name: {key: or_none(value) for key, value in values.items()}
        for name, values in (("mean", row.mean), ("error", row.error), ("chord", row.chord))
    }
    return {"weights": [*row.weights], **numbers, "invalid": dict(row.invalid), "non_dominated": row.best}


def plot(rows: Sequence[Row], one: str, other: str) -> str:
    """The SVG of one reward against another."""
    points = [
        Point(row.mean[one], row.mean[other], " ".join(f"{w:.3g}" for w in row.weights), row.best, 1.0 in row.weights)
        for row in rows
    ]
    return pareto_svg(points, one, other, "Soups by their weights")


def text_table(rows: Sequence[Row]) -> str:
    """CSV: weights, then of each reward its mean, standard error, lead over the chord, and pictures without a score."""
    names = [*rows[0].mean]
    columns = [f"{name}{what}" for name in names for what in ("", " error", " over chord", " invalid")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(f"w{i + 1}" for i in range(len(rows[0].weights))), *columns, "non-dominated"])
    for row in rows:
        numbers = [number for name in names for number in _numbers(row, name)]
        writer.writerow([*(f"{w:.4g}" for w in row.weights), *numbers, "yes" if row.best else "no"])
    return text.getvalue().rstrip("\n")


def _numbers(row: Row, name: str) -> list[str]:
    values = (row.mean[name], row.error[name], row.mean[name] - row.chord[name])
    return [*(f"{value:.5g}" for value in values), str(row.invalid[name])]

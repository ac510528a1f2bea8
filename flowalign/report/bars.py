"""Rows of bars on one scale, one bar for each of several runs or arms."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

SHADES = 8  # colours of the style sheet


@dataclass(frozen=True)
class Bar:
    """An arm's value in a row of bars. left, width: in percent of the row. shade: the arm's colour."""

    arm: str
    shade: int
    value: float
    low: float
    high: float
    change: str
    real: bool
    left: float
    width: float


@dataclass(frozen=True)
class Bars:
    """A row of bars that share a scale. count: prompts."""

    title: str
    count: int
    bars: tuple[Bar, ...]


def span(values: Iterable[float]) -> tuple[float, float]:
    """The ends of what several rows of bars span together: 0 and 1 where all of it are shares."""
    known = [value for value in values if math.isfinite(value)]
    least, most = min([0.0, *known]), max([0.0, *known])
    return (0.0, 1.0) if least == 0 and 0.3 < most <= 1 else (least, most if most > least else least + 1.0)


def placed(value: float, scale: tuple[float, float]) -> tuple[float, float]:
    """Where a bar from 0 to a value starts on that scale, and how wide it is, in percent; no width for nan."""
    least, whole = scale[0], scale[1] - scale[0]
    start, stop = sorted((0.0, value if math.isfinite(value) else 0.0))
    return 100 * (start - least) / whole, 100 * (stop - start) / whole

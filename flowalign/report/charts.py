"""Charts as plain geometry, in units of a 360 x 200 picture that the page draws as SVG, one to one on a phone.

Drawn by hand and not by matplotlib: text stays text in the page's own font, colours follow light and dark mode, a chart
is a few kilobytes, and the same run gives the same bytes whatever is installed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 346, 10, 176  # the frame inside the picture; labels stand left of it and below
POINTS = 300  # more than there are pixels to tell apart; longer runs are averaged
NOISY = 30  # points, from which on a line of epochs is drawn thin under its moving mean
DECADES = 1.7  # of range, from which on a logarithmic axis reads better


@dataclass(frozen=True)
class Series:
    """Points in order of x; y is nan where it is not known. `low` and `high` bound a band, each as long as y.

    role: the name of the style that draws it: "train", "held-out". noisy: draw the moving mean over it.
    """

    label: str
    role: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    dots: bool = False
    noisy: bool = False


@dataclass(frozen=True)
class Scale:
    """Maps [low, high], linear or logarithmic, to [start, stop] of the picture."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A shape of a chart: SVG path data, or dots at places, in the style of a role."""

    role: str
    path: str = ""
    dots: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Chart:
    """A drawing with its words. areas, lines: filled and stroked shapes. legend: (role, label) of each series."""

    title: str
    note: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    areas: tuple[Mark, ...]
    lines: tuple[Mark, ...]
    legend: tuple[tuple[str, str], ...]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers in [low, high]: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))
    return [i * step + 0.0 for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], thinned to six."""
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    return [10.0**power for power in powers][:: max(1, math.ceil(len(powers) / 6))]


def labelled(values: Sequence[float], scale: Scale) -> tuple[Tick, ...]:
    """Ticks at values of a scale, all with as many decimals as tell them apart, at most six."""
    sizes = [abs(value) for value in values if value]
    if scale.log or not sizes or max(sizes) >= 1e5 or max(sizes) < 1e-3:
        return tuple(Tick(scale(value), f"{value:.4g}") for value in values)
    fits = (d for d in range(6) if all(abs(round(value, d) - value) < 1e-9 for value in values))
    decimals = next(fits, 6)
    return tuple(Tick(scale(value), f"{value:.{decimals}f}") for value in values)


def line_chart(title: str, note: str, series: Sequence[Series], level: float | None = None) -> Chart | None:
    """Lines over epochs, each with its band; None without any known value.

    Args:
        level: draws a dashed line at this height, as a base to compare with.
    """
    series = [thinned(one) for one in series]
    values = [v for one in series for v in (*one.y, *one.low, *one.high) if math.isfinite(v)]
    values += [level] if level is not None and math.isfinite(level) else []
    if not values:
        return None
    xs = [x for one in series for x in one.x]
    across = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, RIGHT)
    up = _vertical(values)
    dashed = f"M{LEFT} {up(level):.1f}H{RIGHT}" if level is not None and math.isfinite(level) else ""
    return Chart(
        title=title,
        note=note,
        x_ticks=labelled([x for x in ticks(across.low, across.high) if x == int(x)], across),
        y_ticks=labelled((log_ticks if up.log else ticks)(up.low, up.high), up),
        areas=tuple(Mark(one.role, _band(one, across, up)) for one in series if one.low),
        lines=((Mark("level", dashed),) if dashed else ())
        + tuple(m for one in series for m in _lines(one, across, up)),
        legend=tuple((one.role, one.label) for one in series) if len(series) > 1 else (),
    )


def thinned(series: Series) -> Series:
    """Neighbouring points averaged where there are more than can be told apart."""
    size = math.ceil(len(series.x) / POINTS)
    if size <= 1:
        return series

    def mean(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(_mean(values[i : i + size]) for i in range(0, len(values), size))

    return replace(series, x=mean(series.x), y=mean(series.y), low=mean(series.low), high=mean(series.high))


def _moving_mean(places: Sequence[float]) -> list[float]:
    """The centred mean over a fifteenth of the points; at the ends, over those that there are.

    Of places in the picture, not of values: on a logarithmic axis one spike would lift the mean above all others.
    """
    reach = len(places) // 30
    return [_mean(places[max(0, i - reach) : i + reach + 1]) for i in range(len(places))]


def _is_noisy(series: Series) -> bool:
    return series.noisy and len(series.y) >= NOISY


def _mean(values: Iterable[float]) -> float:
    """The mean of what is known."""
    known = [value for value in values if math.isfinite(value)]
    return fmean(known) if known else math.nan


def _vertical(values: list[float]) -> Scale:
    """The axis that holds all values, with a little air; logarithmic where positive values span decades."""
    low, high = min(values), max(values)
    if low > 0 and math.log10(high / low) > DECADES:
        return Scale(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)), BOTTOM, TOP, log=True)
    spread = high - low if high - low > 1e-9 * abs(high) else 0.0  # less is rounding
    air = 0.06 * spread or abs(high) * 0.1 or 1.0
    # a value that cannot be negative does not get an axis that is
    return Scale(0.0 if low >= 0 > low - air else low - air, high + air, BOTTOM, TOP)


def _runs(points: Sequence[tuple[float, ...]]) -> list[list[tuple[float, ...]]]:
    """Stretches of points that are all finite: a line breaks where a value is unknown."""
    found: list[list[tuple[float, ...]]] = [[]]
    for point in points:
        if all(math.isfinite(value) for value in point):
            found[-1].append(point)
        elif found[-1]:
            found.append([])
    return [stretch for stretch in found if stretch]


def _path(points: Sequence[tuple[float, ...]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _lines(series: Series, across: Scale, up: Scale) -> list[Mark]:
    """The line, or where it is noisy the points as a thin line and their moving mean as the line."""
    x, y = [across(value) for value in series.x], [up(value) for value in series.y]
    if not _is_noisy(series):
        return [_line(series, x, y)]
    return [_line(replace(series, role="raw"), x, y), _line(series, x, _moving_mean(y))]


def _line(series: Series, x: list[float], y: list[float]) -> Mark:
    stretches = _runs([*zip(x, y, strict=True)])
    alone = [point for stretch in stretches for point in stretch if series.dots or len(stretch) == 1]
    path = "".join(_path(stretch) for stretch in stretches if len(stretch) > 1)
    return Mark(series.role, path, tuple((place[0], place[1]) for place in alone))


def _band(series: Series, across: Scale, up: Scale) -> str:
    low, high = [up(value) for value in series.low], [up(value) for value in series.high]
    if _is_noisy(series):
        low, high = _moving_mean(low), _moving_mean(high)
    shapes = ""
    for run in _runs([*zip(map(across, series.x), low, high, strict=True)]):
        above, below = [(x, top) for x, _, top in run], [(x, bottom) for x, bottom, _ in run]
        shapes += _path(above + below[::-1]) + "Z"
    return shapes


def histogram_chart(
    title: str, note: str, bins: Sequence[tuple[float, float, float]], low: float, high: float, marks: Sequence[float]
) -> Chart:
    """Bars of shares over [low, high].

    Args:
        bins: (left edge, right edge, share of all) of each bar.
        marks: places of dashed lines, where they lie inside.
    """
    across = Scale(low, high, LEFT, RIGHT)
    up = Scale(0.0, max([share for _, _, share in bins] + [1e-9]) * 1.05, BOTTOM, TOP)
    bars = ""
    for left, right, share in bins:
        if share > 0:
            width = max(across(right) - across(left) - 0.5, 0.7)  # a bar stays visible where its bin is narrow
            bars += f"M{across(left):.1f} {BOTTOM}V{up(share):.1f}h{width:.1f}V{BOTTOM}Z"
    dashed = "".join(f"M{across(x):.1f} {TOP}V{BOTTOM}" for x in marks if low < x < high)
    return Chart(
        title=title,
        note=note,
        x_ticks=labelled(ticks(low, high), across),
        y_ticks=tuple(Tick(up(y), f"{100 * y:.3g} %") for y in ticks(0.0, up.high, 4)),
        areas=(Mark("bars", bars),) if bars else (),
        lines=(Mark("level", dashed),) if dashed else (),
        legend=(),
    )

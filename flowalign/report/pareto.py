"""Two rewards against each other, point by point, as an SVG file of its own."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from flowalign.report.charts import Scale, Tick, labelled, log_ticks, ticks

WIDTH, HEIGHT = 520, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 500, 34, 346  # the frame inside the picture
AIR = 0.08  # of the range, around the points
ROOM = 90  # pixels that a label takes
LETTER, TALL = 6.2, 11.0  # of a label's text
LIFTS = (-6.0, 4.0, 15.0, -18.0, 27.0, -30.0)  # of a label's base line against its dot, those near first
STYLE = """
text { font: 11px system-ui, sans-serif; fill: #59636e } .title { font-size: 13px; fill: #1b1f24 }
.paper { fill: #ffffff } .grid { stroke: #d8dde3; fill: none }
.chord { stroke: #9aa4af; stroke-dasharray: 4 3; fill: none }
.front { stroke: #0072b2; fill: none } .best { fill: #0072b2 } .other { fill: #ffffff; stroke: #59636e }
@media (prefers-color-scheme: dark) {
  text { fill: #a0a9b3 } .title { fill: #e6e9ec } .paper { fill: #14171a } .grid { stroke: #353b42 }
  .chord { stroke: #77818c } .front { stroke: #56b4e9 } .best { fill: #56b4e9 }
  .other { fill: #14171a; stroke: #a0a9b3 }
}"""


@dataclass(frozen=True)
class Point:
    """Means of the two rewards, with a label. best: no other point is better. corner: chords join corners."""

    x: float
    y: float
    label: str
    best: bool
    corner: bool = False


def non_dominated(rows: Sequence[Sequence[float]]) -> list[bool]:
    """Of each row of rewards whether no other row is at least as high in all of them and higher in one.

    A row with a reward that is not finite is dominated, and dominates none.
    """
    known = [all(map(math.isfinite, row)) for row in rows]

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        pairs = [*zip(one, other, strict=True)]
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return [
        ok and not any(fine and beats(other, row) for fine, other in zip(known, rows, strict=True))
        for ok, row in zip(known, rows, strict=True)
    ]


@dataclass(frozen=True)
class Scatter:
    """Points, the names of their axes, and a title. log_x: whether x is drawn by its logarithm."""

    points: Sequence[Point]
    x_name: str
    y_name: str
    title: str
    log_x: bool = False


def picture_of(one: Scatter) -> str:
    """The plot as a data: URI, which keeps its style to itself inside a page."""
    drawn = pareto_svg(one.points, one.x_name, one.y_name, one.title, one.log_x)
    return f"data:image/svg+xml;base64,{base64.b64encode(drawn.encode()).decode()}"


def pareto_svg(points: Sequence[Point], x_name: str, y_name: str, title: str, log_x: bool = False) -> str:
    """The points with their labels, those that are `best` filled and joined, and dashed chords between the corners.

    Points that are not finite are left out. Raises: ValueError without any.
    """
    shown = [one for one in points if math.isfinite(one.x) and math.isfinite(one.y)]
    if not shown:
        raise ValueError("there is nothing to plot: no point has both rewards")
    across, up = _scale([one.x for one in shown], LEFT, RIGHT, log_x), _scale([one.y for one in shown], BOTTOM, TOP)
    x_ticks = labelled((log_ticks if log_x else ticks)(across.low, across.high), across)
    y_ticks = labelled(ticks(up.low, up.high), up)
    corners = [one for one in shown if one.corner]
    chords = [(a, b) for i, a in enumerate(corners) for b in corners[i + 1 :]]
    front = sorted((one for one in shown if one.best), key=lambda one: one.x)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(title)}">',
        f'<style>{STYLE}</style><rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>',
        _text((LEFT + RIGHT) / 2, 18, title, "title"),
        *_axes(x_ticks, y_ticks),
        _text((LEFT + RIGHT) / 2, HEIGHT - 12, x_name, "title"),
        f'<g transform="rotate(-90 14 {(TOP + BOTTOM) / 2})">{_text(14, (TOP + BOTTOM) / 2, y_name, "title")}</g>',
        *(f'<path class="chord" d="{_line((a, b), across, up)}"/>' for a, b in chords),
        *([f'<path class="front" d="{_line(front, across, up)}"/>'] if len(front) > 1 else []),
        *_dots(shown, across, up),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _scale(values: Sequence[float], start: float, stop: float, log: bool = False) -> Scale:
    low, high = min(values), max(values)
    if log:
        air = (high / low) ** AIR if high > low else 10.0
        return Scale(low / air, high * air, start, stop, log=True)
    spread = high - low if high - low > 1e-9 * abs(high) else 0.0  # less is rounding
    air = AIR * spread or abs(high) * 0.1 or 1.0
    return Scale(low - air, high + air, start, stop)


def _axes(x_ticks: Sequence[Tick], y_ticks: Sequence[Tick]) -> list[str]:
    lines = "".join(f"M{LEFT} {one.at:.1f}H{RIGHT}" for one in y_ticks)
    lines += "".join(f"M{one.at:.1f} {TOP}V{BOTTOM}" for one in x_ticks)
    return [
        f'<path class="grid" d="{lines}"/>',
        *(_text(one.at, BOTTOM + 17, one.label) for one in x_ticks),
        *(f'<text x="{LEFT - 6}" y="{one.at + 4:.1f}" text-anchor="end">{one.label}</text>' for one in y_ticks),
    ]


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="middle">{escape(text)}</text>'


def _line(points: Sequence[Point], across: Scale, up: Scale) -> str:
    return "M" + "L".join(f"{across(one.x):.1f} {up(one.y):.1f}" for one in points)


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _dots(points: Sequence[Point], across: Scale, up: Scale) -> list[str]:
    """Dots, and each one's label beside it where it lies on nothing else, or as little as can be."""
    places = [(across(one.x), up(one.y)) for one in points]
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    drawn = []
    for one, (x, y) in zip(points, places, strict=True):
        sides = (-1, 1) if x > RIGHT - ROOM else (1, -1)
        boxes = {(side, lift): _label_box(x, y, side, lift, len(one.label)) for lift in LIFTS for side in sides}
        side, lift = min(boxes, key=lambda at: sum(_shared(boxes[at], other) for other in taken))
        taken.append(boxes[side, lift])
        anchor, kind = "start" if side > 0 else "end", "best" if one.best else "other"
        label = f'<text x="{x + 8 * side:.1f}" y="{y + lift:.1f}" text-anchor="{anchor}">{escape(one.label)}</text>'
        drawn.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>{label}')
    return drawn


def _label_box(x: float, y: float, side: int, lift: float, letters: int) -> Box:
    near, far = x + 8 * side, x + side * (8 + LETTER * letters)
    return min(near, far), y + lift - TALL + 2, max(near, far), y + lift + 2


def _shared(one: Box, other: Box) -> float:
    """The area that two boxes have in common; of a box that leaves the picture that part counts too."""
    wide, tall = (min(one[k + 2], other[k + 2]) - max(one[k], other[k]) for k in (0, 1))
    outside = max(0.0, -one[0]) + max(0.0, one[2] - WIDTH)
    return max(0.0, wide) * max(0.0, tall) + outside * TALL

"""The page of `flowalign compare`: every number is made here or deeper, the template only places and escapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flowalign import report
from flowalign.comparison.runs import FLATTERED, Compared, Gathered, Point, same_prompts
from flowalign.comparison.table import interval
from flowalign.report import charts, formats
from flowalign.report.bars import SHADES, Bar, Bars, placed, span
from flowalign.report.comparing import by_kind
from flowalign.report.differing import unlike
from flowalign.report.headline import state
from flowalign.report.images import Embedded, from_zip
from flowalign.report.pareto import Point as Dot
from flowalign.report.pareto import Scatter, non_dominated, picture_of

EACH = 12  # prompts that are shown
MOST = 96  # pictures of a page
PLOTS = 3  # pairs of rewards
BASE = "before training"
HERE, SHARED = Path(__file__).parent, Path(report.__file__).parent


@dataclass(frozen=True)
class Line:
    """A run in the table at the top."""

    name: str
    shade: int
    told: str
    before: float
    after: float
    change: str
    lead: str
    verdict: str
    compute: float
    seconds: float


@dataclass(frozen=True)
class Cell:
    """What one run has made of a prompt."""

    name: str
    shade: int | None
    score: float
    picture: Embedded | None


@dataclass(frozen=True)
class Shown:
    """A prompt, and what it was before training and of every run since."""

    prompt: str
    kind: str | None
    cells: tuple[Cell, ...]


def render(made: Gathered) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader([HERE, SHARED]),
        autoescape=True,  # prompts, names and settings are the user's text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {name: getattr(formats, name) for name in ("number", "signed", "count", "duration")}
    environment.filters.update(filters)
    return environment.get_template("compare.html.j2").render(
        made=made,
        lines=[_line(one, i % SHADES) for i, one in enumerate(made.runs)],
        charts=_charts(made),
        kinds=_kinds(made),
        plots=_plots(made),
        settings=unlike([one.run.config for one in made.runs]),
        shown=_shown(made),
        frame=charts,
        flattered=FLATTERED,
        style=Markup((SHARED / "page.css").read_text("utf-8") + (HERE / "compare.css").read_text("utf-8")),
    )


def _line(one: Compared, shade: int) -> Line:
    method = str(one.run.setting("trainer") or "method unknown").rsplit(".", 1)[-1]
    ends = (one.change.before, one.change.after) if one.change is not None else (math.nan, math.nan)
    verdict = one.lead.verdict if one.lead is not None else "unclear"
    told = f"{method}, {state(one.run)}"
    return Line(
        one.name, shade, told, *ends, interval(one.change), interval(one.lead), verdict, one.compute, one.run.seconds
    )


def _charts(made: Gathered) -> list[charts.Chart]:
    counted = all(math.isfinite(one.compute) for one in made.runs) and any(one.compute for one in made.runs)
    axes: list[tuple[str, Callable[[Point], float]]] = [("epochs", lambda point: float(point.epoch))]
    if counted:
        axes.insert(0, ("thousand network rows", lambda point: point.compute / 1000))
    drawn = [_chart(made, over, at) for over, at in axes]
    return [one for one in drawn if one is not None]


def _chart(made: Gathered, over: str, at: Callable[[Point], float]) -> charts.Chart | None:
    lines = [
        charts.Series(
            one.name, f"shade{i % SHADES}", tuple(map(at, one.curve)), tuple(p.score for p in one.curve), dots=True
        )
        for i, one in enumerate(made.runs)
        if one.curve
    ]
    if not lines:
        return None
    start = next((one.curve[0].score for one in made.runs if one.curve and not one.curve[0].epoch), None)
    return charts.line_chart(f"Held-out {made.metric}", f"over {over}", lines, start)


def _kinds(made: Gathered) -> tuple[Bars, ...]:
    """The kept policies by kind of prompt, over what the first one was before; of runs on the first one's prompts."""
    first = made.runs[0]
    if first.own is None:
        return ()
    told = {one.name: by_kind(one.own) for one in made.runs if one.own is not None and same_prompts(first, one)}
    kinds = by_kind(first.own)
    values = [v for rows in told.values() for row in rows.values() for v in (row.before, row.after)]
    scale = span(values)

    def bar(name: str, shade: int, value: float) -> Bar:
        return Bar(name, shade, value, math.nan, math.nan, "", False, *placed(value, scale))

    return tuple(
        Bars(
            kind,
            row.count,
            (
                bar(BASE, SHADES - 2, row.before),
                *(
                    bar(one.name, i % SHADES, told[one.name][kind].after)
                    for i, one in enumerate(made.runs)
                    if kind in told.get(one.name, {})
                ),
            ),
        )
        for kind, row in kinds.items()
    )


def _plots(made: Gathered) -> list[tuple[str, str]]:
    """Scatter plots as data URIs with what they show: the metric over compute, and rewards against each other."""
    known = [one for one in made.runs if one.kept]
    found = []
    paid = [one for one in known if math.isfinite(one.compute) and one.change is not None]
    if len(paid) > 1:
        points = [(one.compute / 1000, one.change.change if one.change else math.nan) for one in paid]
        best = non_dominated([(-x, y) for x, y in points])
        title = f"Change of {made.metric} over compute"
        dots = [Dot(x, y, one.name, ok) for (x, y), one, ok in zip(points, paid, best, strict=True)]
        found.append((title, picture_of(Scatter(dots, "thousand network rows", "change", title))))
    for x_name, y_name in [*combinations(made.parts, 2)][:PLOTS]:
        means = [(one.mean(x_name), one.mean(y_name)) for one in known]
        start = (known[0].mean(x_name, before=True), known[0].mean(y_name, before=True))
        best = non_dominated([*means, start])
        labels = [*(one.name for one in known), BASE]
        dots = [Dot(*at, name, ok) for at, name, ok in zip([*means, start], labels, best, strict=True)]
        title = f"{y_name} against {x_name}"
        if any(math.isfinite(dot.x) and math.isfinite(dot.y) for dot in dots):
            found.append((title, picture_of(Scatter(dots, x_name, y_name, title))))
    return found


def _shown(made: Gathered) -> list[Shown]:
    """The prompts on which the runs differ most, by the metric and then by the total."""
    first = made.runs[0]
    if first.own is None:
        return []
    runs = [(i % SHADES, one) for i, one in enumerate(made.runs) if one.kept and same_prompts(first, one)]
    count = min(EACH, MOST // (len(runs) + 1))

    def spread(i: int, name: str) -> float:
        values = [one.kept[i][name] for _, one in runs if name in one.kept[i]]
        return max(values) - min(values) if values else 0.0

    order = sorted(range(len(first.run.prompts)), key=lambda i: (-spread(i, made.metric), -spread(i, "total"), i))
    chosen = tuple(order[:count])
    pictures = [from_zip(one.run.zip_of(one.own.after_epoch), chosen) for _, one in runs if one.own is not None]
    before = from_zip(first.run.zip_of(first.own.before_epoch), chosen)

    def cells(i: int) -> tuple[Cell, ...]:
        start = Cell(BASE, None, _score(first.own.before[i], made.metric) if first.own else math.nan, before.get(i))
        later = [
            Cell(one.name, shade, _score(one.kept[i], made.metric), kept.get(i))
            for (shade, one), kept in zip(runs, pictures, strict=True)
        ]
        return (start, *later)

    return [Shown(first.run.prompts[i].text, first.run.prompts[i].kind, cells(i)) for i in chosen]


def _score(row: Mapping[str, float], name: str) -> float:
    return row.get(name, math.nan)

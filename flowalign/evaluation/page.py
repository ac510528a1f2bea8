"""A sweep's report.html: one file, no network, from results.json and the media beside it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flowalign import report
from flowalign.report import formats
from flowalign.report.bars import SHADES, Bar, Bars, placed, span
from flowalign.report.differing import unlike
from flowalign.report.images import LARGEST, LARGEST_FILM, WIDEST, Embedded, embed
from flowalign.report.pareto import Point, Scatter, non_dominated, picture_of

EACH = 4  # prompts at most on which an arm is most above its baseline, and as many on which it is most below
MOST = 96  # pictures of a page, about
PLOTS = 3  # pairs of scores
WIDE = 20  # times the least compute: a plot over more than that takes the logarithm
SAME = 1.1  # times the least compute: less than that is the noise of measured prices, and no plot
HERE, SHARED = Path(__file__).parent, Path(report.__file__).parent

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """A prompt from one seed: what the baseline and an arm have drawn, and their scores."""

    prompt: str
    label: str
    before: Embedded | None
    after: Embedded | None
    scores: tuple[float, float]


@dataclass(frozen=True)
class Gallery:
    """The prompts on which an arm differs most from its baseline, by the headline number."""

    arm: str
    better: tuple[Shown, ...]
    worse: tuple[Shown, ...]


@dataclass(frozen=True)
class Section:
    """A benchmark: its numbers, its headline by categories, pictures, and plots as a title and a data: URI."""

    name: str
    note: str
    prompts: int
    baseline: str
    headline: str
    numbers: tuple[Bars, ...]
    categories: Mapping[str, tuple[Bars, ...]]
    galleries: tuple[Gallery, ...]
    plots: tuple[tuple[str, str], ...]


def render(results: Record, folder: Path) -> str:
    """The page as HTML.

    Args:
        results: what results.json holds. folder: that its paths are relative to.
    """
    environment = Environment(
        loader=FileSystemLoader([HERE, SHARED]),
        autoescape=True,  # prompts and names are the user's text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {"number": formats.number, "signed": formats.signed, "count": formats.count}
    environment.filters.update(filters)
    shades = {arm["name"]: i % SHADES for i, arm in enumerate(results["arms"])}
    galleries = sum(len(number["row"]["leads"]) for one in results["benchmarks"] for number in one["numbers"][:1])
    each = min(EACH, max(1, MOST // (4 * max(galleries, 1))))  # two pictures of a prompt, above and below
    return environment.get_template("sweep.html.j2").render(
        arms=[(arm, shades[arm["name"]], _settings(arm)) for arm in results["arms"]],
        differing=unlike([_identity(arm) for arm in results["arms"]]),
        sections=[_section(one, shades, results["arms"], folder, each) for one in results["benchmarks"]],
        seeds=results["seeds"],
        comparisons=results["comparisons"],
        fine=results["category_comparisons"],
        notes=results["notes"],
        style=Markup((SHARED / "page.css").read_text("utf-8") + (HERE / "sweep.css").read_text("utf-8")),
    )


def _identity(arm: Record) -> Record:
    return {name: arm[name] for name in ("model", "lora", "method")} | arm["settings"]


def _settings(arm: Record) -> str:
    return ", ".join(f"{name} {value}" for name, value in arm["settings"].items())


def _section(one: Record, shades: Mapping[str, int], arms: Sequence[Record], folder: Path, each: int) -> Section:
    numbers = [
        _bars(number["name"], number["row"], shades, _scale([number["row"]]), number["sort"])
        for number in one["numbers"]
    ]
    first = one["numbers"][0] if one["numbers"] else None
    told = first["categories"] if first else {}
    categories = {
        name: tuple(_bars(label, row, shades, _scale(rows.values())) for label, row in rows.items())
        for name, rows in told.items()
    }
    shown = {name: tuple(row for row in rows if row.count) for name, rows in categories.items()}
    galleries = [] if first is None else [_gallery(one, first, arm, folder, each) for arm in first["row"]["leads"]]
    return Section(
        name=one["name"],
        note=one["note"],
        prompts=len(one["prompts"]),
        baseline=one["baseline"],
        headline=first["name"] if first else "",
        numbers=tuple(numbers),
        categories={name: rows for name, rows in shown.items() if rows},
        galleries=tuple(gallery for gallery in galleries if gallery.better or gallery.worse),
        plots=_plots(one, arms),
    )


def _plots(one: Record, arms: Sequence[Record]) -> tuple[tuple[str, str], ...]:
    """The headline over compute, and scores against each other, where there are two arms or more to tell apart."""
    scores = {number["name"]: number["row"]["arms"] for number in one["numbers"] if number["sort"] == "score"}
    costs = {arm["name"]: _finite(arm["compute"]["cost"]) for arm in arms}
    if len(costs) < 2 or not scores:
        return ()
    headline = next(iter(scores))
    spent = [costs[arm] for arm in scores[headline] if costs[arm] > 0]
    dear = [("forwards a picture", headline)] if spent and max(spent) > SAME * min(spent) else []
    pairs = [*dear, *[*combinations(scores, 2)][:PLOTS]]
    columns = {"forwards a picture": costs}
    columns |= {name: {arm: _finite(told["value"]) for arm, told in row.items()} for name, row in scores.items()}
    return tuple(plot for x, y in pairs if (plot := _plot(x, y, columns[x], columns[y], dear=x not in scores)))


def _plot(
    x_name: str, y_name: str, across: Mapping[str, float], up: Mapping[str, float], *, dear: bool
) -> tuple[str, str] | None:
    """A plot's title and URI; None where no arm has both. dear: less of x is better."""
    arms = [arm for arm in up if math.isfinite(up[arm]) and math.isfinite(across.get(arm, math.nan))]
    if not arms:
        return None
    best = non_dominated([(-across[arm] if dear else across[arm], up[arm]) for arm in arms])
    dots = [Point(across[arm], up[arm], arm, ok) for arm, ok in zip(arms, best, strict=True)]
    title = f"{y_name} {'over compute' if dear else f'against {x_name}'}"
    xs = [dot.x for dot in dots]
    wide = dear and min(xs) > 0 and max(xs) >= WIDE * min(xs)
    return title, picture_of(Scatter(dots, x_name, y_name, title, log_x=wide))


def _scale(rows: Iterable[Record]) -> tuple[float, float]:
    return span(_finite(arm[k]) for row in rows for arm in row["arms"].values() for k in ("value", "low", "high"))


def _bars(title: str, row: Record, shades: Mapping[str, int], scale: tuple[float, float], sort: str = "score") -> Bars:
    known = {arm: {k: _finite(v) for k, v in told.items()} for arm, told in row["arms"].items()}
    found = []
    for arm, told in known.items():
        lead = row["leads"].get(arm)
        change = formats.signed(_finite(lead["change"]["value"])) if lead and sort != "judge" else ""
        real, place = bool(lead and lead["real"]), placed(told["value"], scale)
        found.append(Bar(arm, shades[arm], told["value"], told["low"], told["high"], change, real, *place))
    suffix = {"judge": " (wins against the baseline)", "distance": " (lower is nearer)"}.get(sort, "")
    return Bars(title + suffix, max((int(told["count"]) for told in row["arms"].values()), default=0), tuple(found))


def _finite(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _gallery(one: Record, number: Record, arm: str, folder: Path, each: int) -> Gallery:
    """The pairs of a prompt and a seed with the largest differences, one for each prompt, `each` in both directions."""
    grids = number["grids"]
    if number["sort"] != "score":
        return Gallery(arm, (), ())
    ours, theirs = (np.array(grids[name], dtype=float) for name in (arm, one["baseline"]))
    change = np.nan_to_num(ours - theirs)
    best, worst = change.argmax(1), change.argmin(1)
    rows = range(len(change))
    up = sorted((i for i in rows if change[i, best[i]] > 0), key=lambda i: -change[i, best[i]])[:each]
    down = sorted((i for i in rows if change[i, worst[i]] < 0), key=lambda i: change[i, worst[i]])[:each]
    shown = [[(i, int(at[i])) for i in chosen] for chosen, at in ((up, best), (down, worst))]
    made = [tuple(_shown(one, arm, i, s, (theirs[i, s], ours[i, s]), folder) for i, s in part) for part in shown]
    return Gallery(arm, made[0], made[1])


def _shown(one: Record, arm: str, prompt: int, seed: int, scores: tuple[float, float], folder: Path) -> Shown:
    pictures = [_picture(one["media"][name][prompt][seed], folder) for name in (one["baseline"], arm)]
    label = ", ".join(labels[prompt] for labels in one["labels"].values() if labels[prompt])
    told = (float(scores[0]), float(scores[1]))
    return Shown(one["prompts"][prompt], label, pictures[0], pictures[1], told)


def _picture(path: str | None, folder: Path) -> Embedded | None:
    """A picture, or a video that plays; None where it was not drawn."""
    if path is None:
        return None
    file = folder / path
    if file.suffix != ".zip" and file.suffix != ".mp4":
        return embed(file.read_bytes(), WIDEST, LARGEST)
    still = embed(_first_frame(file.with_suffix(".zip")), WIDEST, LARGEST)
    film = file.read_bytes() if file.suffix == ".mp4" else b""
    if not film or len(film) > LARGEST_FILM:
        return still
    return replace(still, film=f"data:video/mp4;base64,{base64.b64encode(film).decode()}")


def _first_frame(file: Path) -> bytes:
    from zipfile import ZipFile

    with ZipFile(io.BytesIO(file.read_bytes())) as frames:
        return frames.read(sorted(frames.namelist())[0])

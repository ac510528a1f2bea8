"""Puts the page together: every number is made here or deeper, the templates only place and escape."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flowalign.report import charts, formats
from flowalign.report.comparing import (
    Comparison,
    Difference,
    by_clause,
    by_kind,
    by_novelty,
    by_part,
    compare,
    select,
)
from flowalign.report.concerns import concerns
from flowalign.report.costs import beside, phases, work
from flowalign.report.curves import curves, histogram_rows
from flowalign.report.headline import headline
from flowalign.report.images import Pair, pairs, sheets
from flowalign.report.reading import RunRecord
from flowalign.report.watch import watched

EACH = 6  # prompts of each sort, two pictures each: 48 pictures in all
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Group:
    """Prompts of one sort with their pictures; `empty` is said where there are none."""

    title: str
    empty: str
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Table:
    """Differences by name; with bars where all of them are shares of 1, and so have a common scale."""

    title: str
    rows: Mapping[str, Difference]
    bars: bool


def render(run: RunRecord) -> str:
    """The whole page as HTML."""
    comparison, watch = compare(run), watched(run)
    script = Markup((HERE / "page.js").read_text(encoding="utf-8"))
    template = _environment().get_template("page.html.j2")
    return template.render(
        run=run,
        headline=headline(run, comparison),
        concerns=(*(watch.told if watch is not None else ()), *concerns(run, comparison)),
        comparison=comparison,
        groups=_groups(run, comparison),
        sheets=sheets(run),
        curves=curves(run),
        watch=watch,
        tables=_tables(comparison),
        histograms=histogram_rows(run),
        phases=phases(run),
        beside=beside(run),
        work=work(run),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,  # prompts and configs are the user's text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "number": formats.number,
        "signed": formats.signed,
        "count": formats.count,
        "percent": formats.percent,
        "duration": formats.duration,
    }
    environment.filters.update(filters)
    environment.globals.update({"frame": charts, "isfinite": math.isfinite})
    return environment


def _groups(run: RunRecord, comparison: Comparison | None) -> tuple[Group, ...]:
    if comparison is None:
        return ()
    chosen = select(comparison, EACH)
    sorts = (
        ("Most improved", "No prompt has a higher score than before.", chosen.up),
        ("Most worsened", "No prompt has a lower score than before.", chosen.down),
        ("Best now", "No prompt has a score.", chosen.best),
        ("Worst now", "No prompt has a score.", chosen.worst),
    )
    return tuple(Group(title, empty, pairs(run, comparison, prompts)) for title, empty, prompts in sorts)


def _tables(comparison: Comparison | None) -> tuple[Table, ...]:
    if comparison is None:
        return ()
    named = (
        ("Clauses that hold", by_clause(comparison)),
        (f"{comparison.metric} by kind of prompt", by_kind(comparison)),
        (f"{comparison.metric} by composition", by_novelty(comparison)),
        ("Parts of the score", by_part(comparison)),
    )
    return tuple(Table(title, rows, _are_shares(rows)) for title, rows in named if rows)


def _are_shares(rows: Mapping[str, Difference]) -> bool:
    values = [value for row in rows.values() for value in (row.before, row.after)]
    return min(values) >= 0 and max(values) <= 1

"""Runs beside each other, for a terminal."""

from __future__ import annotations

import math

from flowalign.comparison.runs import FLATTERED, Compared, Gathered
from flowalign.evaluation.table import grid
from flowalign.report.comparing import Difference
from flowalign.report.formats import count, duration, number, signed


def markdown(made: Gathered) -> str:
    """A row for each run, then its seeds together, then what to know."""
    first = made.runs[0].name
    header = ["run", f"{made.metric} before", "after", "change", f"over {first}", "rows", "time"]
    lines = [_line(one) for one in made.runs]
    if len(made.runs) == 1:
        header, lines = header[:4] + header[5:], [line[:4] + line[5:] for line in lines]
    blocks = [grid(header, lines)]
    if made.seeds:
        told = [[", ".join(one.names), *(signed(v) for v in (one.mean, one.least, one.most))] for one in made.seeds]
        blocks.append(grid(["seeds of one config", "mean change", "least", "most"], told))
    notes = ["in brackets: 95 %, paired over prompts. rows: of the network, one with gradient counted as three"]
    return "\n\n".join([*blocks, "\n".join(f"- {note}" for note in [*notes, FLATTERED, *made.notes])]) + "\n"


def _line(one: Compared) -> list[str]:
    ends = (one.change.before, one.change.after) if one.change is not None else (math.nan, math.nan)
    told = [number(value) for value in ends]
    return [
        one.name, *told, interval(one.change), interval(one.lead), count(one.compute), duration(one.run.seconds),
    ]  # fmt: skip


def interval(one: Difference | None) -> str:
    """A change with its interval; nothing where it is not known."""
    return "" if one is None else f"{signed(one.change)} [{signed(one.low)}, {signed(one.high)}]"

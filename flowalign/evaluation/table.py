"""A sweep's tables, for people: Markdown that also reads on a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flowalign.evaluation.results import Board, Lead, Number, Results, Row
from flowalign.evaluation.running import Done
from flowalign.evaluation.statistics import RESAMPLES, Estimate
from flowalign.evaluation.sweep import Plan
from flowalign.evaluation.written import plain
from flowalign.report.formats import number, signed

MARK = "*"
LONG = 24  # categories of a breakdown that a table shows; results.json has all


def markdown(plan: Plan, done: Done, made: Results) -> str:
    """All tables, then what they mean."""
    blocks = [block for board in made.boards for block in _board(plan, board, made)]
    return "\n\n".join([*blocks, _compute(plan, done, made), "\n".join(_notes(plan, done, made))]) + "\n"


def _board(plan: Plan, board: Board, made: Results) -> list[str]:
    count, seeds = len(plan.sets[board.name].prompts), len(plan.sweep.seeds)
    against = f", against {board.baseline}" if len(board.arms) > 1 else ""
    title = f"## {board.name}: {_many(count, 'prompt')}, {_many(seeds, 'seed')}{against}"
    found = [title, _headline(board, made)]
    first = board.numbers[0] if board.numbers else None
    for name, rows in (first.categories if first else {}).items():
        found += [f"### {first.name if first else ''} by {name}", _categories(board, rows)]
    return found


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _headline(board: Board, made: Results) -> str:
    header, columns = ["arm"], [list(board.arms)]
    for one in board.numbers:
        header.append(_title(one))
        columns.append([_value(one.row.arms.get(arm)) for arm in board.arms])
        if one.row.leads and one.sort != "judge":
            header.append("change")
            columns.append([_change(one.row.leads.get(arm)) for arm in board.arms])
        if one.sort == "score" and len(board.arms) > 1:
            header.append("wins")
            columns.append([_wins(one.row.leads.get(arm)) for arm in board.arms])
    header.append("compute")
    columns.append([number(made.compute[arm].cost) for arm in board.arms])
    return grid(header, [list(row) for row in zip(*columns, strict=True)])


def _title(one: Number) -> str:
    if one.sort == "judge":
        return f"{one.name} (wins)"
    return one.name if one.sort != "distance" else f"{one.name} (lower is nearer)"


def _categories(board: Board, rows: Mapping[str, Row]) -> str:
    told = [(label, row) for label, row in rows.items() if any(one.count for one in row.arms.values())]
    shown = told[:LONG]
    header = ["", "prompts", *board.arms]
    lines = []
    for label, row in shown:
        cells = [_category(row, arm) for arm in board.arms]
        count = max((row.arms[arm].count for arm in row.arms), default=0)
        lines.append([label, str(count), *cells])
    left = len(told) - len(shown)
    more = f"\n\n{left} more categories are in results.json." if left > 0 else ""
    return grid(header, lines) + more


def _category(row: Row, arm: str) -> str:
    value = number(row.arms[arm].value) if arm in row.arms else ""
    lead = row.leads.get(arm)
    return value if lead is None else f"{value} ({signed(lead.change.value)}{MARK if lead.real else ''})"


def _value(one: Estimate | None) -> str:
    if one is None:
        return ""
    return number(one.value) + _interval(one, number)


def _interval(one: Estimate, told: Any) -> str:
    return f" [{told(one.low)}, {told(one.high)}]" if math.isfinite(one.low) else ""


def _change(lead: Lead | None) -> str:
    if lead is None:
        return ""
    return signed(lead.change.value) + (MARK if lead.real else "") + _interval(lead.change, signed)


def _wins(lead: Lead | None) -> str:
    if lead is None or lead.wins is None or not math.isfinite(lead.wins.value):
        return ""
    return f"{100 * lead.wins.value:.0f} %"


def _compute(plan: Plan, done: Done, made: Results) -> str:
    header = ["compute of one picture", "network rows", "with gradient", "decodes", "rewards", "cost", "settings"]
    lines = []
    for arm in plan.arms:
        told = made.compute[arm.name]
        each = max(told.pictures, 1)
        decodes, rewards = (rows.forward + rows.gradient for rows in (told.spent.decodes, told.spent.rewards))
        counts = (told.spent.network.forward, told.spent.network.gradient, decodes, rewards)
        settings = ", ".join(f"{k} {_plain(v)}" for k, v in done.drawing.methods[arm.name].told().items())
        lines.append([arm.name, *(f"{count / each:.4g}" for count in counts), f"{told.cost:.4g}", settings])
    return grid(header, lines)


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _notes(plan: Plan, done: Done, made: Results) -> list[str]:
    notes = [
        f"In brackets: 95 % intervals, by a bootstrap of {RESAMPLES:,} resamples over prompts, each with its seeds, "
        "paired: arms have the same noise for the same prompt and seed. wins: of pairs, ties half.",
        "compute: of one picture, in forwards of one row of its own network; a forward with its backward counts 3, "
        "decodes and a search's rewards by their measured time."
        + (" Every arm has the same budget." if plan.sweep.at_equal_compute else ""),
    ]
    if made.comparisons:
        told = f"at 5 % over the {made.comparisons} changes of the tables of arms together (Bonferroni)"
        fine = f", in tables of categories over their {made.fine}" if made.fine else ""
        notes.insert(1, f"{MARK} a difference that is real: {told}{fine}. Brackets are each at 95 %, not together.")
    for name, benchmark in plan.sweep.benchmarks.items():
        notes += [benchmark.note] if benchmark.note else []
        if benchmark.samples > len(plan.sweep.seeds):
            drawn = _many(len(plan.sweep.seeds), "sample")
            notes.append(f"{name}: {drawn} a prompt, where the published protocol draws {benchmark.samples}")
    notes += [_invalid(board, one) for board in made.boards for one in board.numbers if any(one.invalid.values())]
    return [f"- {note}" for note in dict.fromkeys([*notes, *done.notes])]


def _invalid(board: Board, one: Number) -> str:
    told = ", ".join(f"{count} of {arm}" for arm, count in one.invalid.items() if count)
    return f"{board.name}, {one.name}: without a score, and left out: {told}"


def grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns stand one below the other."""
    safe = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in (header, *lines)]
    widths = [max(len(row[i]) for row in safe) for i in range(len(header))]
    made = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in safe
    ]
    return "\n".join([made[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *made[1:]])


def rows(made: Results) -> list[dict[str, Any]]:
    """table.json: a record for each arm and number."""
    found = []
    for board in made.boards:
        for one in board.numbers:
            for arm in board.arms:
                if arm not in one.row.arms:
                    continue
                value, lead = one.row.arms[arm], one.row.leads.get(arm)
                record: dict[str, Any] = {"benchmark": board.name, "arm": arm, "number": one.name, "sort": one.sort}
                record |= {"value": value.value, "low": value.low, "high": value.high, "prompts": value.count}
                found.append(record | {"cost": made.compute[arm].cost, **_lead(board, lead)})
    return [plain(row) for row in found]


def _lead(board: Board, lead: Lead | None) -> dict[str, Any]:
    if lead is None:
        return {}
    told = {"baseline": board.baseline, "change": lead.change.value}
    told |= {"change_low": lead.change.low, "change_high": lead.change.high, "real": lead.real}
    if lead.wins is None:
        return told
    return told | {"wins": lead.wins.value, "wins_low": lead.wins.low, "wins_high": lead.wins.high}

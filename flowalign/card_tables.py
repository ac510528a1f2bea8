"""The tables of a card: scores before and after, and what the run has cost."""

from __future__ import annotations

from dataclasses import dataclass

from flowalign.report.comparing import Comparison, Difference, by_part
from flowalign.report.costs import work
from flowalign.report.formats import count, duration, number, signed
from flowalign.report.reading import RunRecord


def cell(value: object) -> str:
    """Text as it may stand in a cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


@dataclass(frozen=True)
class Number:
    """A row of the table."""

    name: str
    before: str
    after: str
    change: str
    interval: str
    count: str


@dataclass(frozen=True)
class Numbers:
    """The table, what is said before it and after it, and the names of its columns."""

    said: str
    before: str
    after: str
    rows: tuple[Number, ...]
    seeds: str


def numbers(run: RunRecord, comparison: Comparison) -> Numbers:
    """Scores before and after of all parts, the deciding one first, each with its paired interval."""
    parts = by_part(comparison)
    ordered = sorted(parts, key=lambda name: (name != comparison.metric, name == "total"))
    prompts, seed = len(comparison.prompts), run.setting("seed")
    said = (
        f"Mean scores of {count(prompts)} held-out prompts, each drawn once, from the same start noise before and "
        "after training. Higher is better."
    )
    seeds = (
        f"One run{'' if seed is None else f', seed {seed}'}: the intervals are Student's over the prompts, and say "
        "nothing of what another seed would have come to."
    )
    before = "base model" if comparison.before_epoch == 0 else f"epoch {comparison.before_epoch}"
    rows = tuple(_row(name, parts[name], name == comparison.metric) for name in ordered)
    return Numbers(said, before, f"epoch {comparison.after_epoch}", rows, seeds)


def _row(name: str, change: Difference, main: bool) -> Number:
    shown = f"**{cell(name)}**" if main else cell(name)
    interval = f"{signed(change.low)} to {signed(change.high)}"
    return Number(
        shown, number(change.before), number(change.after), signed(change.change), interval, count(change.count)
    )


def costs(run: RunRecord) -> list[tuple[str, str]]:
    """What the run has spent: epochs, time, devices, calls of the network."""
    held = run.environment
    devices = held.get("devices")
    kinds = ", ".join(sorted({str(one) for one in devices})) if isinstance(devices, list) else ""
    found = [("epochs", count(run.done)), ("wall time", duration(run.seconds))]
    if isinstance(held.get("processes"), int):
        found.append(("processes", f"{held['processes']}{f' on {cell(kinds)}' if kinds else ''}"))
    found += [(f"rows of the network, {one.name}", count(one.measured)) for one in work(run)]
    versions = [f"{name} {held[name]}" for name in ("python", "torch", "diffusers", "peft") if name in held]
    return found + ([("versions", cell(", ".join(versions)))] if versions else [])

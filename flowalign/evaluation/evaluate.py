"""A sweep from its plan to its tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.config import dump_yaml
from flowalign.distributed import on_main
from flowalign.evaluation.page import render
from flowalign.evaluation.results import Results, results
from flowalign.evaluation.running import Done, Running
from flowalign.evaluation.sweep import Plan
from flowalign.evaluation.table import markdown, rows
from flowalign.evaluation.written import whole
from flowalign.tracking import write_atomically


@dataclass(frozen=True)
class Evaluated:
    """What a sweep has come to: its folder, tables as Markdown, and numbers."""

    folder: Path
    table: str
    results: Results


def evaluate(plan: Plan, config: Mapping[str, Any] | None = None) -> Evaluated | None:
    """Draw and read what is not there yet, then write tables and results; None on all processes but the first.

    Several processes, started as for training, share the work, and come to the same tables as one.

    Args:
        config: the resolved sweep, plain data, for the folder.

    Raises: Stopped where a signal asked for it, what is done being kept; ValueError for what is wrong with a reward, a
        model or the folder.
    """
    running = Running(plan)
    done = running.run()
    found: list[Evaluated] = []
    on_main(lambda: found.append(_written(plan, done, running, config)))
    return found[0] if found else None


def _written(plan: Plan, done: Done, running: Running, config: Mapping[str, Any] | None) -> Evaluated:
    made = results(plan, done, running.store)
    table = markdown(plan, done, made)
    folder = plan.folder
    if config is not None:
        write_atomically(folder / "sweep.yaml", dump_yaml(config).encode())
    told = whole(plan, done, made, running.store)
    write_atomically(folder / "results.json", json.dumps(told, allow_nan=False).encode())
    write_atomically(folder / "table.json", json.dumps(rows(made), indent=1, allow_nan=False).encode())
    write_atomically(folder / "table.md", table.encode())
    write_atomically(folder / "report.html", render(told, folder).encode())
    return Evaluated(folder, table, made)

"""results.json: all of a sweep as plain data, complete enough for a page, or for tables of your own."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from flowalign.evaluation.cells import Store
from flowalign.evaluation.results import Board, Results
from flowalign.evaluation.running import Done
from flowalign.evaluation.sweep import Plan


def plain(value: Any) -> Any:
    """Dataclasses, arrays and numbers as JSON has them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | str) else plain(asdict(value))


def whole(plan: Plan, done: Done, made: Results, store: Store) -> dict[str, Any]:
    """results.json: all that a page needs."""
    return {
        "format": 1,
        "seeds": list(plan.sweep.seeds),
        "arms": [_arm(plan, done, made, arm.name) for arm in plan.arms],
        "comparisons": made.comparisons,
        "category_comparisons": made.fine,
        "benchmarks": [_benchmark(plan, done, board, store) for board in made.boards],
        "notes": list(done.notes),
    }


def _arm(plan: Plan, done: Done, made: Results, name: str) -> dict[str, Any]:
    arm = next(one for one in plan.arms if one.name == name)
    settings = {"model": arm.model_name, "lora": arm.lora, "method": arm.method_name}
    return {
        "name": name,
        **settings,
        "settings": done.drawing.methods[name].told(),
        "compute": plain(made.compute[name]),
    }


def _benchmark(plan: Plan, done: Done, board: Board, store: Store) -> dict[str, Any]:
    told, benchmark = plan.sets[board.name], plan.sweep.benchmarks[board.name]
    shown: dict[str, list[list[str | None]]] = {
        arm: [[None] * len(plan.sweep.seeds) for _ in told.prompts.text] for arm in board.arms
    }
    for unit in (unit for unit in done.units if unit.benchmark == board.name):
        for i, row in enumerate(unit.rows):
            if done.kept[unit.key].digests[i]:
                path = os.path.relpath(store.shown(unit.key, i), plan.folder)
                shown[unit.arm][row][plan.sweep.seeds.index(unit.seed)] = path
    return {
        "name": board.name,
        "kind": benchmark.kind,
        "note": benchmark.note,
        "baseline": board.baseline,
        "prompts": list(told.prompts.text),
        "labels": {name: list(own) for name, own in told.labels.items()},
        "numbers": [plain(number) for number in board.numbers],
        "media": shown,
    }

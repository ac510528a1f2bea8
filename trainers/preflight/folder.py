"""Whether the run folder can be made, and what is there already. Nothing is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowalign import checkpoint
from flowalign.config import load_yaml
from flowalign.tracking import check_folder
from trainers.alarms import GO_ON, over
from trainers.facts import changed, facts, refusal
from trainers.preflight.problems import Problem, error, warning

if TYPE_CHECKING:
    from trainers.base import Trainer


def of_folder(trainer: Trainer, config: Mapping[str, Any] | None, allow_change: Sequence[str]) -> list[Problem]:
    """What is in the way of the run's folder, or there already."""
    folder = trainer.folder
    try:
        check_folder(folder)
        if not (folder / "metrics.jsonl").exists():
            return []
        path, broken = checkpoint.newest(folder / "checkpoints")
    except (ValueError, OSError) as problem:
        return [error(str(problem))]
    if path is None and broken:
        return [error(f"none of the checkpoints in {folder} can be read ({'; '.join(broken)}); move the folder away")]
    skipped = [warning(f"skipped {one}") for one in broken]
    record = json.loads((path / "state.json").read_bytes()) if path is not None else {}
    known = record.get("facts", {})
    if path is None and (folder / "config.yaml").is_file():
        known = {"config": load_yaml(folder / "config.yaml")}
    refused = refusal(folder, changed(known, facts(trainer, config)), allow_change)
    if refused is not None:
        return [*skipped, error(refused)]
    return [*skipped, _going_on(trainer, record.get("epoch", 0), record.get("history", []))]


def _going_on(trainer: Trainer, done: int, history: Sequence[Mapping[str, float]]) -> Problem:
    if over(trainer.evaluation.watch, history):
        return warning(
            f"{trainer.folder} holds a run that its watch has ended at epoch {done}: train would do nothing more; "
            f"{GO_ON}"
        )
    if done >= trainer.epochs:
        return warning(
            f"{trainer.folder} holds a run that has finished its {trainer.epochs} epochs: train would do nothing more"
        )
    return warning(
        f"{trainer.folder} holds a run of this config: train goes on with it from epoch {done} of {trainer.epochs}. "
        "Name another folder to start anew"
    )

"""Whether the run folder can be made, and what is there already. Nothing is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowalign import checkpoint
from flowalign.config import load_yaml
from flowalign.tracking import check_folder
from trainers.keeper import FREE
from trainers.preflight.problems import Problem, error, warning


def of_folder(folder: Path, epochs: int, config: Mapping[str, Any] | None) -> list[Problem]:
    """What is in the way of the run's folder, or there already."""
    try:
        check_folder(folder)
    except (ValueError, OSError) as problem:
        return [error(str(problem))]
    if not (folder / "metrics.jsonl").exists():
        return []
    return [_run_there(folder, epochs, config)]


def _run_there(folder: Path, epochs: int, config: Mapping[str, Any] | None) -> Problem:
    path, _ = checkpoint.newest(folder / "checkpoints")
    record = json.loads((path / "state.json").read_bytes()) if path is not None else {}
    known = record.get("facts", {}).get("config")
    if known is None and (folder / "config.yaml").is_file():
        known = load_yaml(folder / "config.yaml")
    changed = _changed(known, config)
    if changed:
        return error(
            f"{folder} holds a run with another {', '.join(changed)}. Name another folder, or go on all the same "
            f"with --allow-change {changed[0]}"
        )
    done = record.get("epoch", 0)
    if done >= epochs:
        return warning(f"{folder} holds a run that has finished its {epochs} epochs: train would do nothing more")
    return warning(
        f"{folder} holds a run of this config: train goes on with it from epoch {done} of {epochs}. "
        "Name another folder to start anew"
    )


def _changed(known: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> list[str]:
    if known is None or config is None:
        return []
    names = checkpoint.told_apart(known, json.loads(json.dumps(config)))
    return [name for name in names if not any(name == one or name.startswith(f"{one}.") for one in FREE)]

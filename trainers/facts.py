"""What a run is made of, and what of it may be another when the run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowalign import checkpoint

if TYPE_CHECKING:
    from trainers.base import Trainer

# What may change unasked: no number of a run depends on it
FREE = (
    "folder", "epochs", "log_with", "checkpoints", "evaluation.pictures", "model.embeddings", "pairs.embeddings",
    "sampling.overlap", "model.memory.shard", "model.memory.context_parallel", "evaluation.watch.on_alarm",
)  # fmt: skip
# Never in one run: what is numbered by optimizer steps, drawn from the seed, or compared over the run
FIXED = ("trainer", "seed", "updates_per_epoch", "evaluation.prompts", "held_out")


def facts(trainer: Trainer, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of a trainer, as they are kept with a checkpoint; plain data."""
    held: dict[str, Any] = {
        "seed": trainer.seed,
        "updates_per_epoch": trainer.updates_per_epoch,
        "prompts": trainer.prompts.fingerprint(),
        "held_out": trainer.held_out(),
        "sampling": repr(trainer.sampling),
        "optimizer": repr(trainer.optimizer.settings),
    }
    plain: dict[str, Any] = json.loads(json.dumps(held | ({"config": dict(config)} if config is not None else {})))
    return plain


def changed(known: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """The keys in which a run's facts and a trainer's differ, but for those that are free to.

    Where both have a config, its keys tell more than what was made of it. What only one of them has is not compared.
    """
    names: list[str] = []
    if "config" in known and "config" in present:
        names = list(checkpoint.told_apart(known["config"], present["config"]))
    for name in ("seed", "updates_per_epoch", "prompts", "held_out", "sampling", "optimizer"):
        told = any(one == name or one.startswith(f"{name}.") for one in names)
        covered = name in ("sampling", "optimizer") and "config" in known and "config" in present
        if name in known and name in present and known[name] != present[name] and not told and not covered:
            names.append(name)
    return [name for name in names if not under(name, FREE)]


def under(name: str, keys: Sequence[str]) -> bool:
    """Whether a dotted key is one of these, or inside one."""
    return any(name == key or name.startswith(f"{key}.") for key in keys)


def refusal(folder: object, names: Sequence[str], allowed: Sequence[str]) -> str | None:
    """Why a run with these changes cannot be gone on with, or None."""
    fixed = [name for name in names if under(name, FIXED)]
    if fixed:
        return f"{folder} holds a run with another {', '.join(fixed)}, which no run can change; name another --folder"
    asked = [name for name in names if not under(name, allowed)]
    if not asked:
        return None
    return (
        f"{folder} holds a run with another {', '.join(asked)}; name another --folder, or go on all the same with "
        + " ".join(f"--allow-change {name}" for name in asked)
    )

"""A small run with everything in it that a checkpoint has to keep, and what a run leaves, made comparable."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flowalign import checkpoint
from flowalign.models.sd3 import SD3
from flowalign.records import Media, Prompts
from flowalign.schedules import AllSteps, LastSteps, LateStep
from flowalign.transitions import FlowSDE
from rewards import RunningNormalise
from rewards.base import FunctionReward, as_reward
from tests.tiny import tiny_sd3
from trainers import Checkpoints, DRaFT, Evaluation, FlowGRPO, Optimizer, ReFL, Sampling
from trainers.base import Trainer

PROMPTS = ["a red circle", "a blue square", "two stars"]  # fewer than three epochs take, so that the order wraps


def redness(media: Media, prompts: Prompts) -> Tensor:
    """One channel of a patch, another for other prompts: smooth, and spread well beyond rounding."""
    wanted = [len(text) % 3 for text in prompts.text]
    return 30 * torch.stack([media.pixels[i, channel, 8:12, 8:12].mean() for i, channel in enumerate(wanted)])


def job(folder: Path, **changes: Any) -> FlowGRPO:
    """Two optimizer steps an epoch, guidance, KL, an average of the weights, evaluation; a second an epoch or less."""
    settings: dict[str, Any] = {
        "model": SD3(tiny_sd3(), max_sequence_length=0),
        "reward": RunningNormalise(as_reward(redness)),
        "prompts": PROMPTS,
        "sampling": Sampling(
            AllSteps(FlowSDE(0.7)), groups=2, group_size=4, batch_size=2, rows_per_call=2, steps=3, guidance_scale=2.0
        ),
        "optimizer": Optimizer(1e-2, ema_decay=0.5, ema_every=1, warmup=3, max_skipped=1),
        "evaluation": Evaluation(["a green cross", "a star", "a circle"], every=1, pictures=2),
        "checkpoints": Checkpoints(every=1, minutes=0),
        "kl_coef": 0.1,
        "clip_range": 1e-3,
        "epochs": 3,
        "seed": 5,
        "folder": str(folder),
    }
    return FlowGRPO(**settings | changes)


def draft_job(folder: Path, **changes: Any) -> DRaFT:
    """The same run by the reward's gradient through the last two of three steps, with a KL; odd micro-batches."""
    sampling = Sampling(
        LastSteps(2), groups=3, group_size=2, batch_size=2, rows_per_call=2, steps=3, guidance_scale=2.0
    )
    return DRaFT(**_settings(folder, sampling) | {"kl_coef": 0.1} | changes)


def refl_job(folder: Path, **changes: Any) -> ReFL:
    """The same run by the hinge of one late step's reward, which is never satisfied."""
    plan = LateStep(1, 2)
    sampling = Sampling(plan, groups=3, group_size=2, batch_size=2, rows_per_call=2, steps=3, guidance_scale=2.0)
    return ReFL(**_settings(folder, sampling) | {"margin": 60.0, "coefficient": 0.1} | changes)


JOBS: dict[str, Callable[..., Trainer]] = {"flow_grpo": job, "draft": draft_job, "refl": refl_job}


def _settings(folder: Path, sampling: Sampling) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model": SD3(tiny_sd3(), max_sequence_length=0),
        "reward": RunningNormalise(FunctionReward(redness, differentiable=True)),
        "prompts": PROMPTS,
        "sampling": sampling,
        "optimizer": Optimizer(1e-2, ema_decay=0.5, ema_every=1, warmup=3, max_skipped=1),
        "evaluation": Evaluation(["a green cross", "a star", "a circle"], every=1, pictures=2),
        "checkpoints": Checkpoints(every=1, minutes=0),
        "updates_per_epoch": 2,
        "epochs": 3,
        "seed": 5,
        "folder": str(folder),
    }
    return settings


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """A log's rows without what the clock says."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds" and not k.startswith("time/")} for row in lines]


def contents(path: Path) -> bytes:
    """A safetensors file without its header, whose two metadata keys come in any order: names and tensors."""
    held = load_file(path)
    return b"".join(name.encode() + held[name].numpy().tobytes() for name in sorted(held))


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of all that a run has come to: its policy, record, logs, scores and pictures."""
    last = checkpoint.names(folder / "checkpoints")[-1]
    found = {"lora": contents(folder / "lora" / "pytorch_lora_weights.safetensors")}
    found["state"] = (folder / "checkpoints" / last / "state.safetensors").read_bytes()
    record = json.loads((folder / "checkpoints" / last / "state.json").read_text())
    timeless = {name: value for name, value in record.items() if name not in ("clock", "seconds", "logs")}
    found["record"] = json.dumps(timeless).encode()
    for name in ("metrics.jsonl", "histograms.jsonl"):
        found[name] = json.dumps(rows(folder, name)).encode()
    for path in sorted([*(folder / "evaluations").iterdir(), *(folder / "samples").iterdir(), folder / "best.json"]):
        found[path.name] = path.read_bytes()
    return {name: sha256(content).hexdigest() for name, content in found.items()}

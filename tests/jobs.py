"""A small run with everything in it that a checkpoint has to keep, and what a run leaves, made comparable."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from flowalign import checkpoint
from flowalign.models.sd3 import SD3
from flowalign.randomness import key_generator
from flowalign.records import Media, Prompts
from flowalign.schedules import AllSteps, LastSteps, LateStep, linear
from flowalign.transitions import FlowSDE
from rewards import RunningNormalise
from rewards.base import FunctionReward, as_reward
from tests.tiny import tiny_sd3
from trainers import (
    IPRO,
    RAFT,
    Calibration,
    Checkpoints,
    DenseGRPO,
    DRaFT,
    Evaluation,
    FlowDPO,
    FlowGRPO,
    FlowRWR,
    InstructVideo,
    LogitNormalTimes,
    Optimizer,
    Pairs,
    ReFL,
    Sampling,
)
from trainers.base import Trainer

PROMPTS = ["a red circle", "a blue square", "two stars"]  # fewer than three epochs take, so that the order wraps

HELD = TemporaryDirectory(prefix="flowalign-")  # one place, so that runs of several folders have the same prompts


def pictured() -> Prompts:
    """The prompts, each with a picture of its own."""
    files = [Path(HELD.name) / f"{number}.png" for number in range(len(PROMPTS))]
    for number, file in enumerate(files):
        Image.new("RGB", (40, 32), (80 * number, 200 - 60 * number, 120)).save(file)
    return Prompts(tuple(PROMPTS), tuple({"media": str(file)} for file in files))


PICTURED = pictured()


def preferred() -> Path:
    """Seven pairs of noise, of which the third is a tie and the fifth is not valid; some have scores and weights."""
    rows = []
    for number, label in enumerate(["first", "second", "tie", "first", "invalid", "second", "first"]):
        names = [f"pair-{number}-{side}.png" for side in "ab"]
        for side, name in enumerate(names):
            noise = key_generator(0, "pair", number, side).random((8, 8, 3))
            Image.fromarray((255 * noise).astype("uint8")).resize((40, 32)).save(Path(HELD.name) / name)
        row = {"prompt": PROMPTS[number % 3], "first": names[0], "second": names[1], "label": label}
        rows.append(row | {"scores": [0.1 * number, 0.3], "weight": 2.0 if number == 3 else 1.0})
    path = Path(HELD.name) / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


PREFERRED = preferred()


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


def dense_job(folder: Path, **changes: Any) -> DenseGRPO:
    """The same run by the gains of its steps, after two rounds of calibration; odd micro-batches of completions."""
    sampling = Sampling(
        AllSteps(FlowSDE(0.7)), groups=2, group_size=4, batch_size=2, rows_per_call=2, steps=3, guidance_scale=2.0
    )
    own = {"kl_coef": 0.1, "clip_range": 1e-3, "calibration": Calibration(rounds=2, groups=1, amount=0.05)}
    return DenseGRPO(**_settings(folder, sampling) | own | changes)


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


def instruct_video_job(folder: Path, **changes: Any) -> InstructVideo:
    """The same run from noised pictures: the last two of three steps, of which the last has gradient."""
    sampling = Sampling(
        LastSteps(1), groups=3, group_size=2, batch_size=2, rows_per_call=2, steps=3, guidance_scale=2.0
    )
    model = SD3(tiny_sd3(), max_sequence_length=0, grid=linear)  # sigmas 1, .857, .6, 0
    own = {"model": model, "prompts": PICTURED, "start": 0.9}
    return InstructVideo(**_settings(folder, sampling) | own | changes)


def ipro_job(folder: Path, **changes: Any) -> IPRO:
    """As DRaFT's, but for the weights of reward and KL."""
    sampling = Sampling(
        LastSteps(2), groups=3, group_size=2, batch_size=2, rows_per_call=2, steps=3, guidance_scale=2.0
    )
    return IPRO(**_settings(folder, sampling) | changes)


def dpo_job(folder: Path, **changes: Any) -> FlowDPO:
    """The same run from pairs of its own samples, and a reference that is renewed after the second epoch.

    Groups of three in micro-batches of two: processes have pairs of which they hold one sample.
    """
    sampling = Sampling(
        AllSteps(FlowSDE(0.7)), groups=4, group_size=3, batch_size=2, rows_per_call=2, steps=3, guidance_scale=2.0
    )
    own = {"sampling": sampling, "refresh": 2, "times": LogitNormalTimes(draws=2)}
    return FlowDPO(**_settings(folder, sampling) | own | changes)


def pairs_job(folder: Path, **changes: Any) -> FlowDPO:
    """The same run from stored pairs, judged by others too."""
    sampling = Sampling(groups=5, group_size=2, batch_size=4, rows_per_call=4, steps=3, guidance_scale=2.0)
    settings = _settings(folder, sampling)
    pairs = Pairs(str(PREFERRED), held_out=str(PREFERRED), cache=str(Path(HELD.name) / "latents"))
    evaluation = replace(settings["evaluation"], reward=settings["reward"])
    own = {"pairs": pairs, "prompts": None, "reward": None, "evaluation": evaluation}
    return FlowDPO(**settings | own | changes)


def rwr_job(folder: Path, **changes: Any) -> FlowRWR:
    """The same run by weights of all samples, each taken twice, which a policy draws that is two epochs old at most."""
    sampling = Sampling(groups=3, group_size=3, batch_size=2, rows_per_call=2, steps=3, guidance_scale=2.0)
    return FlowRWR(**_settings(folder, sampling) | {"refresh": 2, "passes": 2} | changes)


def raft_job(folder: Path, **changes: Any) -> RAFT:
    """The same run by the best of each prompt but the worst of these, each taken twice."""
    sampling = Sampling(groups=5, group_size=3, batch_size=2, rows_per_call=2, steps=3, guidance_scale=2.0)
    return RAFT(**_settings(folder, sampling) | {"passes": 2, "top_share": 0.8} | changes)


JOBS: dict[str, Callable[..., Trainer]] = {
    "flow_grpo": job, "dense_grpo": dense_job, "draft": draft_job, "refl": refl_job,
    "instruct_video": instruct_video_job, "ipro": ipro_job, "dpo": dpo_job, "pairs": pairs_job, "rwr": rwr_job,
    "raft": raft_job,
}  # fmt: skip
BY_GRADIENT = ("draft", "refl", "instruct_video", "ipro")
FORWARD = ("dpo", "pairs", "rwr", "raft")


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

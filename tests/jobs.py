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
from flowalign.credit import GDPO
from flowalign.gradient_plans import LastSteps, LateStep
from flowalign.guidance import Guided
from flowalign.models.sd3 import SD3
from flowalign.randomness import key_generator
from flowalign.records import Media, Prompts
from flowalign.schedules import AllSteps, FanOut, linear
from flowalign.transitions import DanceSDE, FlowSDE
from flowalign.trees import Tree
from flowalign.windows import PromptWindow, ShortTail
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
    GridTimes,
    InstructVideo,
    LogitNormalTimes,
    Optimizer,
    Pairs,
    ReFL,
    Sampling,
)
from trainers.awm import AWM, huber, unit_advantages
from trainers.base import Trainer
from trainers.euphonium import Euphonium
from trainers.g2rpo import G2RPO
from trainers.grpo_guard import GRPOGuard
from trainers.nft import DiffusionNFT
from trainers.regularisers import BandCoefficient, Refresh
from trainers.resampling import HasSpread, Resample
from trainers.supervised import Supervised
from trainers.tree_grpo import TreeGRPO

LITTLE = 2.45  # spread of a group's scores, in `credit_job`
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
    """Two optimizer steps an epoch, KL, an average of the weights, evaluation; half a second an epoch or less.

    Without guidance, for half the network's calls, as all jobs whose runs on several processes are no slow tests; but
    for `draft_job` and `tree_job`.
    """
    settings: dict[str, Any] = {
        "model": SD3(tiny_sd3(), max_sequence_length=0),
        "reward": RunningNormalise(as_reward(redness)),
        "prompts": PROMPTS,
        "sampling": Sampling(
            AllSteps(FlowSDE(0.7)), groups=2, group_size=4, batch_size=2, rows_per_call=2, steps=3, guidance_scale=1.0
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
        AllSteps(FlowSDE(0.7)), groups=2, group_size=4, batch_size=2, rows_per_call=2, steps=3, guidance_scale=1.0
    )
    own = {"kl_coef": 0.1, "clip_range": 1e-3, "calibration": Calibration(rounds=2, groups=1, amount=0.05)}
    return DenseGRPO(**_settings(folder, sampling) | own | changes)


def draft_job(folder: Path, **changes: Any) -> DRaFT:
    """The same run by the reward's gradient through the last two of three guided steps, with KL; odd micro-batches."""
    sampling = Sampling(
        LastSteps(2), groups=3, group_size=2, batch_size=2, rows_per_call=2, steps=3, guidance_scale=2.0
    )
    return DRaFT(**_settings(folder, sampling) | {"kl_coef": 0.1} | changes)


def refl_job(folder: Path, **changes: Any) -> ReFL:
    """The same run by the hinge of one late step's reward, which is never satisfied."""
    plan = LateStep(1, 2)
    sampling = Sampling(plan, groups=3, group_size=2, batch_size=2, rows_per_call=2, steps=3, guidance_scale=1.0)
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
    sampling = Sampling(groups=5, group_size=2, batch_size=4, rows_per_call=4, steps=3, guidance_scale=1.0)
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


def third(step: int) -> float:
    """A decay that is there from the start."""
    return 1 / 3


def nft_job(folder: Path, **changes: Any) -> DiffusionNFT:
    """The same run by attraction and repulsion, from samples of an older policy, with a KL; odd micro-batches."""
    sampling = Sampling(groups=3, group_size=3, batch_size=2, rows_per_call=2, steps=3, guidance_scale=1.0)
    own = {"decay": third, "kl_coef": 0.1, "beta": 0.5, "times": GridTimes(2)}
    return DiffusionNFT(**_settings(folder, sampling) | own | changes)


def awm_job(folder: Path, **changes: Any) -> AWM:
    """The same run by weighted matching, whose second step has ratios to the policy that an epoch starts with."""
    sampling = Sampling(groups=3, group_size=3, batch_size=2, rows_per_call=2, steps=3, guidance_scale=2.0)
    own = {"weighting": huber, "older_coef": 0.5, "advantages": unit_advantages, "times": GridTimes(2)}
    return AWM(**_settings(folder, sampling) | own | changes)


def tree_job(folder: Path, **changes: Any) -> TreeGRPO:
    """The same run on binary trees, of which the last micro-batch of an epoch has one and a padded one."""
    sampling = Sampling(
        Tree(FlowSDE(0.7), (0, 1), (2, 2)), groups=3, group_size=4, batch_size=2, rows_per_call=2, steps=3,
        guidance_scale=2.0,
    )  # fmt: skip
    return TreeGRPO(**_settings(folder, sampling) | {"kl_coef": 0.1, "clip_range": 1e-3} | changes)


def euphonium_job(folder: Path, **changes: Any) -> Euphonium:
    """The same run, whose last two steps follow the reward's gradient."""
    sampling = Sampling(
        AllSteps(DanceSDE(0.5)), groups=2, group_size=4, batch_size=2, rows_per_call=2, steps=3, guidance_scale=1.0
    )
    return Euphonium(**_settings(folder, sampling) | {"guided": Guided((1, 2), 0.5), "clip_range": 1e-3} | changes)


def guard_job(folder: Path, **changes: Any) -> GRPOGuard:
    """The same run with two noisy steps of each prompt's own, tails of fewer steps and weights of the steps."""
    plan = ShortTail(PromptWindow(FlowSDE(0.7), 2, 0, 4, shared_noise=True), 2)
    sampling = Sampling(plan, groups=3, group_size=4, batch_size=2, rows_per_call=2, steps=5, guidance_scale=2.0)
    return GRPOGuard(**_settings(folder, sampling) | {"clip_range": 1e-4, "kl_coef": 0.1} | changes)


def g2rpo_job(folder: Path, **changes: Any) -> G2RPO:
    """The same run from two steps of each anchor, of which an epoch's last micro-batch has one and a padded one."""
    sampling = Sampling(
        FanOut(FlowSDE(0.7), (0, 1)), groups=3, group_size=4, batch_size=2, rows_per_call=3, steps=3, guidance_scale=2.0
    )
    return G2RPO(**_settings(folder, sampling) | {"kl_coef": 0.1, "clip_range": 1e-3} | changes)


def evenness(media: Media, prompts: Prompts) -> Tensor:
    """How alike two channels are: another scale than redness."""
    return -(media.pixels[:, 0] - media.pixels[:, 1]).abs().mean((1, 2))


def credit_job(folder: Path, **changes: Any) -> FlowGRPO:
    """The same run by two terms, each normalised; groups of little spread are drawn again, in rounds of three
    micro-batches; the coefficient follows the KL to a reference that is renewed after the second epoch; the best of
    each group is imitated."""
    sampling = Sampling(
        AllSteps(FlowSDE(0.7)), groups=3, group_size=3, batch_size=2, rows_per_call=2, steps=3, guidance_scale=2.0
    )
    settings = _settings(folder, sampling)
    own = {
        "reward": settings["reward"] + 0.5 * FunctionReward(evenness), "advantages": GDPO(), "clip_range": 1e-3,
        "kl_coef": BandCoefficient(0.1, target=1e-3), "refresh": Refresh(2), "supervised": Supervised(0.1),
        "selection": Resample(3, HasSpread(LITTLE)),
    }  # fmt: skip
    return FlowGRPO(**settings | own | changes)


JOBS: dict[str, Callable[..., Trainer]] = {
    "flow_grpo": job, "credit": credit_job, "dense_grpo": dense_job, "draft": draft_job, "refl": refl_job,
    "instruct_video": instruct_video_job, "ipro": ipro_job, "dpo": dpo_job, "pairs": pairs_job, "rwr": rwr_job,
    "raft": raft_job, "tree": tree_job, "euphonium": euphonium_job, "nft": nft_job, "awm": awm_job, "g2rpo": g2rpo_job,
    "guard": guard_job,
}  # fmt: skip
REPLAYED = ("tree", "euphonium")
BY_GRADIENT = ("draft", "refl", "instruct_video", "ipro")
FORWARD = ("dpo", "pairs", "rwr", "raft", "nft")


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

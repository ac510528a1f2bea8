"""Whole runs of two other projects' trainers, recorded on a small SD3: ours must give the same numbers from the same
noise. What is recorded, and how it is stored, stands in golden/README.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny import tiny_sd3
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from flowalign.advantages import flow_grpo_advantages, group_advantages
from flowalign.models.sd3 import SD3
from flowalign.records import Condition, Media, Prompts, Scores, Trajectory, join_steps
from flowalign.rollout import rollout
from flowalign.schedules import AllSteps, linear
from flowalign.transitions import FlowSDE
from trainers import FlowGRPO, Optimizer, Sampling
from trainers.batch import Batch

GOLDEN = np.load(FilePath(__file__).parent / "golden" / "recorded_runs.npz")
SAMPLES, MEMBERS, LEARNING_RATE = 8, 4, 3e-4


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def unpacked(name: str, *shape: int) -> Tensor:
    """Float32 from its four bytes, each stored as a row of its own."""
    return torch.from_numpy(np.ascontiguousarray(GOLDEN[name].T).view("<f4").reshape(shape))


def flow_factory_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Flow-Factory's std of the batch comes from float32 sums, and with these rewards, .54 +- .0025, is .07 % off."""

    def std(rewards: Tensor, group_ids: Tensor) -> Tensor:
        total, squares = rewards.float().sum().double(), rewards.float().square().sum().double()
        return (squares / len(rewards) - (total / len(rewards)) ** 2).sqrt().expand_as(rewards)

    return group_advantages(rewards, group_ids, std)


@dataclass(frozen=True)
class Setting:
    """A recorded run as our options; `groups` is each sample's group, `texts` its prompt's number in the record."""

    name: str
    project: str
    guidance_scale: float
    grid: Callable[[int], list[float]] | None
    last_step: bool
    step_fraction: float
    advantages: Callable[[Tensor, Tensor], Tensor]
    groups: tuple[int, ...]
    policy_dtype: torch.dtype = torch.float32

    def recorded(self, name: str) -> Tensor:
        return golden(f"{self.name}/{name}")


# flow_grpo drew one prompt for both groups, and keys its statistics by the prompt's text. Flow-Factory's policy is
# bfloat16, its gradients and AdamW's state too.
RUNS = [
    Setting("flow_grpo_1", "flow_grpo", 1.0, None, True, 0.99, flow_grpo_advantages, (0,) * 8),
    Setting("flow_grpo_4.5", "flow_grpo", 4.5, None, True, 0.99, flow_grpo_advantages, (0,) * 8),
    Setting(
        "flow_factory_1", "flow_factory", 1.0, linear, False, 1.0, flow_factory_advantages,
        (0,) * 4 + (1,) * 4, torch.bfloat16,
    ),
]  # fmt: skip


class RecordedPrompts(SD3):
    """An SD3 whose prompts are numbers of recorded embeddings: the run's text encoders are left out."""

    recorded: Condition

    def encode(self, prompts: Sequence[str], negatives: Sequence[str | None] | None = None) -> Condition:
        return self.recorded.rows(torch.tensor([int(prompt) for prompt in prompts]))


def recorded_pipeline() -> StableDiffusion3Pipeline:
    """The run's transformer; its other parts are not called."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=128,
        caption_projection_dim=64,
        pooled_projection_dim=96,
        pos_embed_max_size=96,
        qk_norm="rms_norm",
    )
    vector_to_parameters(unpacked("transformer", -1), transformer.parameters())
    pipe = tiny_sd3()
    pipe.register_modules(transformer=transformer)
    return pipe


def recorded_model(run: Setting) -> RecordedPrompts:
    model = RecordedPrompts(recorded_pipeline(), height=64, width=64, grid=run.grid)
    prompts = max(run.groups) + 1
    embeds = [unpacked(f"{run.project}/prompt", prompts, -1, 128), unpacked(f"{run.project}/pooled", prompts, 96)]
    if run.guidance_scale != 1:
        embeds += [unpacked(f"{run.project}/negative", 1, -1, 128), unpacked(f"{run.project}/negative_pooled", 1, 96)]
    model.recorded = Condition(*embeds)
    vector_to_parameters(unpacked("lora_A", -1), [p for name, p in model.trainable().items() if "lora_A" in name])
    for parameter in model.trainable().values():
        parameter.data = parameter.data.to(run.policy_dtype)
    return model


@dataclass
class Seen:
    """What an update did: of each trained step of each micro-batch, and of each optimizer step."""

    losses: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)


class Watched(FlowGRPO):
    """A Flow-GRPO that keeps what it saw. The recorded gradients' norms are far below the clipping's 1."""

    def watch_all(self) -> Seen:
        self.seen, policy, adamw = Seen(), list(self.model.trainable().values()), self.optimizer.adamw
        adamw.register_step_pre_hook(lambda *_: self.seen.gradients.append(flat([p.grad for p in policy])))
        adamw.register_step_post_hook(lambda *_: self.seen.parameters.append(flat(policy)))
        return self.seen

    def loss(self, new, old_log_probs, advantages, reference, interval) -> Tensor:
        losses = super().loss(new, old_log_probs, advantages, reference, interval)
        self.seen.losses.append(losses.detach().mean())
        self.seen.log_probs.append(new.log_probs.detach())
        self.seen.means.append(new.mean.detach())
        return losses


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    """One of 37 elements, as recorded."""
    return parameters_to_vector([t for t in tensors if t is not None]).detach().float()[::37]


def brightness(media: Media, prompts: Prompts) -> Tensor:
    return media.pixels.mean((1, 2, 3))


def trainer_of(run: Setting) -> Watched:
    return Watched(
        recorded_model(run),
        brightness,
        [str(group) for group in sorted(set(run.groups))],
        Sampling(
            AllSteps(FlowSDE(0.7), last_step=run.last_step),
            groups=SAMPLES // MEMBERS,
            group_size=MEMBERS,
            batch_size=4,
            steps=5,
            guidance_scale=run.guidance_scale,
        ),
        Optimizer(LEARNING_RATE),
        updates_per_epoch=2,
        clip_range=1e-4,
        kl_coef=0.0,
        advantages=run.advantages,
        step_fraction=run.step_fraction,
    )


def rollouts(trainer: Watched, run: Setting) -> list[Trajectory]:
    """The recorded batches of four, from the recorded noise."""
    path = trainer.sampling.plan.resolve(5, 0, 0)
    noise = unpacked("noise", SAMPLES, 6, 16, 8, 8)
    condition = trainer.model.encode([str(group) for group in run.groups])
    return [
        rollout(
            trainer.model,
            condition.rows(rows),
            noise[rows, 0],
            trainer.sigmas,
            path,
            trainer.policy,
            lambda i, rows=rows: noise[rows, 1 + i],
            keep_path=True,
        )
        for rows in torch.arange(SAMPLES).split(4)
    ]


def scores_of(run: Setting) -> Scores:
    rewards = run.recorded("rewards")
    return Scores(rewards, {"brightness": rewards}, torch.ones(SAMPLES, dtype=torch.bool))


def batch_of(trainer: Watched, run: Setting) -> Batch:
    steps = tuple(join_steps(same) for same in zip(*(made.steps for made in rollouts(trainer, run)), strict=True))
    path, group_ids = trainer.sampling.plan.resolve(5, 0, 0), torch.tensor(run.groups)
    scores = scores_of(run)
    texts = tuple(str(group) for group in run.groups)
    advantages = trainer.credit(scores, group_ids)
    return Batch(path, torch.arange(SAMPLES), texts, steps, scores, group_ids, advantages, torch.ones(SAMPLES))


def close(actual: Tensor, expected: Tensor, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=rtol)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_rollout(run: Setting) -> None:
    trainer = trainer_of(run)
    close(torch.tensor(trainer.sigmas), run.recorded("sigmas"), 1e-7)
    made = rollouts(trainer, run)
    visited = torch.cat([torch.stack(one.path[1:], 1) for one in made]).flatten(2)[..., ::16]
    expected = run.recorded("latents")
    close(visited[:, : expected.shape[1]], expected, 1e-5)  # Flow-Factory does not keep the last latents
    log_probs = torch.cat([torch.stack([step.log_probs for step in one.steps], 1) for one in made])
    close(log_probs, run.recorded("log_probs"), 1e-5)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_advantages(run: Setting) -> None:
    advantages = trainer_of(run).credit(scores_of(run), torch.tensor(run.groups))
    close(advantages, run.recorded("advantages"), 1e-6)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_update(run: Setting) -> None:
    trainer = trainer_of(run)
    batch = batch_of(trainer, run)
    seen = trainer.watch_all()
    metrics = trainer.update(batch, run.recorded("order"))
    close(torch.stack(seen.losses), run.recorded("loss"), 1e-6)
    close(torch.stack(seen.log_probs), run.recorded("train_log_prob"), 1e-5)
    if run.project == "flow_grpo":
        close(torch.stack(seen.means).flatten(2)[..., ::64], run.recorded("train_mean"), 1e-5)
    half = run.policy_dtype == torch.bfloat16
    assert metrics["grad_norm"] == pytest.approx(run.recorded("grad_norm").mean().item(), rel=2**-8 if half else 1e-5)
    for k in (0, 1):
        expected = run.recorded("gradients")[k]
        close(seen.gradients[k], expected, (2**-8 if half else 1e-4) * run.recorded("grad_max")[k].item())
        moved, told = (seen.parameters[k] - run.recorded("parameters")[k]).abs(), expected.abs() > 1e-6
        assert told.any()
        assert moved[told].max() <= 1e-5
        assert moved.max() <= 2 * LEARNING_RATE  # AdamW makes a full step of a gradient that is rounding alone

"""ReFL: reward feedback learning, a hinge on the reward of one late denoising step (arXiv:2304.05977, Xu et al.).

    L = lambda E[ phi(r(x0hat(x_t), c)) ],   x0hat = x_t - t v(x_t),   t of a random late step                (eq. 3)
    phi(r) = relu(margin - r)

The paper adds a pre-training loss, here mu times the network's own of real media; the authors' code leaves that out.
Steps before it have no gradient, later ones are not made (plan `LateStep`). margin 2, lambda 1e-3 and steps 30 to 39 of
40 without guidance are the authors' code's, for ImageReward; a reward of another scale needs a margin of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.gradient_plans import LateStep
from flowalign.models.base import Model
from flowalign.prompts import PromptData
from flowalign.randomness import key_generator
from flowalign.rollout import Policy
from flowalign.schedules import Path
from flowalign.tracking import TrackerName
from rewards.base import Reward
from trainers.batch import Sampling
from trainers.collection import Draw, Epoch
from trainers.evaluation import Evaluation
from trainers.keeper import Checkpoints
from trainers.optim import Optimizer
from trainers.path_steps import Scored
from trainers.pretraining import pretraining_loss
from trainers.reward_gradient import RewardGradientTrainer


def hinge(rewards: Float[Tensor, " b"], margin: float) -> Float[Tensor, " b"]:
    """relu(margin - r): no gradient once a reward has reached the margin."""
    return (margin - rewards).relu()


class ReFL(RewardGradientTrainer):
    """ReFL with a LoRA policy.

    Args:
        model, reward, prompts, optimizer, evaluation, checkpoints, epochs, folder, seed, on_invalid, log_with: as of
            `trainers.FlowGRPO`; the reward has to be differentiable.
        sampling: rollouts; its plan draws the step, and `batch_size` is of calls with gradient.
        updates_per_epoch: optimizer steps in an epoch, each on samples of its own; all of them at the epoch's step.
        margin: the reward from which a sample teaches no more.
        coefficient: lambda.
        pretraining: mu; with one, prompts have to name a picture or video each, as "media" in their records. s is a
            point of the grid, drawn for every optimizer step.
        unconditional_grad: under guidance, whether gradient runs through the unconditional half too.
        recompute: activation checkpointing of the step with gradient. With only one it saves memory just where decoder
            and reward need more than the network.
    """

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        sampling: Sampling = Sampling(LateStep(), group_size=1, steps=40, guidance_scale=1.0),
        optimizer: Optimizer = Optimizer(1e-5),
        evaluation: Evaluation = Evaluation(),
        checkpoints: Checkpoints = Checkpoints(),
        epochs: int = 100,
        updates_per_epoch: int = 1,
        margin: float = 2.0,
        coefficient: float = 1e-3,
        pretraining: float = 0.0,
        unconditional_grad: bool = True,
        recompute: bool = True,
        folder: str = "runs/refl",
        seed: int = 0,
        on_invalid: Literal["stop", "drop"] = "stop",
        log_with: tuple[TrackerName, ...] = (),
    ) -> None:
        if not coefficient > 0 or pretraining < 0:
            raise ValueError(
                f"coefficient must be positive and pretraining at least 0, got {coefficient}, {pretraining}"
            )
        self.margin, self.coefficient, self.pretraining, self.recompute = margin, coefficient, pretraining, recompute
        super().__init__(
            model, reward, prompts, sampling, Policy(sampling.guidance_scale, unconditional_grad=unconditional_grad),
            optimizer, evaluation, checkpoints, epochs, updates_per_epoch, folder, seed, on_invalid, log_with,
        )  # fmt: skip

    def loss(self, scored: Scored) -> Float[Tensor, " b"]:
        """lambda relu(margin - r) of each sample (eq. 3)."""
        return self.coefficient * hinge(scored.rewards, self.margin)

    def beside(self, epoch: Epoch, draw: Draw) -> Float[Tensor, " b"] | None:
        """mu times the pre-training loss of each prompt's real media, at one sigma for all."""
        if not self.pretraining:
            return None
        clean, noise = draw.clean(), self.collection.noise(epoch, draw.samples, "pretraining", 0)
        points = key_generator(self.seed, "pretraining_sigma", epoch.number, self.state.part)
        sigmas = torch.full((len(clean),), float(points.choice(self.sigmas[:-1])), dtype=torch.float64)
        losses = pretraining_loss(self.model, clean, noise, sigmas, draw.condition, self.recompute)
        return self.pretraining * losses

    def needed(self, epoch: Epoch) -> Rows:
        return super().needed(epoch) + (Rows(0, len(epoch.rows)) if self.pretraining else Rows())

    def kept_calls(self, path: Path) -> int:
        return super().kept_calls(path) + (self.pretraining > 0)

    def needs_media(self) -> bool:
        return self.pretraining > 0

    def watched(self) -> tuple[str, ...]:
        return (*super().watched(), "satisfied")

    def watch(self, scored: Scored, losses: Float[Tensor, " b"]) -> dict[str, Float[Tensor, " b"]]:
        """With the share of samples that have reached the margin."""
        return super().watch(scored, losses) | {"satisfied": (scored.rewards >= self.margin).float()}

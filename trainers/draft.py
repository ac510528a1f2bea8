"""DRaFT: fine-tuning by the gradient of a differentiable reward through sampling (arXiv:2309.17400, Clark et al.).

    max_theta  E[ r(x_0(theta, c, x_T), c) ]                                                          (eq. 1)

    DRaFT    gradient through all steps             plan LastSteps()
    DRaFT-K  only through the last K of them        plan LastSteps(K)
    DRaFT-LV K = 1, and the reward of n samples drawn anew from x_0:  x_1 = (1 - t_1) x_0 + t_1 e_i  (algorithm 1)
    AlignProp (arXiv:2310.03739): K drawn at random, plan RandomTruncation() or its code's GaussianTruncation()

On a rectified flow the gradient of the last step is scaled by its |dt|: a grid whose last step is tiny hardly trains
with K = 1 (`remarks` says so where it is).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.differentiate import Drawn, differentiable_rollout
from flowalign.gradient_plans import LastSteps
from flowalign.models.base import Model
from flowalign.prompts import PromptData
from flowalign.rollout import Policy
from flowalign.schedules import Path
from flowalign.tracking import TrackerName
from flowalign.transitions import ODE, velocity_mse_kl
from rewards.base import Reward
from trainers.batch import Sampling
from trainers.collection import Draw, Epoch
from trainers.evaluation import Evaluation
from trainers.flow_grpo import KL
from trainers.keeper import Checkpoints
from trainers.optim import Optimizer
from trainers.path_steps import Scored, repeated
from trainers.reward_gradient import RewardGradientTrainer


class DRaFT(RewardGradientTrainer):
    """DRaFT with a LoRA policy.

    Args:
        model, reward, prompts, optimizer, evaluation, checkpoints, epochs, folder, seed, on_invalid, log_with: as of
            `trainers.FlowGRPO`; the reward has to be differentiable.
        sampling: rollouts; its plan says which steps have gradient, and `batch_size` is of calls with gradient.
        updates_per_epoch: optimizer steps in an epoch, each on samples of its own.
        kl_coef: weight of the KL to the reference over the steps with gradient; 0 leaves the reference's calls out.
        kl: which KL that is. Steps of an ODE have no density, so that velocities are compared by default.
        low_variance: n of DRaFT-LV; 0 scores the sample itself. Needs LastSteps(1).
        unconditional_grad: under guidance, whether gradient runs through the unconditional half too.
        recompute: activation checkpointing of each step with gradient: memory of one call instead of K calls' for K
            more forwards. The numbers are the same.
    """

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        sampling: Sampling = Sampling(LastSteps(1), group_size=1),
        optimizer: Optimizer = Optimizer(),
        evaluation: Evaluation = Evaluation(),
        checkpoints: Checkpoints = Checkpoints(),
        epochs: int = 100,
        updates_per_epoch: int = 1,
        kl_coef: float = 0.0,
        kl: KL = velocity_mse_kl,
        low_variance: int = 0,
        unconditional_grad: bool = True,
        recompute: bool = True,
        folder: str = "runs/draft",
        seed: int = 0,
        on_invalid: Literal["stop", "drop"] = "stop",
        log_with: tuple[TrackerName, ...] = (),
    ) -> None:
        if kl_coef < 0 or low_variance < 0:
            raise ValueError(f"kl_coef and low_variance must be at least 0, got {kl_coef} and {low_variance}")
        if low_variance and (not isinstance(sampling.plan, LastSteps) or sampling.plan.count != 1):
            raise ValueError(
                f"low_variance draws the last step anew: it needs the plan LastSteps(1), not {sampling.plan}"
            )
        self.kl_coef, self.kl, self.low_variance, self.recompute = kl_coef, kl, low_variance, recompute
        self.views = max(low_variance, 1)
        super().__init__(
            model, reward, prompts, sampling, Policy(sampling.guidance_scale, unconditional_grad=unconditional_grad),
            optimizer, evaluation, checkpoints, epochs, updates_per_epoch, folder, seed, on_invalid, log_with,
        )  # fmt: skip

    def loss(self, scored: Scored) -> Float[Tensor, " b"]:
        """-r + beta sum_t KL_t (eq. 1, negated), t over the steps with gradient."""
        loss = -scored.rewards
        return loss + self.kl_coef * self._kl(scored) if scored.references else loss

    def _kl(self, scored: Scored) -> Float[Tensor, " b"]:
        return path_kl(self.kl, scored, self.policy)

    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    def watched(self) -> tuple[str, ...]:
        return (*super().watched(), *(["kl"] if self.needs_reference() else []))

    def watch(self, scored: Scored, losses: Float[Tensor, " b"]) -> dict[str, Float[Tensor, " b"]]:
        numbers = super().watch(scored, losses)
        return numbers | {"kl": self._kl(scored)} if scored.references else numbers

    def rollout(self, epoch: Epoch, draw: Draw, sigmas: list[float]) -> Drawn:
        if not self.low_variance:
            return super().rollout(epoch, draw, sigmas)
        with torch.no_grad():
            clean = super().rollout(epoch, draw, sigmas).latents
        noise = [
            self.collection.noise(epoch, draw.samples, "renoise", number).to(clean.device)
            for number in range(self.low_variance)
        ]
        noised = (1 - sigmas[-2]) * clean[:, None] + sigmas[-2] * torch.stack(noise, 1)
        told = repeated(draw.condition, self.low_variance)
        last = Path((ODE(),))
        return differentiable_rollout(
            self.model, told, noised.flatten(0, 1), sigmas[-2:], last, self.policy, None, self.recompute
        )

    def step_rows(self, rows: int, step: int, learnt: bool, onward: bool) -> Rows:
        if not self.low_variance or not learnt:
            return super().step_rows(rows, step, learnt, onward)
        return super().step_rows(rows, step, False, False) + super().step_rows(rows * self.views, step, True, False)


def path_kl(kl: KL, scored: Scored, policy: Policy) -> Float[Tensor, " b"]:
    """The sum of a KL over the steps with gradient, of policy and reference from the same latents.

    Its gradient runs through those latents too, as a KL of whole paths asks for.
    """
    total = torch.zeros_like(scored.rewards)
    for visit, reference in zip(scored.visits, scored.references, strict=True):
        mean, std = visit.transition(visit.latents, visit.velocity, visit.interval)
        ref_mean, _ = visit.transition(visit.latents, reference, visit.interval)
        one = kl(mean, ref_mean, visit.velocity, reference, std, visit.interval, policy.reduce)
        total = total + one.to(total.device)
    return total

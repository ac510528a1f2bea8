"""GRPO-Guard: ratios whose clipping works, and gradients that are alike over the steps (arXiv:2510.22319, Wang et al.).

    log rho = std (log p - log p_old) + ||mean - mean_old||^2 / (2 std)          RatioNorm (eq. 8), both averaged
            = average of eps (mean - mean_old),       x' = mean_old + std eps
    L       = 1/|dt| max(-A rho, -A clip(rho, 1 - eps_clip, 1 + eps_clip))       gradient reweighting (eq. 12)

The plain ratio of Flow-GRPO is below 1 on average, by more the less noise a step has, so that samples with A > 0 are
hardly ever clipped. Published clip ranges of rho are 2e-6 and 4e-6. The mean of the old policy is not kept: it is where
a step ended less its noise, which is drawn again by its key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from flowalign.advantages import group_advantages
from flowalign.credit import TermCredit
from flowalign.models.base import Model
from flowalign.objectives import clipped_surrogate, guard_ratio, policy_diagnostics
from flowalign.prompts import PromptData
from flowalign.records import Interval, intervals
from flowalign.rollout import LogProb, Replay
from flowalign.schedules import AllSteps
from flowalign.step_weights import StepWeights, inverse_dt, spread_of
from flowalign.tracking import TrackerName
from flowalign.transitions import FlowSDE, Reduce, exact_kl, gaussian_log_prob, mean_of_elements
from rewards.base import Reward
from trainers.batch import OnInvalid, Sampling
from trainers.evaluation import Evaluation
from trainers.flow_grpo import KL, Advantages, FlowGRPO
from trainers.keeper import Checkpoints
from trainers.optim import Optimizer
from trainers.ratio_guard import RatioCheck
from trainers.regularisers import AdaptiveCoefficient, Refresh
from trainers.resampling import EverySample, Selection
from trainers.supervised import Supervised


class GRPOGuard(FlowGRPO):
    """GRPO-Guard with a LoRA policy.

    Args:
        model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch, kl_coef, kl,
            advantages, step_fraction, unconditional_grad, folder, seed, on_invalid, log_with, selection, refresh,
            supervised, ratio_check: as of `trainers.FlowGRPO`.
        clip_range: of rho above, whose log is by about std smaller than that of Flow-GRPO's ratio.
        log_prob, reduce: rho presumes `gaussian_log_prob` and `mean_of_elements`.
        step_weights: the gradient reweighting, `inverse_dt` in the paper; None leaves it out.
    """

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        sampling: Sampling = Sampling(AllSteps(FlowSDE(0.7))),
        optimizer: Optimizer = Optimizer(),
        evaluation: Evaluation = Evaluation(),
        checkpoints: Checkpoints = Checkpoints(),
        epochs: int = 100,
        updates_per_epoch: int = 2,
        clip_range: float = 4e-6,
        kl_coef: float | AdaptiveCoefficient = 0.0,
        kl: KL = exact_kl,
        advantages: Advantages | TermCredit = group_advantages,
        step_fraction: float = 1.0,
        log_prob: LogProb = gaussian_log_prob,
        reduce: Reduce = mean_of_elements,
        unconditional_grad: bool = False,
        folder: str = "runs/grpo_guard",
        seed: int = 0,
        on_invalid: OnInvalid = "stop",
        log_with: tuple[TrackerName, ...] = (),
        selection: Selection = EverySample(),
        refresh: Refresh = Refresh(),
        supervised: Supervised | None = None,
        step_weights: StepWeights | None = inverse_dt,
        ratio_check: RatioCheck = "recompute",
    ) -> None:
        if reduce is not mean_of_elements or log_prob is not gaussian_log_prob:
            raise ValueError(
                "GRPO-Guard's ratio is made of the mean over a latent's elements of the Gaussian log-density: leave "
                "reduce at flowalign.transitions.mean_of_elements and log_prob at gaussian_log_prob"
            )
        super().__init__(
            model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch,
            clip_range, kl_coef, kl, advantages, step_fraction, log_prob, reduce, unconditional_grad, folder, seed,
            on_invalid, log_with, selection, refresh, supervised, step_weights, ratio_check=ratio_check,
        )  # fmt: skip

    def loss(
        self,
        new: Replay,
        old_log_probs: Float[Tensor, " b"],
        advantages: Float[Tensor, " b"],
        reference: Replay | None,
        interval: Interval,
    ) -> Float[Tensor, " b"]:
        """max(-A rho, -A clip(rho)) + beta KL of each sample at one step, A being weighted already."""
        loss = clipped_surrogate(self._ratio(new, old_log_probs), advantages, self.clip_range)
        return loss if reference is None else loss + self.kl_coef * self._kl(new, reference, interval)

    def _ratio(self, new: Replay, old_log_probs: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        assert new.old_mean is not None
        return guard_ratio(new.log_probs, old_log_probs, new.mean, new.old_mean, new.std)

    def needs_old_mean(self) -> bool:
        return True

    def watch(
        self, new: Replay, old_log_probs: Tensor, reference: Replay | None, interval: Interval
    ) -> dict[str, Float[Tensor, " b"]]:
        """What is clipped is told of rho; approx_kl stays that of the log-probs."""
        plain = super().watch(new, old_log_probs, reference, interval)
        log_ratio = self._ratio(new, old_log_probs).log()
        own = policy_diagnostics(log_ratio, torch.zeros_like(log_ratio), self.clip_range)
        return plain | {name: value for name, value in own.items() if name != "approx_kl"}

    def remarks(self) -> tuple[str, ...]:
        if self.updates_per_epoch > 1:
            return super().remarks()
        once = (
            "updates_per_epoch is 1: the policy that learns is the one that has sampled, so that every ratio is 1 and "
            "GRPO-Guard clips nothing; of what it does only the weights of the steps are left"
        )
        return (*super().remarks(), once)

    def _check(self) -> None:
        super()._check()
        for path, _ in self.collection.epoch(0).paths:
            grid = intervals(path.grid(self.sigmas))
            for step in self.trained_steps(path):
                if not spread_of(path.transitions[step], grid[step])[0] > 0:
                    raise ValueError(
                        f"step {step} of {len(grid)}, which ends at sigma {grid[step].sigma_next:g}, has noise of std "
                        "0, and GRPO-Guard divides by it: leave the step out (last_step: false in the plan). CPS, "
                        "Renoise and DDIM have no noise in a step to sigma 0, and a rollout of one step has no other"
                    )

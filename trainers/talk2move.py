"""Talk2Move: policy gradients for edits that move or resize an object (arXiv:2601.02356, Tan et al.).

    x_k+1 = SDE step of x_k,  k in a window of few steps;   x_0 = x_K - sigma_K v(x_K)     one jump after the window
    L     = max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) at the window's steps,   A = (R - mean of the group) / std

The group shares its start noise and the ODE steps before the window, the std is of the whole batch and there is no KL:
the loss is Flow-GRPO's. Which steps the window holds is measured beforehand (`trainers.active_steps`), and the rewards
are geometric (`rewards.ObjectEdit`). The authors edit with Qwen-Image-Edit, whose network sees the picture; here a
picture is edited by a partial start (`flowalign.models.editing`). Their code trains windows of four among the first
five of ten steps, with noise level 1, groups of 16 and eps 2e-4, the defaults here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline

from flowalign.advantages import flow_grpo_advantages
from flowalign.credit import TermCredit
from flowalign.models.base import Model
from flowalign.prompts import PromptData
from flowalign.rollout import LogProb
from flowalign.schedules import Window
from flowalign.step_weights import StepWeights
from flowalign.tracking import Run, TrackerName
from flowalign.transitions import FlowSDE, Reduce, exact_kl, gaussian_log_prob, mean_of_elements
from flowalign.windows import Jump
from rewards.base import Reward
from trainers.active_steps import ActiveCollection, ActiveSteps, choose_start
from trainers.batch import OnInvalid, Sampling
from trainers.evaluation import Evaluation
from trainers.flow_grpo import KL, Advantages, FlowGRPO
from trainers.keeper import Checkpoints, Keeper
from trainers.optim import Optimizer
from trainers.ratio_guard import RatioCheck
from trainers.regularisers import AdaptiveCoefficient, Refresh
from trainers.resampling import EverySample, Selection
from trainers.supervised import Supervised

JUMPING = Jump(Window(FlowSDE(1.0), 0, 4, shared_noise=True))


class Talk2Move(FlowGRPO):
    """Talk2Move with a LoRA policy.

    Args:
        model, reward, prompts, optimizer, evaluation, checkpoints, epochs, updates_per_epoch, clip_range, kl_coef, kl,
            advantages, step_fraction, log_prob, reduce, unconditional_grad, folder, seed, on_invalid, log_with,
            selection, refresh, supervised, step_weights, ratio_check: as of `trainers.FlowGRPO`.
        sampling: its plan is a `flowalign.schedules.Window`, by itself or in `flowalign.windows.Jump` or `ShortTail`.
        active: how the window's start is measured before training; None for the plan's own start, of any plan.
    """

    collection: ActiveCollection

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        sampling: Sampling = Sampling(JUMPING, group_size=16, batch_size=1, steps=10),
        optimizer: Optimizer = Optimizer(2e-4),
        evaluation: Evaluation = Evaluation(),
        checkpoints: Checkpoints = Checkpoints(),
        epochs: int = 100,
        updates_per_epoch: int = 1,
        clip_range: float = 2e-4,
        kl_coef: float | AdaptiveCoefficient = 0.0,
        kl: KL = exact_kl,
        advantages: Advantages | TermCredit = flow_grpo_advantages,
        active: ActiveSteps | None = ActiveSteps(high=5),
        step_fraction: float = 1.0,
        log_prob: LogProb = gaussian_log_prob,
        reduce: Reduce = mean_of_elements,
        unconditional_grad: bool = False,
        folder: str = "runs/talk2move",
        seed: int = 0,
        on_invalid: OnInvalid = "stop",
        log_with: tuple[TrackerName, ...] = (),
        selection: Selection = EverySample(),
        refresh: Refresh = Refresh(),
        supervised: Supervised | None = None,
        step_weights: StepWeights | None = None,
        ratio_check: RatioCheck = "recompute",
    ) -> None:
        self.active = active
        super().__init__(
            model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch,
            clip_range, kl_coef, kl, advantages, step_fraction, log_prob, reduce, unconditional_grad, folder, seed,
            on_invalid, log_with, selection, refresh, supervised, step_weights, ratio_check=ratio_check,
        )  # fmt: skip

    def collector(self, reward: Reward) -> ActiveCollection:
        made = ActiveCollection(self.model, reward, self.prompts, self.sampling, self.policy, self.seed)
        made.keep_latents = self.supervised is not None
        return made

    def collector_of(self, sampling: Sampling, seed: int) -> ActiveCollection:
        """The same with other samples."""
        return ActiveCollection(self.model, self.reward, self.prompts, sampling, self.policy, seed)

    def prepare(self, run: Run, keeper: Keeper) -> None:
        if self.active is not None:
            choose_start(self, self.active, run, keeper)

    def check_sampling(self, sampling: Sampling) -> None:
        super().check_sampling(sampling)
        if self.active is not None:
            self.active.starts(sampling)  # raises where there is nothing to choose

    def remarks(self) -> tuple[str, ...]:
        told, active = super().remarks(), self.active
        return told if active is None or self.state.epoch else (*told, active.remark(self.sampling))

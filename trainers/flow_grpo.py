"""Flow-GRPO: online policy gradients for flow models (arXiv:2505.05470, Liu et al.).

    J = E[ 1/G sum_i 1/T sum_t  min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) - beta KL ]          (eq. 4)
    A_i = (R_i - mean of the group) / std,    rho = p_policy(x' | x) / p_old(x' | x)               (eq. 5)

with p the Gaussian of one step of an SDE that shares the flow's marginals. Where the authors' code differs from the
paper (std over the batch, KL without |dt|), the config names which one is meant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.advantages import flow_grpo_advantages, group_advantages
from flowalign.credit import TermCredit
from flowalign.models.base import Model
from flowalign.objectives import clipped_policy_loss, policy_diagnostics
from flowalign.prompts import PromptData
from flowalign.records import Interval, Scores
from flowalign.rollout import LogProb, Policy, Replay
from flowalign.schedules import AllSteps, Path
from flowalign.step_weights import StepWeights
from flowalign.tracking import TrackerName
from flowalign.transitions import FlowSDE, Reduce, exact_kl, gaussian_log_prob, mean_of_elements
from rewards.base import Reward, as_reward
from rewards.terms import with_terms
from trainers.batch import OnInvalid, Sampling
from trainers.by_term import ByTerm
from trainers.evaluation import Evaluation
from trainers.keeper import Checkpoints
from trainers.optim import Optimizer
from trainers.policy_gradient import PolicyTrainer
from trainers.ratio_guard import RatioCheck, RatioGuard
from trainers.regularisers import AdaptiveCoefficient, Refresh, check_kl, check_refresh
from trainers.resampling import EverySample, Selection
from trainers.supervised import Supervised

KL = Callable[[Tensor, Tensor, Tensor, Tensor, float, Interval, Reduce], Tensor]
Advantages = Callable[[Tensor, Tensor], Tensor]


class FlowGRPO(PolicyTrainer):
    """Flow-GRPO with a LoRA policy.

    Args:
        model: a diffusers pipeline, its folder or hub id, or an adapter with settings of its own (`flowalign.models`).
        reward: any reward, any callable (media, prompts) -> b scores, or a formula such as "pickscore/26 + ocr".
        prompts: texts, a file of them, a dataset, or prompts with metadata; see `flowalign.prompts`.
        sampling: rollouts; see `Sampling`.
        optimizer: see `Optimizer`.
        evaluation: see `Evaluation`; without prompts of its own there is none.
        checkpoints: see `Checkpoints`.
        epochs: rounds of sampling and updating.
        updates_per_epoch: optimizer steps made of each round's samples; only the first is exactly on-policy.
        clip_range: eps, of the ratio of log-probs in the reduction `reduce`.
        kl_coef: beta; 0 leaves the reference's calls out. Or one that follows the KL: `trainers.regularisers`.
        kl: which KL beta multiplies: the exact one, as in the paper, or an author's (`flowalign.transitions`). The
            authors' .04 goes with their code's, `flow_grpo_kl`, as in the published configs; with the exact one, the
            default, it holds 1 / |dt| times as hard: 4 to 25 times at the trained steps of SD3's ten.
        advantages: function of rewards [b] and group ids [b]; or credit that reads the terms of a weighted reward, such
            as `flowalign.credit.GDPO`.
        step_fraction: share of the stochastic steps that are trained, counted from the first. The authors' .99 leaves
            out the last: on SD3's grid its noise, of std .006, does not show, so that its credit is that of the others.
        log_prob, reduce: density of a step, and how it is reduced over a sample's elements.
        unconditional_grad: under guidance, whether gradient runs through the unconditional half too.
        folder: where the run is written.
        seed: of all randomness.
        on_invalid: what to do about samples whose score is not valid: stop, or leave them, or their whole groups, out
            and count them.
        log_with: trackers through accelerate, none by default.
        selection: which samples the update takes: `trainers.resampling`, whose `DropEqual`, `BestAndWorst` and
            `Resample` spend nothing on samples that teach nothing.
        refresh: every how many epochs the reference becomes the policy of then; never by default.
        supervised: a branch that imitates the best samples, with its coefficient (`trainers.supervised`).
        step_weights: function that weighs the advantages of each trained step (`flowalign.step_weights`), such as
            `noise_weights`; None for 1.
        ratio_check: what is done where an epoch's first ratios are not 1, as they have to be: `trainers.ratio_guard`.
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
        clip_range: float = 1e-4,
        kl_coef: float | AdaptiveCoefficient = 0.04,
        kl: KL = exact_kl,
        advantages: Advantages | TermCredit = flow_grpo_advantages,
        step_fraction: float = 1.0,
        log_prob: LogProb = gaussian_log_prob,
        reduce: Reduce = mean_of_elements,
        unconditional_grad: bool = False,
        folder: str = "runs/flow_grpo",
        seed: int = 0,
        on_invalid: OnInvalid = "stop",
        log_with: tuple[TrackerName, ...] = (),
        selection: Selection = EverySample(),
        refresh: Refresh = Refresh(),
        supervised: Supervised | None = None,
        step_weights: StepWeights | None = None,
        ratio_check: RatioCheck = "recompute",
    ) -> None:
        beta = kl_coef.start if isinstance(kl_coef, AdaptiveCoefficient) else kl_coef
        if clip_range <= 0 or beta < 0 or not 0 < step_fraction <= 1:
            raise ValueError(
                f"clip_range must be positive, kl_coef at least 0 and step_fraction in (0, 1]; "
                f"got {clip_range}, {beta} and {step_fraction}"
            )
        check_refresh(refresh, beta, optimizer.ema_decay)
        self.clip_range, self.kl, self.step_fraction = clip_range, kl, step_fraction
        self.first_kl_coef, self.adaptive = beta, kl_coef if isinstance(kl_coef, AdaptiveCoefficient) else None
        self.selection, self.refresh, self.supervised = selection, refresh, supervised
        self.step_weights, self.ratio_guard = step_weights, RatioGuard(ratio_check, clip_range)
        self.advantages: Advantages = group_advantages
        self.by_term: ByTerm | None = None
        if isinstance(advantages, TermCredit):
            self.by_term = ByTerm(advantages, with_terms(as_reward(reward)))
            reward = self.by_term.reward
        else:
            self.advantages = advantages
        policy = Policy(sampling.guidance_scale, log_prob, reduce, unconditional_grad)
        super().__init__(
            model, reward, prompts, sampling, policy, optimizer, evaluation, checkpoints, epochs, updates_per_epoch,
            folder, seed, on_invalid, log_with,
        )  # fmt: skip

    def _check(self) -> None:
        super()._check()
        if self.needs_reference():
            check_kl(self.kl, (rule for path, _ in self.collection.epoch(0).paths for rule in path.transitions))

    def loss(
        self,
        new: Replay,
        old_log_probs: Float[Tensor, " b"],
        advantages: Float[Tensor, " b"],
        reference: Replay | None,
        interval: Interval,
    ) -> Float[Tensor, " b"]:
        """max(-A rho, -A clip(rho)) + beta KL of each sample at one step (eq. 4, negated)."""
        loss = clipped_policy_loss(new.log_probs, old_log_probs, advantages, self.clip_range)
        return loss if reference is None else loss + self.kl_coef * self._kl(new, reference, interval)

    @property
    def kl_coef(self) -> float:
        """beta of the present epoch."""
        known = None if self.adaptive is None else self.state.kl_coef
        return self.first_kl_coef if known is None else known

    def _kl(self, new: Replay, reference: Replay, interval: Interval) -> Float[Tensor, " b"]:
        return self.kl(
            new.mean, reference.mean, new.velocity, reference.velocity, new.std, interval, self.policy.reduce
        )

    def credit(self, scores: Scores, group_ids: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        return self.credit_of(lambda term: scores.total if term is None else scores.parts[term], group_ids)

    def credit_of(
        self, rewards: Callable[[str | None], Float[Tensor, b * t]], group_ids: Int[Tensor, " b"]
    ) -> Float[Tensor, b * t]:
        """Advantages of what samples, or their steps, are rewarded with: by the whole reward, or by each term."""
        return self.advantages(rewards(None), group_ids) if self.by_term is None else self.by_term(rewards, group_ids)

    def looks_back(self) -> tuple[bool, bool]:
        return self.needs_reference(), self.refresh.every > 0

    def learnt(self, metrics: dict[str, float]) -> dict[str, float]:
        """Move the coefficient by the epoch's KL, and renew the reference if that is due."""
        self.state.older = self.refresh.renewed(self) or self.state.older
        if self.adaptive is None:
            return {}
        told, kl = {"kl_coef": self.kl_coef}, metrics.get("kl", math.nan)
        self.state.kl_coef = self.adaptive.moved(self.kl_coef, kl) if math.isfinite(kl) else self.kl_coef
        return told

    def remarks(self) -> tuple[str, ...]:
        told = () if self.by_term is None else self.by_term.remarks()
        return (*told, *self.selection.remarks(self.sampling))

    def trained_steps(self, path: Path) -> tuple[int, ...]:
        return path.stochastic[: max(1, int(len(path.stochastic) * self.step_fraction))]

    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    def watched(self) -> tuple[str, ...]:
        return ("log_ratio", "clip_fraction", "approx_kl", *(["kl"] if self.needs_reference() else []))

    def ratio_limit(self) -> float:
        return 4 * self.clip_range

    def watch(
        self, new: Replay, old_log_probs: Tensor, reference: Replay | None, interval: Interval
    ) -> dict[str, Float[Tensor, " b"]]:
        numbers = policy_diagnostics(new.log_probs, old_log_probs, self.clip_range)
        return numbers if reference is None else numbers | {"kl": self._kl(new, reference, interval)}

"""Euphonium: rollouts steered by a process reward's gradient, and learned from (arXiv:2602.04928).

    x' = mean + scale |dt| grad_x r(x, t) + std eps,    rho = N(x'; mean_policy, std) / N(x'; mean_old, std)
    loss = c_o max(-A_o rho, -A_o clip(rho)) + c_p max(-A_p rho, -A_p clip(rho))

The densities are those of the unguided step, so that the policy learns to make by itself what guidance has found. A_o
is the z-score of the outcome's reward, A_p of the process reward at each step, both over the group. Here r is the
reward of the denoised latents' picture; the authors have a network on noisy latents (github.com/zerzerzerz/Euphonium).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.advantages import dancegrpo_advantages
from flowalign.credit import TermCredit
from flowalign.guidance import Guided
from flowalign.models.base import Model
from flowalign.objectives import clipped_policy_loss
from flowalign.prompts import PromptData
from flowalign.records import Interval, Scores
from flowalign.rollout import LogProb, Replay
from flowalign.schedules import AllSteps, Path
from flowalign.tracking import TrackerName
from flowalign.transitions import DanceSDE, Reduce, exact_kl, gaussian_log_prob, mean_of_elements
from rewards.base import Reward, as_reward
from trainers.batch import OnInvalid, Sampling
from trainers.collection import Collection
from trainers.evaluation import Evaluation
from trainers.flow_grpo import KL, Advantages, FlowGRPO
from trainers.guided import GuidedCollection, check_guided, process_rewards_of
from trainers.keeper import Checkpoints
from trainers.optim import Optimizer
from trainers.ratio_guard import RatioCheck

if TYPE_CHECKING:
    from trainers.preflight.family import Family

LOOKED_AT = 100  # epochs of a plan; the rollout of a later one says the same

Credited = Callable[[tuple[int, ...], int], int | None]


def arrival(stochastic: tuple[int, ...], guided: int) -> int | None:
    """The reward at a step's latents is credited to the stochastic step before it, which has led there."""
    return max((step for step in stochastic if step < guided), default=None)


def departure(stochastic: tuple[int, ...], guided: int) -> int | None:
    """It is credited to the step that leaves these latents, as in the authors' code.

    What is drawn there has no part in it: but for the drift, A_p times the gradient of that step's density is 0 on
    average.
    """
    return guided


class Euphonium(FlowGRPO):
    """Euphonium with a LoRA policy.

    Args:
        model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch, clip_range,
            kl_coef, kl, advantages, step_fraction, log_prob, reduce, unconditional_grad, folder, seed, on_invalid,
            log_with, ratio_check: as of `trainers.FlowGRPO`.
        guided: which steps are guided, how far, and how the gradient is had; see `flowalign.guidance.Guided`.
        process_reward: r, of what the latents of a guided step are denoised to; None for the reward itself.
        outcome_coef, process_coef: c_o and c_p.
        process_advantages: function of the process rewards [b, k] of the guided steps and the group ids [b].
        credited_to: the step that a process reward is credited to: `arrival` or `departure`.
    """

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        sampling: Sampling = Sampling(AllSteps(DanceSDE(0.25), shared_noise=True)),
        optimizer: Optimizer = Optimizer(),
        evaluation: Evaluation = Evaluation(),
        checkpoints: Checkpoints = Checkpoints(),
        epochs: int = 100,
        updates_per_epoch: int = 2,
        clip_range: float = 1e-4,
        kl_coef: float = 0.0,
        kl: KL = exact_kl,
        advantages: Advantages | TermCredit = dancegrpo_advantages,
        guided: Guided = Guided(),
        process_reward: Reward | Callable[..., Any] | str | None = None,
        outcome_coef: float = 1.0,
        process_coef: float = 1.0,
        process_advantages: Advantages = dancegrpo_advantages,
        credited_to: Credited = arrival,
        step_fraction: float = 1.0,
        log_prob: LogProb = gaussian_log_prob,
        reduce: Reduce = mean_of_elements,
        unconditional_grad: bool = False,
        folder: str = "runs/euphonium",
        seed: int = 0,
        on_invalid: OnInvalid = "stop",
        log_with: tuple[TrackerName, ...] = (),
        ratio_check: RatioCheck = "recompute",
    ) -> None:
        if outcome_coef < 0 or process_coef < 0 or not outcome_coef + process_coef:
            raise ValueError(
                f"outcome_coef and process_coef must be at least 0 and not both 0, got {outcome_coef}, {process_coef}"
            )
        self.guided, self.outcome_coef, self.process_coef = guided, outcome_coef, process_coef
        self.process_advantages, self.credited_to = process_advantages, credited_to
        reward = as_reward(reward)
        self.process_reward = reward if process_reward is None else as_reward(process_reward)
        _check_guidance(guided, self.process_reward)
        super().__init__(
            model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch,
            clip_range, kl_coef, kl, advantages, step_fraction, log_prob, reduce, unconditional_grad, folder, seed,
            on_invalid, log_with, ratio_check=ratio_check,
        )  # fmt: skip

    def loss(
        self,
        new: Replay,
        old_log_probs: Float[Tensor, " b"],
        advantages: Float[Tensor, "b 2"],
        reference: Replay | None,
        interval: Interval,
    ) -> Float[Tensor, " b"]:
        """c_o times the outcome's clipped loss plus c_p times the process reward's, and beta KL."""
        outcome, process = self.outcome_coef * advantages[:, 0], self.process_coef * advantages[:, 1]
        loss = super().loss(new, old_log_probs, outcome, reference, interval)
        return loss + clipped_policy_loss(new.log_probs, old_log_probs, process, self.clip_range)

    def credited(self, scores: Scores, group_ids: Int[Tensor, " b"], path: Path) -> Float[Tensor, "b t 2"]:
        """The outcome's advantage and the process reward's of each sample at each stochastic step."""
        steps, known = path.stochastic, scores.valid
        found = torch.zeros(len(scores), len(steps), 2)
        found[:, :, 0] = super().credited(scores, group_ids, path)[:, None]
        rewards = process_rewards_of(scores)[known]
        if rewards.numel() and self.process_coef:
            advantages = self.process_advantages(rewards, group_ids[known])
            for at, guided in enumerate(sorted(self.guided.steps)):
                step = self.credited_to(steps, guided)
                if step is not None:
                    found[known, steps.index(step), 1] = advantages[:, at]
        return found

    def guides(self) -> bool:
        """Whether process rewards are looked at."""
        return bool(self.guided.steps) and (self.guided.scale > 0 or self.process_coef > 0)

    def collector(self, reward: Reward) -> Collection:
        if not self.guides():
            return super().collector(reward)
        return GuidedCollection(
            self.model, reward, self.prompts, self.sampling, self.policy, self.seed, self.guided, self.process_reward
        )

    def ahead(self) -> int:
        """None: its rollouts ask a reward themselves."""
        return 0

    def check_sampling(self, sampling: Sampling) -> None:
        super().check_sampling(sampling)
        if sampling.overlap:
            raise ValueError(
                f"sampling.overlap is {sampling.overlap}, but Euphonium's rollouts ask a reward themselves: there is "
                "none that could look at other samples meanwhile; leave it out"
            )

    def _check(self) -> None:
        super()._check()
        for number in range(min(self.epochs, LOOKED_AT)) if self.guides() else ():
            for path, _ in self.collection.epoch(number).paths:
                check_guided(self.guided, path)

    def preflight(self) -> Family:
        from trainers.preflight.euphonium import EuphoniumFamily

        return EuphoniumFamily(self)


def _check_guidance(guided: Guided, reward: Reward) -> None:
    if reward.card.scope != "sample":
        raise ValueError(
            f"{reward.name} compares samples with one another; a process reward must score each on its own: set "
            "process_reward to one that does"
        )
    if guided.steps and guided.scale and guided.slope.differentiates() and not reward.differentiable:
        raise ValueError(
            f"{reward.name} has no gradient, and guided.slope goes back through it: set process_reward to a "
            "differentiable reward, or guided.slope to flowalign.guidance.SPSA"
        )

"""AWM, advantage weighted matching: pre-training's own loss, weighted by advantages of both signs (arXiv:2509.25050).

    J = E[ min(rho A, clip(rho, 1 - eps, 1 + eps) A) ],   rho = exp(l(v) - l(v_old)),   l(v) = -w(t, ||v* - v||^2)

with v* = e - x_0 at x_t = (1 - t) x_0 + t e: the matching loss stands in for a log-prob, at the same t and e under both
policies. Where these are the same, rho = 1, and the gradient is that of A w(t, ||v* - v||^2), which noise of the
sampler does not enter. The authors hold the policy near two others: the reference, and an average of the past ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.advantages import flow_grpo_advantages
from flowalign.models.base import Model
from flowalign.objectives import clipped_policy_loss, policy_diagnostics
from flowalign.prompts import PromptData
from flowalign.records import Scores
from flowalign.tracking import TrackerName
from flowalign.transitions import mean_of_elements
from rewards.base import Reward
from trainers.batch import OnInvalid, Sampling
from trainers.evaluation import Evaluation
from trainers.forward_advantages import (
    Advantages,
    Decay,
    ForwardAdvantageTrainer,
    PerSample,
    distance,
    older_velocity,
    on_policy,
)
from trainers.forward_steps import Noised
from trainers.forward_times import StratifiedTimes, Times
from trainers.keeper import Checkpoints
from trainers.optim import Optimizer

Latents = Float[Tensor, "b *d"]
Weighting = Callable[[Tensor, Tensor], Tensor]  # mean squared errors [b] and t [b] to l [b]
TINY = 1e-10  # added to an error before its root, whose slope has no bound at 0
POWER = 0.25  # of the authors' `ghuber`


def uniform(errors: PerSample, sigma: PerSample) -> PerSample:
    """l = -q, q the mean squared error: every t counts alike."""
    return -errors


def by_t(errors: PerSample, sigma: PerSample) -> PerSample:
    """l = -t q."""
    return -sigma * errors


def by_t_squared(errors: PerSample, sigma: PerSample) -> PerSample:
    """l = -t^2 q: the error of x_0."""
    return -sigma.square() * errors


def huber(errors: PerSample, sigma: PerSample) -> PerSample:
    """l = -t (sqrt(q + 1e-10) - 1e-5)."""
    return -sigma * ((errors + TINY).sqrt() - TINY**0.5)


def ghuber(errors: PerSample, sigma: PerSample) -> PerSample:
    """l = -t ((q + 1e-10)^p - 1e-10^p) / p with p = 1/4, of all the authors' runs: large errors count least."""
    return -sigma * ((errors + TINY) ** POWER - TINY**POWER) / POWER


def matching_log_probs(velocity: Latents, target: Latents, sigma: PerSample, weighting: Weighting) -> PerSample:
    """l of each sample, in double precision."""
    return weighting(mean_of_elements((velocity.double() - target.double()).square()), sigma.double()).float()


def unit_advantages(rewards: PerSample, group_ids: Int[Tensor, " b"]) -> PerSample:
    """`flow_grpo_advantages`, clipped to 5, over 5: in [-1, 1], as the authors' regularisers presume."""
    return flow_grpo_advantages(rewards, group_ids) / 5


class AWM(ForwardAdvantageTrainer):
    """AWM with a LoRA policy.

    Args:
        model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, folder, seed, log_with: as of
            `trainers.FlowGRPO`; `batch_size` is of calls with gradient, whatever the plan.
        updates_per_epoch: optimizer steps made of an epoch's samples; in the first of them rho is 1.
        weighting: function of mean squared errors and t: `uniform`, `by_t`, `by_t_squared`, `huber` or `ghuber`.
        clip_range: eps, of rho; infinite for none.
        advantages: function of rewards [b] and group ids [b].
        kl_coef: of mean (v - v_ref)^2; 0 leaves the reference's calls out.
        older_coef: of mean (v - v_old)^2.
        decay: how the older policy follows: `on_policy`, `rising_to_three_tenths` (`trainers.forward_advantages`) or
            any function of the optimizer steps so far.
        sample_older: draw samples by the older policy, to which rho then compares. Else they are drawn by the policy
            that an epoch starts with, and rho compares to that.
        times: at which t a sample is noised in an optimizer step, by default the authors' 6 strata of the grid.
        guidance_scale: of the velocities, 1 for none. Samples have `sampling`'s: the authors take none for either.
        on_invalid: what to do about samples whose score is not valid: stop, or leave them, or their whole groups, out
            and count them.
    """

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        sampling: Sampling = Sampling(steps=14, guidance_scale=1.0),
        optimizer: Optimizer = Optimizer(),
        evaluation: Evaluation = Evaluation(),
        checkpoints: Checkpoints = Checkpoints(),
        epochs: int = 100,
        updates_per_epoch: int = 1,
        weighting: Weighting = ghuber,
        clip_range: float = 1.0,
        advantages: Advantages = unit_advantages,
        kl_coef: float = 1e-3,
        older_coef: float = 0.0,
        decay: Decay = on_policy,
        sample_older: bool = False,
        times: Times = StratifiedTimes(6, first=1, share=0.9),
        guidance_scale: float = 1.0,
        folder: str = "runs/awm",
        seed: int = 0,
        on_invalid: OnInvalid = "stop",
        log_with: tuple[TrackerName, ...] = (),
    ) -> None:
        if not clip_range > 0 or older_coef < 0:
            raise ValueError(
                f"clip_range must be positive and older_coef at least 0, got {clip_range} and {older_coef}"
            )
        self.weighting, self.clip_range, self.older_coef = weighting, clip_range, older_coef
        super().__init__(
            model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch,
            advantages, kl_coef, decay, sample_older, times, guidance_scale, folder, seed, on_invalid, log_with,
        )  # fmt: skip

    def credit(self, scores: Scores, group_ids: Int[Tensor, " b"]) -> PerSample:
        """A of each sample."""
        return self.advantages(scores.total, group_ids)

    def loss(self, noised: Noised) -> Float[Tensor, " u"]:
        """max(-A rho, -A clip(rho)), and the distances to the older policy and to the reference."""
        new, old = self._log_probs(noised)
        policy = clipped_policy_loss(new, old, noised.credit, self.clip_range)
        return policy + self.older_coef * distance(noised.velocity, older_velocity(noised)) + self.penalty(noised)

    def _log_probs(self, noised: Noised) -> tuple[PerSample, PerSample]:
        """l of the policy, and of the one that has drawn the samples."""
        new = matching_log_probs(noised.velocity, noised.target, noised.sigma, self.weighting)
        if noised.older is None or not self._older_drew():
            return new, new.detach()
        return new, matching_log_probs(noised.older, noised.target, noised.sigma, self.weighting)

    def _older_drew(self) -> bool:
        """Whether the older policy, as it is now, has drawn the present samples."""
        return self.sample_older or not self.decay_before(self.state.epoch)

    def reads_older(self, epoch: int, part: int) -> bool:
        return super().reads_older(epoch, part) and (part > 0 or self.sample_older or self.older_coef > 0)

    def watched(self) -> tuple[str, ...]:
        return (*super().watched(), "clip_fraction")

    def watch(self, noised: Noised, losses: PerSample) -> dict[str, PerSample]:
        numbers = policy_diagnostics(*self._log_probs(noised), self.clip_range)
        return super().watch(noised, losses) | {"clip_fraction": numbers["clip_fraction"]}

    def idle(self, credit: Float[Tensor, " u"]) -> bool:
        return not bool(credit.any())

    def _check(self) -> None:
        super()._check()
        if self.sample_older or not any(self.decay_before(epoch) for epoch in range(1, self.epochs + 1)):
            return
        if self.updates_per_epoch > 1:
            raise ValueError(
                "samples are drawn by the policy that an epoch starts with, and with this decay it is not kept for the "
                "ratios of later optimizer steps: set updates_per_epoch: 1, sample_older: true, or decay: "
                "trainers.forward_advantages.on_policy"
            )
        if not self.older_coef:
            raise ValueError(
                "decay says how the older policy follows, but nothing reads it: give older_coef or sample_older"
            )

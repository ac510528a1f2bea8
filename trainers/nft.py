"""DiffusionNFT: samples above their group's mean attract the velocity, those below repel it (arXiv:2509.16117).

    L = E[ r ||v* - v+||^2 + (1 - r) ||v* - v-||^2 ] / b,   v* = e - x_0 at x_t = (1 - t) x_0 + t e         (eq. 5)
    v+ = b v + (1 - b) v_old,   v- = (1 + b) v_old - b v,   r = clip(1/2 + A / (2 A_max), 0, 1)

v_old is the velocity of the policy that draws the samples, an average of the past ones. Where both policies are the
same the gradient is that of (2 r - 1) ||v* - v||^2: none for a mean sample. The authors' code takes the two errors of
x_0 instead of velocities, each over its own mean magnitude, multiplies the loss by A_max and adds a distance to the
reference; so do we.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.advantages import flow_grpo_advantages
from flowalign.models.base import Model
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
    older_velocity,
    rising_to_half,
)
from trainers.forward_steps import Noised
from trainers.forward_times import GridTimes, Times
from trainers.keeper import Checkpoints
from trainers.optim import Optimizer

Latents = Float[Tensor, "b *d"]
Mode = Callable[[Tensor], Tensor]
LEAST = 1e-5  # of an error's mean magnitude, which it is divided by


def both_signs(advantages: PerSample) -> PerSample:
    """As they are."""
    return advantages


def positive_only(advantages: PerSample) -> PerSample:
    """Those below 0 become 0: what is worse than its group's mean repels nothing."""
    return advantages.clamp(min=0)


def negative_only(advantages: PerSample) -> PerSample:
    """Those above 0 become 0."""
    return advantages.clamp(max=0)


def one_only(advantages: PerSample) -> PerSample:
    """1 for those above 0, else 0."""
    return (advantages > 0).to(advantages.dtype)


def binary(advantages: PerSample) -> PerSample:
    """The sign."""
    return advantages.sign()


def optimality(advantages: PerSample, mode: Mode, clip: float) -> PerSample:
    """r = clip(1/2 + A / (2 clip), 0, 1) of advantages clipped to [-clip, clip] and then taken by `mode`."""
    return (mode(advantages.clamp(-clip, clip)) / clip / 2 + 0.5).clamp(0, 1)


def weighted_error(velocity: Latents, target: Latents, sigma: PerSample) -> PerSample:
    """mean (x - x_0)^2 / mean |x - x_0| of x = x_t - t v; the divisor, at least 1e-5, has no gradient.

    x - x_0 = t (v* - v): it has the sample's scale, and weighs all t about alike.
    """
    off = sigma.view(-1, *(1,) * (target.ndim - 1)) * (velocity - target)
    scale = mean_of_elements(off.detach().double().abs()).clamp(min=LEAST)
    return mean_of_elements(off.square()) / scale


def nft_loss(
    velocity: Latents, older: Latents, target: Latents, sigma: PerSample, r: PerSample, beta: float
) -> PerSample:
    """[r error(v+) + (1 - r) error(v-)] / b of each sample.

    Args:
        velocity: v, with gradient. older: v_old, without. target: v*. sigma: t.
        r: in [0, 1]. beta: b > 0, of how far v+ and v- lie from v_old; the smaller, the larger the policy's own step.
    """
    attracted = weighted_error(beta * velocity + (1 - beta) * older, target, sigma)
    repelled = weighted_error((1 + beta) * older - beta * velocity, target, sigma)
    return ((r * attracted + (1 - r) * repelled) / beta).float()


class DiffusionNFT(ForwardAdvantageTrainer):
    """DiffusionNFT with a LoRA policy.

    Args:
        model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, folder, seed, log_with: as of
            `trainers.FlowGRPO`; `batch_size` is of calls with gradient, whatever the plan.
        updates_per_epoch: optimizer steps made of an epoch's samples.
        beta: b, > 0. The authors have 1, and .1 for text and for several rewards.
        adv_clip: A_max, > 0.
        mode: what is made of advantages: `both_signs`, `positive_only`, `negative_only`, `one_only` or `binary`.
        advantages: function of rewards [b] and group ids [b].
        kl_coef: of mean (v - v_ref)^2; 0 leaves the reference's calls out.
        decay: how the older policy follows: `on_policy`, `rising_to_half`, `rising_late`
            (`trainers.forward_advantages`) or any function of the optimizer steps so far.
        times: at which t a sample is noised in an optimizer step, by default the authors' 9 of 10 points of the
            rollout's grid.
        guidance_scale: of the velocities, 1 for none. Samples have `sampling`'s: the authors take none for either.
        on_invalid: what to do about samples whose score is not valid: stop, or leave them, or their whole groups, out
            and count them.
    """

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        sampling: Sampling = Sampling(guidance_scale=1.0),
        optimizer: Optimizer = Optimizer(),
        evaluation: Evaluation = Evaluation(),
        checkpoints: Checkpoints = Checkpoints(),
        epochs: int = 100,
        updates_per_epoch: int = 1,
        beta: float = 1.0,
        adv_clip: float = 5.0,
        mode: Mode = both_signs,
        advantages: Advantages = flow_grpo_advantages,
        kl_coef: float = 1e-4,
        decay: Decay = rising_to_half,
        times: Times = GridTimes(9),
        guidance_scale: float = 1.0,
        folder: str = "runs/nft",
        seed: int = 0,
        on_invalid: OnInvalid = "stop",
        log_with: tuple[TrackerName, ...] = (),
    ) -> None:
        if not beta > 0 or not adv_clip > 0:
            raise ValueError(f"beta and adv_clip must be positive, got {beta} and {adv_clip}")
        self.beta, self.adv_clip, self.mode = beta, adv_clip, mode
        super().__init__(
            model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch,
            advantages, kl_coef, decay, True, times, guidance_scale, folder, seed, on_invalid, log_with,
        )  # fmt: skip

    def credit(self, scores: Scores, group_ids: Int[Tensor, " b"]) -> PerSample:
        """r of each sample."""
        return optimality(self.advantages(scores.total, group_ids), self.mode, self.adv_clip)

    def loss(self, noised: Noised) -> Float[Tensor, " u"]:
        """A_max times `nft_loss`, and the distance to the reference."""
        policy = nft_loss(
            noised.velocity, older_velocity(noised), noised.target, noised.sigma, noised.credit, self.beta
        )
        return self.adv_clip * policy + self.penalty(noised)

    def idle(self, credit: Float[Tensor, " u"]) -> bool:
        return bool((credit == 0.5).all())

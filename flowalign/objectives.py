"""Losses that two or more trainers share: pure functions of tensors, one value per sample, not yet averaged.

The caller divides once, by the number of samples times steps of the whole update over all processes; so a result does
not depend on how the update is split.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

PerSample = Float[Tensor, " m"]
Elements = Float[Tensor, "m *d"]


def clipped_surrogate(ratio: PerSample, advantages: PerSample, clip_range: float) -> PerSample:
    """PPO's loss, max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range)) (arXiv:1707.06347, eq. 7, negated).

    Gradient stops where the ratio has left the range on the side its advantage asked for: above it where A > 0, below
    it where A < 0, and on no other side.

    Args:
        ratio: probability under the policy over that under the old one, > 0.
        advantages: A; no gradient is taken through them.
        clip_range: half width of the range around 1, > 0; 1e-4 in Flow-GRPO, for log-probs averaged over elements.
    """
    advantages = advantages.detach()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def clipped_policy_loss(
    log_probs: PerSample, old_log_probs: PerSample, advantages: PerSample, clip_range: float
) -> PerSample:
    """`clipped_surrogate` of ratio = exp(log_probs - old_log_probs); Flow-GRPO (arXiv:2505.05470, eq. 4) at one step.

    Args:
        log_probs: of the stored next latents under the policy, with gradient.
        old_log_probs: of the same latents under the policy that drew them, in the same reduction; no gradient.
        advantages, clip_range: as in `clipped_surrogate`.
    """
    return clipped_surrogate((log_probs - old_log_probs.detach()).exp(), advantages, clip_range)


def guard_ratio(
    log_probs: PerSample,
    old_log_probs: PerSample,
    mean: Elements,
    old_mean: Elements,
    std: float | PerSample,
) -> PerSample:
    """GRPO-Guard's ratio, which has no bias below 1 and one scale over all steps.

        log ratio = std (log p - log p_old) + mse / (2 std) = average of eps (mean - old_mean)

    with eps the noise that was drawn, x' = old_mean + std eps, and mse the average of (mean - old_mean)^2. The second
    form is why: the plain log-ratio is this over std, less mse / (2 std^2). GRPO-Guard (arXiv:2510.22319). Presumes
    log-probs averaged over elements.

    Args:
        log_probs, old_log_probs: as in `clipped_policy_loss`.
        mean, old_mean: of the step, under the policy (with gradient) and under the old one (without).
        std: of the step, > 0.
    """
    mse = (mean - old_mean.detach()).square().flatten(1).mean(1)
    return ((log_probs - old_log_probs.detach()) * std + mse / (2 * std)).exp()


def policy_diagnostics(log_probs: PerSample, old_log_probs: PerSample, clip_range: float) -> dict[str, PerSample]:
    """How far an update has moved the policy, for each sample and without gradient.

    log_ratio; clip_above and clip_below, 1 where the ratio is outside the clip range on that side, and clip_fraction,
    their sum; approx_kl, half the squared log-ratio (in the log-probs' reduction).

    Args:
        log_probs, old_log_probs, clip_range: as in `clipped_policy_loss`.
    """
    log_ratio = (log_probs - old_log_probs).detach()
    ratio = log_ratio.exp()
    above, below = (ratio - 1 > clip_range).float(), (1 - ratio > clip_range).float()
    return {
        "log_ratio": log_ratio,
        "clip_fraction": above + below,
        "clip_above": above,
        "clip_below": below,
        "approx_kl": log_ratio.square() / 2,
    }

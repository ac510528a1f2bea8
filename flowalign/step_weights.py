"""How much each trained step of a rollout weighs in a policy gradient: its advantages are multiplied by its weight.

A policy gradient's steps differ in noise and length, and so in how far their noise can move a reward and in how large a
gradient they have. Regularisers keep their own strength. The functions share their arguments:

    steps: (transition, interval) of each trained step; rows: how many rows of the epoch are trained at each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from flowalign.records import Interval
from flowalign.transitions import Transition

Noisy = tuple[Transition, Interval]
StepWeights = Callable[[Sequence[Noisy], Sequence[int]], Sequence[float]]


def spread_of(transition: Transition, interval: Interval) -> tuple[float, float]:
    """A step's std, and by how many stds its mean moves where the velocity moves by 1 (inf without noise)."""
    mean, std = transition(torch.zeros(1, 1), torch.ones(1, 1), interval)
    return std, abs(float(mean)) / std if std > 0 else math.inf


def _mean_one(values: Sequence[float], rows: Sequence[int]) -> list[float]:
    mean = sum(value * count for value, count in zip(values, rows, strict=True)) / sum(rows)
    return [value / mean for value in values]


def noise_weights(steps: Sequence[Noisy], rows: Sequence[int]) -> list[float]:
    """The std of each step's noise, scaled to a mean of 1: what the noise can explore is what it weighs.

    TempFlow-GRPO (arXiv:2508.04324), whose weight is Norm(sigma_t sqrt(-dt)).
    """
    return _mean_one([spread_of(*step)[0] for step in steps], rows)


def inverse_dt(steps: Sequence[Noisy], rows: Sequence[int]) -> list[float]:
    """1 / |dt|: what undoes the length of the step in the gradient of GRPO-Guard's ratio (arXiv:2510.22319).

    That gradient is eps d mean / d v, and of Flow-SDE d mean / d v = (1 + a^2 / 2) dt away from sigma 1. Not scaled, as
    in the authors' code.
    """
    return [1 / -interval.dt for _, interval in steps]


def even_means(steps: Sequence[Noisy], rows: Sequence[int]) -> list[float]:
    """1 / |d mean / d v|, scaled to a mean of 1: gradients of GRPO-Guard's ratio are alike whatever the transition."""
    return _mean_one([1 / (std * leverage) for std, leverage in (spread_of(*step) for step in steps)], rows)


def even_gradients(steps: Sequence[Noisy], rows: Sequence[int]) -> list[float]:
    """1 / c scaled to a mean of 1, with c = |d mean / d v| / std, the size of the plain ratio's gradient.

    Flash-GRPO's temporal gradient rectification (arXiv:2605.15980); of an SDE with diffusion coefficient g

        c = sqrt(-dt) / g + g sqrt(-dt) (1 - s) / (2 s)
    """
    return _mean_one([1 / spread_of(*step)[1] for step in steps], rows)

"""Optimizers of noises: every row of a batch is a problem of its own, with its own clip and its own moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Noise = Float[Tensor, "b *d"]
Moments = dict[str, Tensor]  # a row for each noise


def clipped(gradient: Noise, limit: float) -> Noise:
    """Each row's gradient, shortened to the norm `limit` where it is longer, as torch's clip_grad_norm_ does it."""
    norm = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.ndim - 1))
    return gradient * (limit / (norm + 1e-6)).clamp(max=1.0)


def nesterov_step(
    noise: Noise, gradient: Noise, momentum: Noise, learning_rate: float, decay: float
) -> tuple[Noise, Noise]:
    """m' = decay m + g,  e' = e - learning_rate (g + decay m'): torch's SGD with Nesterov momentum; returns e', m'."""
    momentum = decay * momentum + gradient
    return noise - learning_rate * (gradient + decay * momentum), momentum


@runtime_checkable
class NoiseOptimizer(Protocol):
    """A rule that moves noises against gradients. `moments` are its own, a row for each noise."""

    def moments(self, noise: Noise) -> Moments: ...

    def step(self, noise: Noise, gradient: Noise, moments: Moments) -> tuple[Noise, Moments]: ...


@dataclass(frozen=True)
class Nesterov:
    """See `nesterov_step`. At a gradient of norm .1 or less, a step of rate 5 is at most .95, and 5 in the long run."""

    learning_rate: float = 5.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"learning_rate must be positive and momentum in [0, 1), got {self.learning_rate} and {self.momentum}"
            )

    def moments(self, noise: Noise) -> Moments:
        return {"momentum": torch.zeros_like(noise)}

    def step(self, noise: Noise, gradient: Noise, moments: Moments) -> tuple[Noise, Moments]:
        noise, momentum = nesterov_step(noise, gradient, moments["momentum"], self.learning_rate, self.momentum)
        return noise, {"momentum": momentum}


@dataclass(frozen=True)
class Adam:
    """Adam (arXiv:1412.6980) with the authors' eps of 1e-2, below which a number of the gradient counts for less."""

    learning_rate: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-2

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or not all(0 <= beta < 1 for beta in self.betas) or not self.eps > 0:
            raise ValueError(
                f"learning_rate and eps must be positive and betas in [0, 1), got {self.learning_rate}, {self.eps} "
                f"and {self.betas}"
            )

    def moments(self, noise: Noise) -> Moments:
        zero = torch.zeros_like(noise)
        return {"first": zero, "second": zero.clone(), "steps": torch.zeros(len(noise))}

    def step(self, noise: Noise, gradient: Noise, moments: Moments) -> tuple[Noise, Moments]:
        (one, two), steps = self.betas, moments["steps"] + 1
        first = one * moments["first"] + (1 - one) * gradient
        second = two * moments["second"] + (1 - two) * gradient.square()
        share = steps.view(-1, *[1] * (noise.ndim - 1))
        root = (second / (1 - two**share)).sqrt() + self.eps
        noise = noise - self.learning_rate * (first / (1 - one**share)) / root
        return noise, {"first": first, "second": second, "steps": steps}

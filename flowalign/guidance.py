"""A drift towards where a reward grows: what is added to the mean of a rollout's stochastic steps.

    x' = mean + scale |dt| grad_x r(x) + std eps,      r(x) = reward of the denoised latents x - sigma v(x, sigma)

Euphonium (arXiv:2602.04928). Its sampler is the SDE whose drift gains (g^2 / (2 beta)) grad r, g being the noise: with
DanceSDE(g) scale is g^2 / (2 beta). Time runs down and |dt| is the length of the step, so that a positive scale raises
the reward. The density of the step stays that of `mean` alone, at the rollout and in its replay: what guidance has
added becomes part of what was drawn, and a policy that learns from it needs no guidance later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.models.base import Model
from flowalign.records import Condition, Interval

Latents = Float[Tensor, "b *d"]
Values = Float[Tensor, " b"]
Velocity = Callable[[Tensor], Tensor]
Reward = Callable[[Tensor], Tensor]  # of denoised latents [b, *d], one number for each, each of its own row alone


@dataclass(frozen=True)
class Flow:
    """A model's guided velocity at a sigma, as a function of latents; and gradients through it."""

    model: Model
    sigma: float
    condition: Condition
    guidance_scale: float

    def __call__(self, latents: Tensor) -> Tensor:
        scale = self.guidance_scale
        return self.model.velocity_split(latents, self.sigma, self.condition, scale, unconditional_grad=True)

    def slope(self, total: Tensor, at: Tensor) -> Tensor:
        """Of a number, at latents that the velocity was had at."""
        return self.model.slope(total, at)


@dataclass(frozen=True)
class Felt:
    """The guided velocity at some latents, the reward of what it denoises them to, and that reward's gradient."""

    velocity: Latents
    values: Values
    gradient: Latents


@runtime_checkable
class Slope(Protocol):
    """How the gradient of r(x) is had."""

    def __call__(
        self, velocity: Velocity, reward: Reward, latents: Tensor, sigma: float, signs: Callable[[int], Tensor]
    ) -> Felt: ...

    def beside(self, rows: int) -> Rows:
        """Network rows of it, beside those of the velocity that any step needs, where that takes so many."""
        ...

    def differentiates(self) -> bool:
        """Whether the reward needs a gradient."""
        ...


@dataclass(frozen=True)
class Backpropagation:
    """The exact gradient, back through reward, decoder and, where `network`, the network too.

    network False holds the velocity: x moves the denoised latents one to one, which costs no backward pass of the
    network. Near the data the two agree; near the noise the held one is far too long (for data N(m, s2) the exact one
    is shorter by the factor s2 (1 - sigma) / (s2 (1 - sigma)^2 + sigma^2)).
    """

    network: bool = True

    def __call__(
        self, velocity: Velocity, reward: Reward, latents: Tensor, sigma: float, signs: Callable[[int], Tensor]
    ) -> Felt:
        x = latents.detach().requires_grad_()
        with torch.set_grad_enabled(self.network):
            flow = velocity(x)
        with torch.enable_grad():
            values = reward(x - sigma * flow)
            slope = velocity.slope if self.network and isinstance(velocity, Flow) else _slope
            gradient = slope(values.sum(), x)
        return Felt(flow.detach(), values.detach(), gradient)

    def beside(self, rows: int) -> Rows:
        return Rows(-rows, rows) if self.network else Rows()

    def differentiates(self) -> bool:
        return True


def _slope(total: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(total, at)[0]


@dataclass(frozen=True)
class SPSA:
    """Simultaneous perturbation, for rewards without a gradient: two scores for each of `draws` random directions.

        g = average of  (r(x + size u) - r(x - size u)) / (2 size)  u,      u = +1 or -1 in each element

    Unbiased where r is quadratic; its noise grows with the number of elements. Euphonium's code has it with normal u
    and the velocity held, as here by default (`network` as of `Backpropagation`; with it each score takes a call).
    """

    size: float = 0.01
    draws: int = 1
    network: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.size < math.inf or self.draws < 1:
            raise ValueError(f"SPSA needs a positive size and at least 1 draw, got {self.size} and {self.draws}")

    def __call__(
        self, velocity: Velocity, reward: Reward, latents: Tensor, sigma: float, signs: Callable[[int], Tensor]
    ) -> Felt:
        flow = velocity(latents)
        gradient = torch.zeros_like(latents)
        for number in range(self.draws):
            u = signs(number).to(latents.device)
            ahead, behind = (self._value(velocity, reward, latents + at, flow, sigma) for at in self._apart(u))
            slope = (ahead - behind) / (2 * self.size)
            gradient += slope.view(-1, *(1,) * (latents.ndim - 1)) * u / self.draws
        return Felt(flow, reward(latents - sigma * flow), gradient)

    def _apart(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.size * u, -self.size * u

    def _value(self, velocity: Velocity, reward: Reward, x: Tensor, held: Tensor, sigma: float) -> Tensor:
        return reward(x - sigma * (velocity(x) if self.network else held))

    def beside(self, rows: int) -> Rows:
        return Rows(2 * self.draws * rows) if self.network else Rows()

    def differentiates(self) -> bool:
        return False


@dataclass(frozen=True)
class Guided:
    """Which steps of a rollout are guided, and how far.

    steps: stochastic ones. scale: of the gradient, >= 0; with 0 rewards are looked at and nothing moves.
    times_dt: whether the step's length multiplies it too, as a drift's does.
    slope: `Backpropagation` or `SPSA`.
    """

    steps: tuple[int, ...] = ()
    scale: float = 0.01
    times_dt: bool = True
    slope: Slope = Backpropagation()

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"Guided.scale must be at least 0 and finite, got {self.scale}: it raises the reward")

    def beside(self, rows: int) -> Rows:
        """Network rows of a guided step, beside those of its velocity, where that takes so many."""
        return self.slope.beside(rows) if self.scale else Rows()

    def length(self, interval: Interval) -> float:
        """What the gradient is multiplied by at a step."""
        return self.scale * (-interval.dt if self.times_dt else 1.0)


@dataclass(frozen=True)
class Push:
    """What guidance does at a step: the velocity that the step is made with, what is added to its mean, r(x).

    Where a reward or its gradient is not finite nothing is added, and the value is nan.
    """

    velocity: Latents
    push: Latents | None
    values: Values


@dataclass(frozen=True)
class Guide:
    """Guidance of the rollout of certain rows.

    reward: r of the rows of a step, of its number and their denoised latents [b, *d].
    signs: random signs [b, *d] of a step's number and a draw's, keyed.
    """

    settings: Guided
    reward: Callable[[int, Tensor], Tensor]
    signs: Callable[[int, int], Tensor]

    def push(
        self, model: Model, latents: Latents, interval: Interval, condition: Condition, guidance_scale: float
    ) -> Push:
        """Of a guided step at these latents; the velocity is that of `Model.velocity_split`, to the last bit."""

        def reward(denoised: Tensor) -> Tensor:
            return self.reward(interval.index, denoised)

        def signs(number: int) -> Tensor:
            return self.signs(interval.index, number)

        settings, sigma = self.settings, interval.sigma
        velocity = Flow(model, sigma, condition, guidance_scale)
        with model.meter.phase("guidance"):
            if not settings.scale:
                flow = velocity(latents)
                return Push(flow, None, reward(latents - sigma * flow))
            felt = settings.slope(velocity, reward, latents, sigma, signs)
        known = felt.values.isfinite() & felt.gradient.flatten(1).isfinite().all(1)
        drift = settings.length(interval) * felt.gradient
        drift = drift.where(known.view(-1, *(1,) * (latents.ndim - 1)), 0.0)
        return Push(felt.velocity, drift, felt.values.where(known, torch.nan))

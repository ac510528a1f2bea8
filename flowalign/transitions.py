"""One sampling step as a Gaussian: (latents, velocity, sigma, sigma_next) -> (mean, std). Draw, log-prob and KL follow.

Rectified flow: x = (1 - sigma) x_0 + sigma eps, velocity v = eps - x_0, dt = sigma_next - sigma < 0, and so
denoised x_0 = x - sigma v, noise eps = x + (1 - sigma) v, score = -eps / sigma. `s` and `s'` below are sigma and
sigma_next. The arguments all rules share: latents x [b, ...] at sigma; velocity v at (x, sigma), same shape; sigma in
(0, 1]; sigma_next in [0, sigma). Which setting is which paper:

    FlowSDE(0.7)   Flow-GRPO  arXiv:2505.05470     Memoryless()  Adjoint Matching  arXiv:2409.08861
    DanceSDE(0.3)  DanceGRPO  arXiv:2505.07818     CPS(0.7)      Flow-CPS          arXiv:2509.05952
    TableSDE(...)  DenseGRPO  arXiv:2601.20218     DDIM(1.0)     DDIM, DDPM        arXiv:2010.02502
    Renoise()      LCM multistep sampling          arXiv:2310.04378

Maths is done in float32 at least (float64 stays). The std of CPS, Renoise and DDIM is 0 where sigma_next is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.records import Interval

Batch = Float[Tensor, "b *d"]
Gaussian = tuple[Float[Tensor, "b *d"], float]
Reduce = Callable[[Tensor], Tensor]


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def ode(latents: Batch, velocity: Batch, sigma: float, sigma_next: float) -> Gaussian:
    """The Euler step of the flow: mean = x + v dt, std = 0."""
    return _float(latents) + _float(velocity) * (sigma_next - sigma), 0.0


def table_sde(latents: Batch, velocity: Batch, sigma: float, sigma_next: float, noise: float) -> Gaussian:
    """One Euler-Maruyama step of the SDE with diffusion coefficient g that shares the flow's marginals.

        dx   = [v - g^2/2 score] dt + g dW
        mean = x (1 + g^2 dt / (2 s)) + v (1 + g^2 (1 - s) / (2 s)) dt,   std = g sqrt(-dt)

    DenseGRPO (arXiv:2601.20218, eq. 11), where g is a table over the steps. The marginals are the flow's in the limit
    of many steps only.

    Args:
        noise: g of this step, >= 0; 0 is the Euler step of the flow.
    """
    dt = sigma_next - sigma
    correction = noise**2 / (2 * sigma)
    mean = _float(latents) * (1 + correction * dt) + _float(velocity) * ((1 + correction * (1 - sigma)) * dt)
    return mean, noise * math.sqrt(-dt)


def flow_sde(
    latents: Batch, velocity: Batch, sigma: float, sigma_next: float, noise_level: float, sigma_max: float
) -> Gaussian:
    """Flow-GRPO's SDE step: `table_sde` with g = noise_level sqrt(s / (1 - s)).

    Flow-GRPO (arXiv:2505.05470). At s = 1 g is infinite; as in the authors' code the s under the root's fraction bar
    is then sigma_max, so that the first step of any grid from 1 has std = noise_level. On ten steps the marginals are
    visibly wider than the flow's.

    Args:
        noise_level: a, >= 0; 0 is the Euler step of the flow.
        sigma_max: the grid's second value, in [0, 1).
    """
    noise = noise_level * math.sqrt(sigma / (1 - (sigma_max if sigma >= 1 else sigma)))
    return table_sde(latents, velocity, sigma, sigma_next, noise)


def dance_sde(latents: Batch, velocity: Batch, sigma: float, sigma_next: float, noise_level: float) -> Gaussian:
    """DanceGRPO's SDE step (arXiv:2505.07818): `table_sde` with the same g = noise_level >= 0 at every step."""
    return table_sde(latents, velocity, sigma, sigma_next, noise_level)


def memoryless(latents: Batch, velocity: Batch, sigma: float, sigma_next: float, sigma_max: float) -> Gaussian:
    """The SDE whose end forgets its start, g = sqrt(2 s / (1 - s)): `flow_sde` at noise_level sqrt(2).

    Adjoint Matching (arXiv:2409.08861). Of the Flow-SDE family only this one makes what is trained under the SDE hold
    for ODE sampling too.
    """
    return flow_sde(latents, velocity, sigma, sigma_next, math.sqrt(2), sigma_max)


def _recombine(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float, std: float) -> Gaussian:
    """(1 - s') denoised + sqrt(s'^2 - std^2) noise: fresh noise of `std` replaces as much of the predicted noise."""
    x, v = _float(latents), _float(velocity)
    kept = math.sqrt(max(sigma_next**2 - std**2, 0.0))
    return (1 - sigma_next) * (x - sigma * v) + kept * (x + (1 - sigma) * v), std


def cps(latents: Batch, velocity: Batch, sigma: float, sigma_next: float, noise_level: float) -> Gaussian:
    """Coefficients-preserving step: the latents carry exactly s' of noise after it.

        std = s' sin(a pi / 2),   mean = (1 - s') denoised + s' cos(a pi / 2) noise

    Flow-CPS (arXiv:2509.05952). Not a discretised SDE: it is exact for one image, and its samples' variance falls short
    of the data's at any number of steps.

    Args:
        noise_level: a, in [0, 1]; 0 is the Euler step of the flow, 1 is `renoise`.
    """
    return _recombine(latents, velocity, sigma, sigma_next, sigma_next * math.sin(noise_level * math.pi / 2))


def renoise(latents: Batch, velocity: Batch, sigma: float, sigma_next: float) -> Gaussian:
    """Denoise, then noise afresh: mean = (1 - s') denoised, std = s'. LCM's multistep sampling (arXiv:2310.04378)."""
    return _recombine(latents, velocity, sigma, sigma_next, sigma_next)


def ddim(latents: Batch, velocity: Batch, sigma: float, sigma_next: float, eta: float) -> Gaussian:
    """DDIM's step (arXiv:2010.02502, eq. 12 and 16) in flow coordinates.

        std = eta s' sqrt(1 - (r' / r)^2),  r = s / (1 - s);   mean = (1 - s') denoised + sqrt(s'^2 - std^2) noise

    r is the noise-to-signal ratio, which the change from an (alpha, s) schedule to flow coordinates leaves alone.

    Args:
        eta: in [0, 1]; 0 is the Euler step of the flow, 1 is DDPM's ancestral step.
    """
    ratio = 0.0 if sigma_next == 0 else sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))
    return _recombine(latents, velocity, sigma, sigma_next, eta * sigma_next * math.sqrt(1 - ratio**2))


@runtime_checkable
class Transition(Protocol):
    """A rule for one step of a grid. `latents` and `velocity` are [b, ...], and so is the mean; std is one number."""

    def __call__(self, latents: Tensor, velocity: Tensor, interval: Interval) -> Gaussian: ...


def _check_noise(name: str, value: float, most: float = math.inf) -> None:
    if not 0 < value <= most:
        raise ValueError(f"{name} must be in (0, {most}], got {value}; a step without noise is ODE()")


@dataclass(frozen=True)
class ODE:
    """See `ode`."""

    def __call__(self, latents: Tensor, velocity: Tensor, interval: Interval) -> Gaussian:
        return ode(latents, velocity, interval.sigma, interval.sigma_next)


@dataclass(frozen=True)
class FlowSDE:
    """See `flow_sde`."""

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        _check_noise("FlowSDE.noise_level", self.noise_level)

    def __call__(self, latents: Tensor, velocity: Tensor, interval: Interval) -> Gaussian:
        s, s_next = interval.sigma, interval.sigma_next
        return flow_sde(latents, velocity, s, s_next, self.noise_level, interval.sigma_max)


@dataclass(frozen=True)
class DanceSDE:
    """See `dance_sde`."""

    noise_level: float = 0.3

    def __post_init__(self) -> None:
        _check_noise("DanceSDE.noise_level", self.noise_level)

    def __call__(self, latents: Tensor, velocity: Tensor, interval: Interval) -> Gaussian:
        return dance_sde(latents, velocity, interval.sigma, interval.sigma_next, self.noise_level)


@dataclass(frozen=True)
class TableSDE:
    """See `table_sde`; `table[i]` is the g of step i."""

    table: tuple[float, ...]

    def __post_init__(self) -> None:
        for i, noise in enumerate(self.table):
            _check_noise(f"TableSDE.table[{i}]", noise)

    def __call__(self, latents: Tensor, velocity: Tensor, interval: Interval) -> Gaussian:
        if interval.index >= len(self.table):
            raise ValueError(f"TableSDE.table has {len(self.table)} values and none for step {interval.index}")
        return table_sde(latents, velocity, interval.sigma, interval.sigma_next, self.table[interval.index])


@dataclass(frozen=True)
class Memoryless:
    """See `memoryless`."""

    def __call__(self, latents: Tensor, velocity: Tensor, interval: Interval) -> Gaussian:
        return memoryless(latents, velocity, interval.sigma, interval.sigma_next, interval.sigma_max)


@dataclass(frozen=True)
class CPS:
    """See `cps`."""

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        _check_noise("CPS.noise_level", self.noise_level, most=1.0)

    def __call__(self, latents: Tensor, velocity: Tensor, interval: Interval) -> Gaussian:
        return cps(latents, velocity, interval.sigma, interval.sigma_next, self.noise_level)


@dataclass(frozen=True)
class Renoise:
    """See `renoise`."""

    def __call__(self, latents: Tensor, velocity: Tensor, interval: Interval) -> Gaussian:
        return renoise(latents, velocity, interval.sigma, interval.sigma_next)


@dataclass(frozen=True)
class DDIM:
    """See `ddim`."""

    eta: float = 1.0

    def __post_init__(self) -> None:
        _check_noise("DDIM.eta", self.eta, most=1.0)

    def __call__(self, latents: Tensor, velocity: Tensor, interval: Interval) -> Gaussian:
        return ddim(latents, velocity, interval.sigma, interval.sigma_next, self.eta)


def mean_of_elements(values: Batch) -> Float[Tensor, " b"]:
    """Average over the elements of each sample; published clip ranges presume it and shift with resolution."""
    return values.flatten(1).mean(1)


def sum_of_elements(values: Batch) -> Float[Tensor, " b"]:
    """Sum over the elements of each sample: the exact log-probability, or KL, of the whole latent."""
    return values.flatten(1).sum(1)


def _check_std(std: float) -> None:
    if not std > 0:
        raise ValueError(f"std is {std}: a step without noise (ODE, or CPS/Renoise/DDIM to sigma 0) has no density")


def gaussian_log_prob(x: Batch, mean: Batch, std: float, reduce: Reduce = mean_of_elements) -> Float[Tensor, " b"]:
    """log N(x; mean, std^2) = -(x - mean)^2 / (2 std^2) - log std - log(2 pi) / 2 of each element, reduced.

    x is a constant here: gradient flows through the mean only, as a policy gradient needs. Raises ValueError at std 0.
    """
    _check_std(std)
    squared = (_float(x).detach() - _float(mean)).square()
    return reduce(-squared / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2)


def squared_error_log_prob(x: Batch, mean: Batch, std: float, reduce: Reduce = mean_of_elements) -> Float[Tensor, " b"]:
    """-(x - mean)^2, reduced: what Flow-CPS's authors take for a log-prob. Raises ValueError at std 0 too."""
    _check_std(std)
    return reduce(-(_float(x).detach() - _float(mean)).square())


def exact_kl(
    mean: Batch, ref_mean: Batch, velocity: Batch, ref_velocity: Batch, std: float, interval: Interval, reduce: Reduce
) -> Float[Tensor, " b"]:
    """KL between two policies' steps of the same std: (mean - ref_mean)^2 / (2 std^2). Raises ValueError at std 0.

    All KL functions share these arguments and differ in what they read; a published beta goes with its authors' one.
    """
    _check_std(std)
    return reduce((_float(mean) - _float(ref_mean)).square() / (2 * std**2))


def flow_grpo_kl(
    mean: Batch, ref_mean: Batch, velocity: Batch, ref_velocity: Batch, std: float, interval: Interval, reduce: Reduce
) -> Float[Tensor, " b"]:
    """Flow-GRPO's code for SDE steps: the std without its sqrt(-dt), so |dt| times `exact_kl`, which the paper has.

    For CPS, whose std has no sqrt(-dt), their code's KL is `exact_kl`; trainers refuse this one there.
    """
    return -interval.dt * exact_kl(mean, ref_mean, velocity, ref_velocity, std, interval, reduce)


def mean_mse_kl(
    mean: Batch, ref_mean: Batch, velocity: Batch, ref_velocity: Batch, std: float, interval: Interval, reduce: Reduce
) -> Float[Tensor, " b"]:
    """Flow-Factory's "x-based" KL: (mean - ref_mean)^2, whatever the variance."""
    return reduce((_float(mean) - _float(ref_mean)).square())


def velocity_mse_kl(
    mean: Batch, ref_mean: Batch, velocity: Batch, ref_velocity: Batch, std: float, interval: Interval, reduce: Reduce
) -> Float[Tensor, " b"]:
    """Flow-Factory's "v-based" KL: (velocity - ref_velocity)^2, whatever the step and the variance."""
    return reduce((_float(velocity) - _float(ref_velocity)).square())

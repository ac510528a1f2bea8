"""Divergences between two policies' steps beside the KLs of `flowalign.transitions`, with the same arguments."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from flowalign.records import Interval
from flowalign.transitions import Batch, Reduce, exact_kl


def chi_squared(
    mean: Batch, ref_mean: Batch, velocity: Batch, ref_velocity: Batch, std: float, interval: Interval, reduce: Reduce
) -> Float[Tensor, " b"]:
    """chi^2 between two policies' steps of the same std: exp((mean - ref_mean)^2 / std^2) - 1, twice the KL near 0.

    Exact of Gaussians where `reduce` sums; with the mean over elements the exponent is the mean, as the log-prob is.
    Far from the reference it grows exponentially, in its gradient too, which is what bounds occupancies (correlated
    proxies, arXiv:2403.03185): a sum over a latent's elements overflows float32 at a KL of 44. Raises ValueError at
    std 0.
    """
    return (2 * exact_kl(mean, ref_mean, velocity, ref_velocity, std, interval, reduce)).expm1()

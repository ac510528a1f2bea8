"""The loss that a network was trained with before, of real media: it holds what a reward's gradient would spoil."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from flowalign.differentiate import velocity_at
from flowalign.models.base import Latents, Model, Sigmas
from flowalign.records import Condition
from flowalign.rollout import Policy
from flowalign.transitions import mean_of_elements


def noised_at(clean: Latents, noise: Latents, sigmas: Sigmas) -> Latents:
    """x_sigma = (1 - sigma) x_0 + sigma e, each row at a sigma of its own."""
    column = column_of(sigmas, clean)
    return (1 - column) * clean + column * noise.to(clean.device)


def column_of(sigmas: Sigmas, like: Latents) -> Float[Tensor, b * ones]:
    """Sigmas beside latents."""
    return sigmas.to(like.device, like.dtype).view(-1, *(1,) * (like.ndim - 1))


def pretraining_loss(
    model: Model, clean: Latents, noise: Latents, sigmas: Sigmas, condition: Condition, recompute: bool
) -> Float[Tensor, " b"]:
    """w(sigma) mean |v(x_sigma, sigma) - (e - x_0)|^2 of each row, without guidance.

    Args:
        clean: latents of real media. sigmas: one for each, in double precision; w is `Model.training_weights`, with
            which an eps model's is |eps(x) - e|^2.
        recompute: as of `velocity_at`.
    """
    noise = noise.to(clean.device)
    velocity = velocity_at(model, noised_at(clean, noise, sigmas), sigmas, condition, Policy(), recompute)
    errors = mean_of_elements((velocity - (noise - clean)).square())
    return model.training_weights(sigmas).to(errors) * errors

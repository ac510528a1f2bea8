"""What diffusion models on a table of alphas share: grids, their ends, and predictions as velocities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowalign.models.alpha_table import alpha_table, grid, norm, starts_scaled
from flowalign.models.base import Latents, Sigma, Sigmas
from flowalign.models.pipeline import PipelineModel
from flowalign.records import Condition

FIRST_ORDER = ("DDIMScheduler", "EulerDiscreteScheduler", "LCMScheduler")
ADDS_NOISE = ("DDPMScheduler", "EulerAncestralDiscreteScheduler")


class AlphaModel(PipelineModel):
    """A pipeline whose network predicts eps, v or x_0 of x = alpha x_0 + s eps; arguments are `PipelineModel`'s.

    Latents, sigmas and velocities are rectified flow's (`flowalign.models.alpha_table`). Under an LCMScheduler the
    prediction is the consistency function (arXiv:2310.04378, eq. 9)

        x_0 = c_skip x + c_out x_0_hat,   c_skip = d^2 / ((c t)^2 + d^2),   c_out = c t / sqrt((c t)^2 + d^2)

    with d = 0.5 and c its timestep_scaling; the transition `Renoise` is then LCM's own step.

    Raises: ValueError for `grid`, which is flow-matching models', and where an eps model is asked at alpha = 0.
    """

    def prepare(self) -> None:
        if self.grid is not None:
            raise ValueError(f"grid is for flow-matching models; {type(self.pipeline).__name__} has a table of alphas")
        self.table, self.config = alpha_table(self.pipeline.scheduler), self.pipeline.scheduler.config
        self.consistent = type(self.pipeline.scheduler).__name__ == "LCMScheduler"

    @property
    def denoiser(self) -> Any:
        """The network that predicts; the policy need not be on it."""
        return self.module

    def default_size(self) -> int:
        size = self.denoiser.config.sample_size
        return int((size if isinstance(size, int) else size[0]) * self.pipeline.vae_scale_factor)

    def latents_of(self, height: int, width: int) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return self.denoiser.config.in_channels, height // factor, width // factor

    def sigmas(self, steps: int) -> list[float]:
        return grid(self.pipeline.scheduler, self.table, steps)

    def train_sigmas(self) -> list[float]:
        return [float(sigma) for sigma in self.table.sigmas[::-1]]

    def training_weights(self, sigmas: Sigmas) -> Sigmas:
        """(1 - sigma)^2 of an eps model, sigma^2 of one of x_0, and of a v model their sum: errors of what it predicts.

        With an eps that is off by d, x_0 is off by -(s / alpha) d, and so the velocity by d / (1 - sigma).
        """
        if self.config.prediction_type == "epsilon":
            return (1 - sigmas).square()
        if self.config.prediction_type == "v_prediction":
            return (1 - sigmas).square() + sigmas.square()
        return sigmas.square()

    def start(self, noise: Latents, sigma: float, condition: Condition | None = None) -> Latents:
        return noise * (sigma if starts_scaled(self.pipeline.scheduler) else norm(sigma))

    def finish(self, latents: Latents, sigma: float) -> Latents:
        return latents / norm(sigma)

    def scheduler_note(self) -> str | None:
        shipped = type(self.pipeline.scheduler).__name__
        if shipped in FIRST_ORDER:
            return None
        if shipped in ADDS_NOISE:
            return f"the pipeline ships {shipped}, which adds noise; FlowAlign evaluates by Euler steps without it"
        return (
            f"the pipeline ships {shipped}, of higher order; FlowAlign samples by DDIM steps on its spacing, which "
            "takes more steps for the same detail"
        )

    def velocity_of(self, made: Tensor, latents: Latents, sigma: Sigma) -> Latents:
        """eps - x_0, from what the network predicted in float32 at the timestep of a sigma and x = latents / norm."""
        x, time = latents / norm(sigma), self.table.timestep(sigma)
        alpha, s = (1 - sigma) / norm(sigma), sigma / norm(sigma)
        if self.config.prediction_type == "epsilon":
            if torch.as_tensor(alpha == 0).any():
                raise ValueError("an eps model says nothing at alpha = 0, where its latents are pure noise")
            denoised, noise = (x - s * made) / alpha, made
        elif self.config.prediction_type == "v_prediction":
            denoised, noise = alpha * x - s * made, alpha * made + s * x
        else:
            denoised, noise = made, (x - alpha * made) / s
        if not self.consistent:
            return noise - denoised
        scaled, width = time * self.config.timestep_scaling, 0.5
        skip, out = width**2 / (scaled**2 + width**2), scaled / (scaled**2 + width**2) ** 0.5
        return (latents - (skip * x + out * denoised)) / sigma

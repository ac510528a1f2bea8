"""Diffusion models on a table of alphas, as rectified flow: the sigmas of their timesteps, and grids to sample on.

A latent of the model is x = alpha x_0 + s eps with alpha^2 + s^2 = 1. The same latent as rectified flow is

    x_flow = x / (alpha + s),   sigma = s / (alpha + s),   velocity = eps - x_0

with 1 / (alpha + s) = sqrt((1 - sigma)^2 + sigma^2), so that a DDIM step (arXiv:2010.02502, eta = 0) is the Euler step
from sigma to sigma_next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from flowalign.models.base import Sigma

EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
LARGEST = 2.0**12  # s / alpha where alpha is 0, as diffusers' EulerDiscreteScheduler has it


def norm(sigma: Sigma) -> Sigma:
    """1 / (alpha + s): a model's latent times this is the flow's."""
    if isinstance(sigma, Tensor):
        return torch.hypot(1 - sigma, sigma)
    return math.hypot(1 - sigma, sigma)


@dataclass(frozen=True)
class AlphaTable:
    """sigmas: of rectified flow, for the timesteps 0 ... len - 1 of a model, rising."""

    sigmas: np.ndarray

    def timestep(self, sigma: Sigma) -> Sigma:
        """Where in the table a sigma lies; between two of its sigmas by the logarithm of s / alpha.

        A whole number where the sigma is one of the table's, also after rounding to single precision.
        """
        if isinstance(sigma, Tensor):
            return torch.tensor([self.timestep(float(one)) for one in sigma.flatten()]).to(sigma).view_as(sigma)
        position = float(np.interp(_log_ratio(sigma), _log_ratio(self.sigmas), np.arange(len(self.sigmas)))[0])
        return round(position) if abs(position - round(position)) < 1e-3 else position


def _log_ratio(sigma: float | np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        known = np.atleast_1d(np.asarray(sigma, dtype=np.float64))
        return np.log(np.minimum(known / (1 - known), LARGEST))


def alpha_table(scheduler: Any) -> AlphaTable:
    """The table of a pipeline's scheduler.

    Raises: ValueError for one that clips or thresholds its samples, as no step of a flow is, or has times of its own.
    """
    config = scheduler.config
    clips = config.get("clip_sample", False) and type(scheduler).__name__ in ("DDIMScheduler", "LCMScheduler")
    if clips or config.get("thresholding", False):
        raise ValueError(
            f"the pipeline's {type(scheduler).__name__} clips its samples (clip_sample or thresholding), which no step "
            "of a flow does; turn both off in the scheduler's config"
        )
    if config.get("timestep_type", "discrete") != "discrete" or config.get("interpolation_type", "linear") != "linear":
        raise ValueError(
            f"the pipeline's {type(scheduler).__name__} takes times that are not those of its table (timestep_type, "
            "interpolation_type); give it discrete and linear ones"
        )
    kept = scheduler.alphas_cumprod.double().numpy()
    alpha, s = np.sqrt(kept), np.sqrt(1 - kept)
    return AlphaTable(s / (alpha + s))


def grid(scheduler: Any, table: AlphaTable, steps: int) -> list[float]:
    """The sigmas of `steps` first-order steps as the pipeline's scheduler spaces them: steps + 1 values.

    Euler's own for Euler's schedulers (of the ancestral one without its noise), LCM's and the multistep DPM-Solver's
    own for theirs, and DDIM's for all others. DDIM's grid ends above 0 unless the scheduler says set_alpha_to_one.
    """
    config = scheduler.config
    if type(scheduler).__name__ == "DPMSolverMultistepScheduler":
        solver = DPMSolverMultistepScheduler.from_config(config)
        solver.set_timesteps(steps)
        return [float(ratio / (1 + ratio)) for ratio in solver.sigmas.double()]
    if type(scheduler).__name__ in EULER:
        euler = EulerDiscreteScheduler.from_config(config)
        euler.set_timesteps(steps)
        return [float(ratio / (1 + ratio)) for ratio in euler.sigmas.double()]
    if type(scheduler).__name__ == "LCMScheduler":
        consistent = LCMScheduler.from_config(config)
        consistent.set_timesteps(steps)
        return [*(float(table.sigmas[t]) for t in consistent.timesteps), 0.0]
    # not from_config: it puts its own defaults in the place of another class's
    spacing, offset = config.timestep_spacing, config.get("steps_offset", 0)
    ddim = DDIMScheduler(len(table.sigmas), timestep_spacing=spacing, steps_offset=offset)
    ddim.set_timesteps(steps)
    last = 0.0 if config.get("set_alpha_to_one", True) else float(table.sigmas[0])
    return [*(float(table.sigmas[t]) for t in ddim.timesteps), last]


def starts_scaled(scheduler: Any) -> bool:
    """Whether the first latent is s times unit noise, not unit noise itself."""
    return type(scheduler).__name__ in EULER and scheduler.config.timestep_spacing in ("linspace", "trailing")

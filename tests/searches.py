"""Models and rewards whose searches have known answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.models.gaussian import GaussianModel
from flowalign.models.sd3 import SD3
from flowalign.records import Condition, Media, Prompts
from flowalign.schedules import linear
from rewards.base import FunctionReward
from tests.tiny import randomise_policy, tiny_sd3
from trainers import ReNO
from trainers.search_cost import Prices

PRICES = Prices(0.5, 0.25)
PROMPTS = ["a red circle", "a blue square", "two stars"]


class Identity(GaussianModel):
    """G(e) = e: the velocity is 0 (by a parameter that is 0), and pixels are the latents."""

    def __init__(self, shape: tuple[int, ...] = (3, 8, 8), steps: int = 1) -> None:
        super().__init__(grid=linear(steps))
        self.latent_shape = shape

    def network(
        self,
        latents: Tensor,
        sigma: float,
        condition: Condition,
        negative: bool = False,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        return self.gain[0] * latents

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def differentiable(function: Callable[[Media, Prompts], Tensor]) -> FunctionReward:
    return FunctionReward(function, differentiable=True)


def nearness(target: Tensor, scale: float = 1.0) -> FunctionReward:
    """-scale ||x - target||^2."""
    return differentiable(lambda media, prompts: -scale * (media.pixels - target).square().flatten(1).sum(1))


def brightness(media: Media, prompts: Prompts) -> Tensor:
    """A channel of each picture, or frame, by the length of its prompt."""
    pixels = media.pixels.unsqueeze(1) if media.pixels.ndim == 4 else media.pixels
    return torch.stack([pixels[i, :, len(text) % 3].mean() for i, text in enumerate(prompts.text)])


def tiny_model() -> SD3:
    model = SD3(tiny_sd3(), max_sequence_length=0)
    randomise_policy(model)
    return model


def job(folder: Path | str = "runs/none", **changes: Any) -> ReNO:
    """Three prompts in calls of two; a second or less."""
    settings: dict[str, Any] = {
        "model": tiny_model(),
        "reward": differentiable(brightness),
        "prompts": PROMPTS,
        "iterations": 5,
        "steps": 2,
        "batch_size": 2,
        "seed": 7,
        "prices": PRICES,
        "folder": str(folder),
        "save_seconds": 0.0,
    }
    return ReNO(**settings | changes)

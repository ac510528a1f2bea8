"""Colourfulness as people judge it, after Hasler and Suesstrunk ("Measuring colourfulness in natural images", 2003)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, Reward, simple_scores
from rewards.pixels import pictures

STRENGTH_WEIGHT = 0.3  # of the mean against the spread: fitted to observers, M3 of the paper
LEVELS = 255  # the paper's sRGB values are 0 ... 255


class Colourfulness(Reward):
    """The paper's M3, spread + 0.3 strength: 0 for grey, 33 for moderately, 109 for extremely colourful pictures.

        rg = R - G,   yb = (R + G) / 2 - B,   R, G, B in 0 ... 255
        spread = sqrt(std_rg^2 + std_yb^2),   strength = sqrt(mean_rg^2 + mean_yb^2)

    Mean and std over all pixels, the std divided by their number. Nothing is rounded to 8 bit. A plain colour has a
    strength alone. Differentiable; where spread or strength is 0, its gradient is 0 too. Prompts are not looked at.

    Raises: ValueError for videos.
    """

    name = "colourfulness"
    differentiable = True
    card = Card(usual=(0.0, 109.0))

    def score(self, media: Media, prompts: Prompts) -> Scores:
        red, green, blue = pictures(media, type(self).__name__).float().mul(LEVELS).flatten(2).unbind(1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue], 1)
        mean = opponents.mean(2)
        strength = length(mean)
        spread = length((opponents - mean[..., None]).flatten(1)) / red.shape[1] ** 0.5
        total = spread + STRENGTH_WEIGHT * strength
        return simple_scores(self.name, total, {"colour_spread": spread, "colour_strength": strength})


def length(vectors: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Of each vector; unlike that of sqrt, its gradient at 0 is 0, not nan."""
    return torch.linalg.vector_norm(vectors, dim=1)

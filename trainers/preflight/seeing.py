"""What decoding and scoring with gradient will take of memory: the VAE and the reward, run on fakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.media import shown
from flowalign.memory_estimate import decode_peak
from flowalign.models.pipeline import PipelineModel
from flowalign.randomness import keyed_globals
from flowalign.records import Prompts, Scores, Size
from rewards.base import Reward

Loss = Callable[[Scores], Tensor]


@dataclass(frozen=True)
class Seeing:
    """Bytes held at most while pictures are decoded, scored and gone back through.

    with_reward: whether the reward's are among them. One that looks at the pictures' numbers (a detector, frames drawn
    by what they show) cannot be run on fakes.
    """

    peak: int
    with_reward: bool


def seeing(model: PipelineModel, reward: Reward, prompts: Prompts, rows: int, loss: Loss) -> Seeing:
    """Of so many pictures or videos of the model's present size, for the first prompt.

    loss: what is made of their scores and gone back through.
    """
    told = prompts.rows([0] * rows)

    def score(pixels: Tensor) -> Tensor:
        return loss(reward(shown(pixels, told, model.fps), told, grad=True))

    try:
        _look_once(model, reward, prompts.rows([0]))
        return Seeing(decode_peak(model, rows, score), True)
    except (RuntimeError, ValueError):  # what is wrong with the reward, the tiny step will tell
        return Seeing(decode_peak(model, rows, _brightness), False)


def _look_once(model: PipelineModel, reward: Reward, told: Prompts) -> None:
    """At black media: what rewards keep between calls (texts, tables, references) would else be kept as fakes."""
    size = model.media_size(Size())
    frames = () if size.frames is None else (size.frames,)
    pixels = torch.zeros(1, *frames, 3, size.height or 0, size.width or 0, device=model.device)
    with keyed_globals(0, "look_once"):
        reward(shown(pixels, told, model.fps), told)


def _brightness(pixels: Float[Tensor, "b *frames 3 h w"]) -> Float[Tensor, " b"]:
    return pixels.flatten(1).sum(1)

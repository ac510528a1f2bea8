"""What the rewards of a tuned Qwen2-VL share: checked settings, and batches on the device that they are scored on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rewards.base import Reward
from rewards.qwen2vl import Qwen2VLScorer
from rewards.towers import Network


def check_settings(batch_size: int, min_pixels: int, max_pixels: int, recompute: bool, offload: bool) -> None:
    """Raises: ValueError for settings that cannot be had, before anything is loaded."""
    if batch_size < 1 or not 0 < min_pixels <= max_pixels:
        raise ValueError(
            f"batch_size must be at least 1 and min_pixels at most max_pixels, "
            f"got {batch_size}, {min_pixels}, {max_pixels}"
        )
    if recompute and offload:
        raise ValueError(
            "recompute runs the model again in the backward pass, when offload has put it away: choose one"
        )


class Qwen2VLReward(Reward):
    """A reward by a `Qwen2VLScorer`; a subclass prepares frames and says what the outputs mean.

    Args:
        recompute: recompute activations in the backward pass.
        offload: keeps the model on the CPU between calls, as `rewards.towers.Network` does.
    """

    differentiable = True

    def __init__(
        self, scorer: Qwen2VLScorer, device: str | None, batch_size: int, recompute: bool, offload: bool
    ) -> None:
        if recompute:
            scorer.recompute()
        self.scorer, self.network = scorer, Network(scorer, offload)
        self.device, self.batch_size = device, batch_size

    @abstractmethod
    def prepare(self, frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t 3 k l"]:
        """Resized and normalised; pictures are videos of one frame."""

    def outputs(self, frames: Float[Tensor, "b t 3 h w"], texts: Sequence[str]) -> Float[Tensor, "b m o"]:
        """The head's outputs at each of the scorer's marks, on the frames' device."""
        device, size = torch.device(self.device or frames.device), self.batch_size

        def rate() -> Float[Tensor, "b m o"]:
            parts = zip(range(0, len(frames), size), frames.split(size), strict=True)
            return torch.cat([self.scorer(self.prepare(part.to(device)), texts[i : i + size]) for i, part in parts])

        return self.network.run(device, rate).to(frames.device)

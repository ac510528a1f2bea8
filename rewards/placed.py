"""A reward on a device of its own, whatever it is made of."""

from __future__ import annotations

from dataclasses import replace

import torch

from flowalign.records import Media, Prompts, Scores
from rewards.base import Combination, Reward


class OnDevice(Combination):
    """Shows a reward its pictures on a device, and brings the scores back to where they came from; with its gradient.

    For rewards that go where their pictures are, such as a function; many take a `device` themselves. Scores of one
    device can be made while another one rolls out: see `Sampling.overlap`.

    Raises: ValueError for a device that is not there.
    """

    def __init__(self, reward: Reward, device: str) -> None:
        super().__init__([reward])
        self.name = reward.name
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device!r} cannot be had: {str(error).splitlines()[0]}") from error

    def score(self, media: Media, prompts: Prompts) -> Scores:
        home = media.pixels.device
        references = media.references and tuple(one.to(self.device) for one in media.references)
        there = replace(media, pixels=media.pixels.to(self.device), references=references)
        scores = self.rewards[0].score(there, prompts)
        parts = {name: value.to(home) for name, value in scores.parts.items()}
        return replace(scores, total=scores.total.to(home), parts=parts, valid=scores.valid.to(home))

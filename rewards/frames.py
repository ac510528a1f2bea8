"""Rewards of pictures on the frames of videos: which frames are looked at, and what each of them counts."""

from __future__ import annotations

import math
from dataclasses import replace
from hashlib import blake2b
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.pictures import to_bytes
from flowalign.randomness import key_generator
from flowalign.records import Media, Prompts, Scores
from rewards.base import Reward


class OnFrames(Reward):
    """A reward of pictures on frames of each video, as their weighted mean or as the least of them.

        mean: sum_i w_i r(frame_i),  w_i proportional to exp(-attenuation |i - f/2|), with sum 1
        min:  r of the frame with the lowest score

    i counts all f frames of the video from 0. A few frames, one of each of as many segments, and weights that fall away
    from the middle are InstructVideo's (arXiv:2312.12490, sections 3.3 and 3.4); there the attenuation is 1 and the
    weights are not normalised, so that the scale of the reward is a matter of which frames were drawn. An attenuation
    of 1 is steep: of 4 frames out of 16 the two outer ones count for 1.8 % together.

    A video has no score where one of its frames has none. Parts are the reward's own, of all frames in the same mean,
    or of the frame with the lowest score. Differentiable where the reward is.

    Args:
        reward: scores each picture on its own.
        frames: how many frames are looked at, evenly spread over the video, or all of them.
        sampling: "uniform" takes frames at equal distances with the first and the last (the middle one, if it is one);
            "segments" cuts the video into equal segments and takes the middle frame of each.
        attenuation: at least 0; 0 weighs all frames alike. Not used by the minimum, which needs it to be 0.
        reduce: "mean" or "min".
        seed: with segments, one frame of each is drawn at random instead of its middle one. The draw is a function of
            the seed and of the video in 8 bits alone, so that order and batches do not matter. None draws nothing.
        batch_size: frames that the reward is given at once.

    Raises: ValueError for settings outside of these, and for videos of fewer frames than are asked for.
    """

    def __init__(
        self,
        reward: Reward,
        frames: int | Literal["all"] = "all",
        sampling: Literal["uniform", "segments"] = "uniform",
        attenuation: float = 0.0,
        reduce: Literal["mean", "min"] = "mean",
        seed: int | None = None,
        batch_size: int = 32,
    ) -> None:
        if reward.card.scope != "sample" or reward.card.modality not in ("image", "any"):
            raise ValueError(
                f"OnFrames needs a reward that scores each picture on its own, {reward.name} looks at "
                f"{reward.card.modality} and compares by {reward.card.scope}"
            )
        if frames != "all" and frames < 1:
            raise ValueError(f"frames must be 'all' or at least 1, got {frames}")
        if not 0 <= attenuation < math.inf or (attenuation > 0 and reduce == "min"):
            raise ValueError(f"attenuation must be at least 0 and finite, and 0 with the minimum, got {attenuation}")
        if seed is not None and (sampling != "segments" or frames == "all"):
            raise ValueError("a seed draws frames out of segments: it needs sampling='segments' and a number of frames")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.reward, self.frames, self.sampling, self.attenuation = reward, frames, sampling, float(attenuation)
        self.reduce, self.seed, self.batch_size = reduce, seed, batch_size
        self.name, self.differentiable, self.ahead = reward.name, reward.differentiable, reward.ahead
        self.card = replace(reward.card, modality="video")

    def score(self, media: Media, prompts: Prompts) -> Scores:
        pixels = videos(media, "OnFrames")
        index = self._index(pixels)
        count = index.shape[1]
        rows = [row for row in range(len(pixels)) for _ in range(count)]
        references = None if media.references is None else tuple(media.references[row] for row in rows)
        chosen = pixels[torch.arange(len(pixels))[:, None].to(pixels.device), index.to(pixels.device)].flatten(0, 1)
        grad = self.differentiable and torch.is_grad_enabled()
        shown = Media(chosen, references=references)
        scored = self.reward(shown, prompts.rows(rows), grad=grad, chunk=self.batch_size)
        total = scored.total.view(len(pixels), count)
        weights = self._weights(total, index, pixels.shape[1])
        parts = {name: _mean(value.view(len(pixels), count), weights) for name, value in scored.parts.items()}
        valid = scored.valid.view(len(pixels), count).all(1)
        return Scores(_mean(total, weights).where(valid, torch.nan), parts, valid)

    def _weights(self, total: Float[Tensor, "b n"], index: Int[Tensor, "b n"], length: int) -> Float[Tensor, "b n"]:
        """Of each frame, with sum 1; of the lowest score alone for the minimum, the first where several are."""
        if self.reduce == "min":
            return F.one_hot(total.detach().argmin(1), total.shape[1]).to(total.dtype)
        return attenuated(index, length, self.attenuation).to(total)

    def _index(self, pixels: Float[Tensor, "b f 3 h w"]) -> Int[Tensor, "b n"]:
        """Of the frames that are looked at, for each video."""
        length = pixels.shape[1]
        count = length if self.frames == "all" else self.frames
        if not 1 <= count <= length:
            raise ValueError(f"OnFrames looks at {count} frames, and these videos have {length}")
        if self.sampling == "uniform":
            chosen = spread(length, count)
        elif self.seed is None:
            chosen = middles(length, count)
        else:
            return torch.stack([drawn(video, count, self.seed) for video in pixels])
        return chosen.expand(len(pixels), -1)


def videos(media: Media, name: str) -> Float[Tensor, "b f 3 h w"]:
    """The pixels of media that are videos.

    Raises: ValueError for pictures, with the reward's name.
    """
    if media.pixels.ndim != 5:
        raise ValueError(f"{name} scores videos [b, f, 3, h, w], got media of the shape {list(media.pixels.shape)}")
    return media.pixels


def spread(length: int, count: int) -> Int[Tensor, " n"]:
    """Frames at equal distances from the first to the last; the middle one (length // 2) if it is one."""
    if count == 1:
        return torch.tensor([length // 2])
    return torch.arange(count, dtype=torch.float64).mul((length - 1) / (count - 1)).add(0.5).floor().long()


def middles(length: int, count: int) -> Int[Tensor, " n"]:
    """The middle frame of each of `count` segments, floor((k + 1/2) length / count)."""
    return (2 * torch.arange(count) + 1) * length // (2 * count)


def drawn(video: Float[Tensor, "f 3 h w"], count: int, seed: int) -> Int[Tensor, " n"]:
    """A frame of each of `count` segments, equally likely; a function of the seed and of the video in 8 bits."""
    digest = blake2b(to_bytes(video).numpy().tobytes(), digest_size=16).digest()
    generator = key_generator(seed, "frames", int.from_bytes(digest, "big"))
    edges = [k * len(video) // count for k in range(count + 1)]
    return torch.tensor([int(generator.integers(low, high)) for low, high in zip(edges, edges[1:], strict=False)])


def attenuated(index: Int[Tensor, "b n"], length: int, attenuation: float) -> Float[Tensor, "b n"]:
    """exp(-attenuation |i - length / 2|) with sum 1 over the frames of each video, float64."""
    return torch.softmax(-attenuation * (index.double() - length / 2).abs(), dim=1)


def _mean(values: Float[Tensor, "b n"], weights: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Weighted over frames; what weighs nothing does not count, be it nan."""
    return (values * weights).where(weights > 0, 0.0).sum(1)

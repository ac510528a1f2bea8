"""What a video does over time, after VBench (arXiv:2311.17982): consistency, flicker and, against them, motion.

All three rewards of steadiness (SubjectConsistency, BackgroundConsistency, TemporalFlickering) are highest for a still
picture. A model that is trained on them alone learns to freeze its videos, and evaluation by them alone prefers videos
in which nothing happens. Never use them without a reward of motion beside them, as in
`SubjectConsistency() + 0.5 * FrameDynamics()`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, Reward, simple_scores
from rewards.clip import CLIPScore
from rewards.frames import videos
from rewards.pixels import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    normalise,
    rounded_center_crop,
    straight_through,
    to_eight_bit,
)
from rewards.subject import load_vit
from rewards.towers import Dtype, Network, frozen

BRISK = 0.05  # of [0, 1]: our choice, a scale and no threshold; VBench measures flow and has no such number
TOP = 0.05  # of the pixels: those that move most, as in VBench's dynamic degree


class FrameConsistency(Reward):
    """How much a video's frames look alike to a network, in [0, 1]; differentiable.

        mean over frames i > 0 of (max(0, cos(e_i, e_{i-1})) + max(0, cos(e_i, e_0))) / 2

    A subclass says what the embedding e of a frame is. See above why it needs a reward of motion beside it.
    """

    differentiable = True
    model: Any

    def __init__(self, model: nn.Module, device: str | None, batch_size: int, dtype: Dtype, offload: bool) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = frozen(model, dtype)
        self.network = Network(self.model, offload)
        self.device, self.batch_size = device, batch_size

    @abstractmethod
    def embed(self, frames: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Embeddings of frames in [0, 1], on the model's device."""

    def score(self, media: Media, prompts: Prompts) -> Scores:
        pixels = _moving(media, type(self).__name__)
        device = torch.device(self.device or pixels.device)

        def rate() -> Float[Tensor, " b"]:
            frames = pixels.to(device).float().flatten(0, 1).split(self.batch_size)
            features = torch.cat([self.embed(part).float() for part in frames])
            return consistency(features.unflatten(0, pixels.shape[:2]))

        return simple_scores(self.name, self.network.run(device, rate).to(pixels.device))


class SubjectConsistency(FrameConsistency):
    """Whether the subject stays itself: `FrameConsistency` of DINO's class token; differentiable.

    Frames are resized to a shortest side of `size` pixels, bilinear and without antialiasing, not cropped. Where they
    are not square, or `size` is not the model's own, transformers interpolates the position embeddings to the number of
    patches, DINO's authors by a factor with an offset of 0.1: scores then differ a little from VBench's.

    Args:
        model: a folder or hub id of a transformers ViTModel without a pooler. VBench takes DINO's ViT-B/16; its weights
            and code are under the Apache-2.0 licence.
        device: where the model stays; by default it follows the videos.
        batch_size: frames that pass through the model at once.
        size: of the shortest side in pixels; by default the model's image size, 224.
        exact: rounds to 8 bits before and after the resize, as it is done to decoded videos; else it is plain.
        dtype: of the model; the rest is float32. See `rewards.towers.frozen`.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError where the model is none, or lacks weights or has others, and for videos of one frame.
    """

    name = "subject_consistency"
    card = Card(weights="facebook/dino-vitb16", licence="Apache-2.0", usual=(0.7, 1.0), modality="video")

    def __init__(
        self,
        model: str = "facebook/dino-vitb16",
        device: str | None = None,
        batch_size: int = 32,
        size: int | None = None,
        exact: bool = True,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        super().__init__(load_vit(model), device, batch_size, dtype, offload)
        self.size, self.exact = size or int(self.model.config.image_size), exact

    def embed(self, frames: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        resized = resize_plain(frames, self.size, "bilinear", self.exact)
        given = normalise(resized, IMAGENET_MEAN, IMAGENET_STD)
        return self.model(pixel_values=given, interpolate_pos_encoding=True).last_hidden_state[:, 0]


class BackgroundConsistency(FrameConsistency):
    """Whether the scene stays itself: `FrameConsistency` of a CLIP model's picture embedding; differentiable.

    Frames are resized to a shortest side of the model's size, bicubic and without antialiasing, and their middle is cut
    out as torchvision does, with the sizes and constants that `CLIPScore` finds beside the model.

    Args:
        model: a folder or hub id of a transformers CLIPModel with its tokenizer, or "shapes", the embedded one. VBench
            takes OpenAI's ViT-B/32; its weights are under the MIT licence.
        device: where the model stays; by default it follows the videos.
        batch_size: frames that pass through the model at once.
        exact: rounds to 8 bits before and after the resize, as it is done to decoded videos; else it is plain.
        dtype: of the model; the rest is float32. See `rewards.towers.frozen`.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError as `CLIPScore` does, and for videos of one frame.
    """

    name = "background_consistency"
    card = Card(weights="openai/clip-vit-base-patch32", licence="MIT", usual=(0.8, 1.0), modality="video")

    def __init__(
        self,
        model: str = "openai/clip-vit-base-patch32",
        device: str | None = None,
        batch_size: int = 32,
        exact: bool = True,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        clip = CLIPScore(model)
        assert isinstance(clip.prepare, Preprocessing)
        super().__init__(clip.model, device, batch_size, dtype, offload)
        self.prepare, self.exact = clip.prepare, exact

    def embed(self, frames: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        resized = resize_plain(frames, self.prepare.size, "bicubic", self.exact)
        given = normalise(rounded_center_crop(resized, self.prepare.crop), self.prepare.mean, self.prepare.std)
        return self.model.get_image_features(pixel_values=given).pooler_output


class TemporalFlickering(Reward):
    """1 - mean |x_{t+1} - x_t| over frames, pixels and channels, in [0, 1]; differentiable, no weights.

    1 for a still video. VBench measures it on videos that should be static; of moving ones it punishes the motion. The
    gradient at a pixel that does not change is 0.

    Raises: ValueError for videos of one frame.
    """

    name = "temporal_flickering"
    differentiable = True
    card = Card(usual=(0.9, 1.0), modality="video")

    def score(self, media: Media, prompts: Prompts) -> Scores:
        pixels = _moving(media, "TemporalFlickering").float()
        return simple_scores(self.name, stillness(pixels))


class FrameDynamics(Reward):
    """How much a video moves, from 0 for a still one towards 1, by the change of its pixels; differentiable.

        mean over pairs t of d_t / (d_t + brisk),  d_t = mean of the largest 5 % of |x_{t+1} - x_t|

    over pixels, where |.| is the mean over channels after averaging over squares of `smooth` pixels, which takes out
    noise. VBench's dynamic degree asks whether the largest 5 % of the optical flow exceed a threshold in enough frames;
    this one is soft, needs no flow network, and cannot tell motion from flicker: a video whose brightness jumps is
    dynamic. Weigh it against `TemporalFlickering`. It counts per pair of frames: compare videos of one frame rate.

    The gradient of a video that is quite still is 0, since its pixels could change either way.

    Args:
        brisk: the change in [0, 1] at which a pair counts one half, above 0.
        smooth: side of the squares in pixels; 1 takes the pixels as they are.

    Raises: ValueError for settings outside of these, for videos of one frame, and for frames smaller than a square.
    """

    name = "frame_dynamics"
    differentiable = True
    card = Card(usual=(0.0, 0.9), modality="video")

    def __init__(self, brisk: float = BRISK, smooth: int = 4) -> None:
        if not brisk > 0 or smooth < 1:
            raise ValueError(f"brisk must be above 0 and smooth at least 1, got {brisk} and {smooth}")
        self.brisk, self.smooth = float(brisk), smooth

    def score(self, media: Media, prompts: Prompts) -> Scores:
        pixels = _moving(media, "FrameDynamics").float()
        if min(pixels.shape[3:]) < self.smooth:
            raise ValueError(f"frames of {list(pixels.shape[3:])} are smaller than squares of {self.smooth}")
        known = torch.isfinite(pixels.detach()).flatten(1).all(1)  # the largest would hide a nan among the others
        return simple_scores(self.name, motion(pixels, self.brisk, self.smooth).where(known, torch.nan))


def stillness(pixels: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, " b"]:
    """One less the mean absolute change from frame to frame."""
    return 1 - pixels.diff(dim=1).abs().mean((1, 2, 3, 4))


def motion(pixels: Float[Tensor, "b f 3 h w"], brisk: float, smooth: int) -> Float[Tensor, " b"]:
    """`FrameDynamics` of videos: mean over pairs of d / (d + brisk), d the mean of the squares that change most."""
    change = F.avg_pool3d(pixels.diff(dim=1), (1, smooth, smooth)).abs().mean(2).flatten(2)
    most = change.topk(max(1, int(TOP * change.shape[2])), dim=2).values.mean(2)
    return (most / (most + brisk)).mean(1)


def consistency(features: Float[Tensor, "b f d"]) -> Float[Tensor, " b"]:
    """Mean over later frames of the cosines with the frame before and with the first; negative ones count as 0."""
    units = F.normalize(features, dim=2)
    before = (units[:, 1:] * units[:, :-1]).sum(2).clamp(min=0)
    first = (units[:, 1:] * units[:, :1]).sum(2).clamp(min=0)
    return ((before + first) / 2).mean(1)


def resize_plain(
    pixels: Float[Tensor, "n 3 h w"], size: int, mode: Literal["bilinear", "bicubic"], exact: bool
) -> Float[Tensor, "n 3 k l"]:
    """Shortest side to `size` pixels without antialiasing, the other side rounded down, as torchvision's Resize.

    Args:
        exact: as torchvision does with 8-bit pictures: rounded before and after. The gradient is the plain resize's.
    """
    height, width = pixels.shape[2:]
    shortest = min(height, width)
    shape = (int(size * height / shortest), int(size * width / shortest))
    if not exact:
        return pixels if shape == (height, width) else F.interpolate(pixels, shape, mode=mode)
    levels = to_eight_bit(pixels) * 255
    if shape == (height, width):
        return levels / 255
    resized = F.interpolate(straight_through(levels.round(), levels), shape, mode=mode)
    return straight_through(resized.clamp(0, 255).round(), resized) / 255


def _moving(media: Media, name: str) -> Float[Tensor, "b f 3 h w"]:
    pixels = videos(media, name)
    if pixels.shape[1] < 2:
        raise ValueError(f"{name} compares frames: it needs at least 2, and these videos have {pixels.shape[1]}")
    return pixels

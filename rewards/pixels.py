"""From pictures in [0, 1] to what a reward model was trained on: PIL's 8-bit arithmetic, with a gradient.

Reward models saw pictures that PIL had resized in 8 bit. Here every stage is rounded as PIL rounds it, and the gradient
passes through the rounding as if it were not there (straight-through), so that it is that of the plain resize.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowalign.records import Media

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP (github.com/openai/CLIP, clip.py)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as DINO's authors prepare pictures
FRACTION_BITS = 22  # of PIL's 8-bit weights: 32 less 8 for the level and 2 for the sign and the overshoot


@dataclass(frozen=True)
class Kernel:
    """A filter of PIL's resize: its weight at a distance in pixels, and the distance from which on that is 0."""

    weight: Callable[[Tensor], Tensor]
    support: float


def _bicubic(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Keys' cubic kernel with a = -1/2 (IEEE ASSP 29(6), 1981), as PIL has it."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return near.where(x < 1, far.where(x < 2, 0.0))


def _bilinear(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return (1 - x.abs()).clamp(min=0)


BICUBIC, BILINEAR = Kernel(_bicubic, 2.0), Kernel(_bilinear, 1.0)


def pictures(media: Media, name: str) -> Float[Tensor, "b 3 h w"]:
    """The pixels of media that are pictures.

    Raises: ValueError for videos, with the reward's name.
    """
    if media.pixels.ndim != 4:
        raise ValueError(f"{name} scores pictures [b, 3, h, w], got media of the shape {list(media.pixels.shape)}")
    return media.pixels


def finite(pixels: Float[Tensor, "b *frames 3 h w"]) -> Bool[Tensor, " b"]:
    """Which pictures or videos have no nan and no infinity."""
    return torch.isfinite(pixels).flatten(1).all(1)


def straight_through(value: Float[Tensor, "*shape"], source: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`value` exactly, with the gradient of `source`; nan where the source is not finite."""
    return value.detach() + (source - source.detach())


def to_eight_bit(pixels: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The nearest k / 255, clipped to [0, 1]; the gradient is the identity's, outside [0, 1] too; nan stays nan."""
    return straight_through(pixels.clamp(0, 1).mul(255).round().div(255), pixels)


def resize(
    pixels: Float[Tensor, "b 3 h w"], height: int, width: int, kernel: Kernel = BICUBIC
) -> Float[Tensor, "b 3 k l"]:
    """Bit for bit what `PIL.Image.resize` makes of 8-bit pictures, bicubic or bilinear.

    Over the width, then over the height, rounded to 8 bit after each, with PIL's fixed-point weights. The gradient is
    that of `F.interpolate(antialias=True)` in the same mode. Since version 13 pillow goes over the height first where
    it shrinks much more than the width (pull request 9549); here the order is the one that reward models were trained
    on.

    Args:
        pixels: in [0, 1]; rounded to 8 bit first.
    """
    exact = torch.float32 if pixels.device.type == "mps" else torch.float64  # mps has no float64: exact but for ties
    levels = to_eight_bit(pixels.float()).to(exact).mul(255)
    levels = straight_through(levels.round(), levels)
    if width != pixels.shape[3]:
        levels = _pass(levels, width, kernel)
    if height != pixels.shape[2]:
        levels = _pass(levels.mT, height, kernel).mT
    return (levels / 255).float()


def _pass(levels: Float[Tensor, "b 3 n w"], size: int, kernel: Kernel) -> Float[Tensor, "b 3 n size"]:
    """One axis in whole levels 0 ... 255; sums of integers below 2^53 are exact, and halves are rounded up."""
    weights = _weights(levels.shape[3], size, kernel).to(levels.device, levels.dtype)
    summed = levels @ weights.T
    rounded = (summed + 2 ** (FRACTION_BITS - 1)).div(2**FRACTION_BITS).floor().clamp(0, 255)
    return straight_through(rounded, summed / 2**FRACTION_BITS)


@lru_cache(maxsize=32)
def _weights(size: int, new_size: int, kernel: Kernel) -> Float[Tensor, "new_size size"]:
    """Weights of each new pixel, times 2^22 and rounded to integers, as in PIL's src/libImaging/Resample.c."""
    scale = size / new_size
    stretch = max(scale, 1.0)  # the filter grows with the reduction: antialiasing
    center = (torch.arange(new_size, dtype=torch.float64)[:, None] + 0.5) * scale
    first = (center - kernel.support * stretch + 0.5).trunc().clamp(min=0)
    last = (center + kernel.support * stretch + 0.5).trunc().clamp(max=size)
    pixel = torch.arange(size, dtype=torch.float64)
    weights = kernel.weight((pixel - center + 0.5) * (1 / stretch)).where((pixel >= first) & (pixel < last), 0.0)
    weights = weights / weights.sum(1, keepdim=True) * 2**FRACTION_BITS
    return (weights.abs() + 0.5).floor() * weights.sign()


def resize_shortest(pixels: Float[Tensor, "b 3 h w"], size: int, kernel: Kernel = BICUBIC) -> Float[Tensor, "b 3 k l"]:
    """`resize` of the shortest side to `size` pixels; the other side keeps the aspect, rounded down."""
    height, width = pixels.shape[2:]
    shortest = min(height, width)
    return resize(pixels, int(size * height / shortest), int(size * width / shortest), kernel)


def center_crop(pixels: Float[Tensor, "b 3 h w"], size: int) -> Float[Tensor, "b 3 size size"]:
    """The middle; where the margin is odd, the smaller half is on the top and the left.

    transformers does so; torchvision rounds half to even, and is a pixel off in every other odd margin.

    Raises: ValueError where the picture is smaller.
    """
    height, width = pixels.shape[2:]
    if min(height, width) < size:
        raise ValueError(f"cannot crop {size} x {size} out of a picture of {height} x {width}")
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[:, :, top : top + size, left : left + size]


def rounded_center_crop(pixels: Float[Tensor, "b 3 h w"], size: int) -> Float[Tensor, "b 3 size size"]:
    """The middle of pictures of at least size x size; half a pixel is rounded to even, as torchvision does.

    `center_crop` rounds it down, as transformers does.
    """
    top, left = (round((side - size) / 2) for side in pixels.shape[2:])
    return pixels[:, :, top : top + size, left : left + size]


def normalise(pixels: Float[Tensor, "b 3 h w"], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pixels - mean) / std of each channel."""
    center, scale = (pixels.new_tensor(tuple(values))[:, None, None] for values in (mean, std))
    return (pixels - center) / scale


@dataclass(frozen=True)
class Preprocessing:
    """What CLIP-like models do to a picture: shortest side to `size`, the middle `crop` x `crop`, channels normalised.

    Both sizes are in pixels. rounded: half a pixel of the margin is rounded as torchvision does, not as transformers.
    """

    size: int
    crop: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    kernel: Kernel = BICUBIC
    rounded: bool = False

    def __call__(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 k k"]:
        """The network's input for pictures in [0, 1]; differentiable."""
        cut = rounded_center_crop if self.rounded else center_crop
        return normalise(cut(resize_shortest(pixels, self.size, self.kernel), self.crop), self.mean, self.std)

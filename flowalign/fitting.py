"""Media at a model's size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from flowalign.records import Size

Stack = Float[Tensor, "f 3 h w"]
Fit = Callable[[Tensor, int, int], Tensor]


def centre_crop(pixels: Stack, height: int, width: int) -> Float[Tensor, "f 3 h2 w2"]:
    """The middle of a picture, as much as the size shows of it; resized by antialiased bicubics, then clipped."""
    factor = max(height / pixels.shape[2], width / pixels.shape[3])
    grown = max(round(pixels.shape[2] * factor), height), max(round(pixels.shape[3] * factor), width)
    whole = stretch(pixels, *grown)
    top, left = (grown[0] - height) // 2, (grown[1] - width) // 2
    return whole[:, :, top : top + height, left : left + width]


def stretch(pixels: Stack, height: int, width: int) -> Float[Tensor, "f 3 h2 w2"]:
    """All of a picture, its proportions changed where they have to be; resized as by `centre_crop`."""
    if pixels.shape[2:] == (height, width):
        return pixels
    return interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def fitted(
    pixels: Float[Tensor, "*frames 3 h w"], size: Size, fit: Fit = centre_crop, most: float = math.inf
) -> Float[Tensor, "*frames2 3 h2 w2"]:
    """A picture or video at a size; of a longer video as many frames as the size has, evenly spread.

    Args:
        size: with height and width; frames for a video.
        fit: what gives each frame that height and width.
        most: how many times a side may be enlarged.

    Raises: ValueError for a picture where a video is meant or the reverse, for too few frames, and for what is small.
    """
    height, width, frames = size.height, size.width, size.frames
    assert height is not None
    assert width is not None
    if (pixels.ndim == 4) != (frames is not None):
        kinds = ("a video", "pictures") if pixels.ndim == 4 else ("a picture", "videos")
        raise ValueError(f"this is {kinds[0]}, and the model makes {kinds[1]}")
    if frames is not None:
        if len(pixels) < frames:
            raise ValueError(f"a video has {len(pixels)} frames, and the model makes {frames}")
        pixels = pixels[torch.linspace(0, len(pixels) - 1, frames).round().long()]
    factor = max(height / pixels.shape[-2], width / pixels.shape[-1])
    if factor > most:
        raise ValueError(
            f"{pixels.shape[-1]} x {pixels.shape[-2]} pixels would be enlarged {factor:.2g} times to {width} x {height}"
            f", more than {most:g}: leave it out, or allow it (most_enlarged)"
        )
    whole = fit(pixels if frames is not None else pixels[None], height, width)
    return whole if frames is not None else whole[0]

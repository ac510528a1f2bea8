"""Tensors of pictures as a PNG that a person can look at."""

from __future__ import annotations

import io
import math
import textwrap
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST = 128  # pixels: what is smaller is enlarged by a whole factor, without smoothing, to at least this width
GAP = 6
TEXT = 11


THUMBNAIL = 256  # pixels: the most that a kept picture has where not the whole of it is wanted


def to_bytes(pixels: Float[Tensor, "*b 3 h w"]) -> UInt8[Tensor, "*b 3 h w"]:
    """Pictures in [0, 1] in 8 bits, on the CPU; what lies outside is clipped, and nan is black."""
    return torch.nan_to_num(pixels.detach().float().cpu(), nan=0.0).clamp(0, 1).mul(255).round().byte()


def to_images(pixels: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """Pictures in [0, 1] as PIL images; what lies outside is clipped, and nan is black."""
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pictures have the shape [b, 3, h, w], got {list(pixels.shape)}")
    return [Image.fromarray(np.ascontiguousarray(one)) for one in to_bytes(pixels).permute(0, 2, 3, 1).numpy()]


def zipped(pixels: UInt8[Tensor, "b 3 h w"], whole: int) -> bytes:
    """A zip file of pictures, 00000.png and so on: the first `whole` as they are, the others at 256 pixels at most.

    The same pictures give the same bytes.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for i, one in enumerate(pixels):
            image = Image.fromarray(np.ascontiguousarray(one.permute(1, 2, 0).numpy()))
            if i >= whole and max(image.size) > THUMBNAIL:
                image.thumbnail((THUMBNAIL, THUMBNAIL))
            picture = io.BytesIO()
            image.save(picture, "PNG")
            file.writestr(zipfile.ZipInfo(f"{i:05d}.png"), picture.getvalue())
    return buffer.getvalue()


def unzipped(path: Path, count: int) -> Float[Tensor, "b 3 h w"]:
    """The first `count` pictures of such a file."""
    with zipfile.ZipFile(path) as file:
        images = [Image.open(io.BytesIO(file.read(f"{i:05d}.png"))).convert("RGB") for i in range(count)]
    return torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in images]) / 255


def grid(pixels: Float[Tensor, "b 3 h w"], captions: Sequence[str] = ()) -> bytes:
    """A PNG with all pictures in rows, about as wide as high, and a caption under each if there are captions.

    Args:
        pixels: pictures in [0, 1].
        captions: one text for each picture (a prompt, a score), or none at all.

    Raises: ValueError where the number of captions is another one, or there is no picture.
    """
    images = to_images(pixels)
    if not images:
        raise ValueError("a grid needs at least one picture")
    if captions and len(captions) != len(images):
        raise ValueError(f"{len(images)} pictures but {len(captions)} captions")
    factor = math.ceil(SMALLEST / images[0].width)
    width, height = images[0].width * factor, images[0].height * factor
    texts = [_wrap(caption, width) for caption in captions]
    strip = max((text.count("\n") + 1 for text in texts), default=0) * (TEXT + 4)
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + strip + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    for i, image in enumerate(images):
        left, top = GAP + i % columns * (width + GAP), GAP + i // columns * (height + strip + GAP)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        if texts:
            draw.multiline_text((left, top + height + 2), texts[i], fill="black", font=font, spacing=3)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _wrap(caption: str, width: int) -> str:
    """Lines that fit under a picture of this width; the caption's own line breaks stay; four lines at most."""
    letters = max(8, int(width / (0.55 * TEXT)))
    lines = [line for part in caption.splitlines() for line in textwrap.wrap(part, letters) or [""]]
    return "\n".join(lines[:4])

"""Tensors of pictures as a PNG that a person can look at."""

from __future__ import annotations

import io
import math
import textwrap
import zipfile
from collections.abc import Iterable, Mapping, Sequence
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


def zipped(pixels: Iterable[UInt8[Tensor, "3 _ _"]], whole: int, films: Mapping[int, bytes] = {}) -> bytes:
    """A zip file of pictures, 00000.png and so on: the first `whole` as they are, the others at 256 pixels at most.

    The same pictures give the same bytes. Videos in `films` stand beside their pictures as 00000.mp4 and so on.
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
        for i in sorted(films):
            file.writestr(zipfile.ZipInfo(f"{i:05d}.mp4"), films[i])
    return buffer.getvalue()


def unzipped(path: Path, count: int) -> list[Float[Tensor, "3 _ _"]]:
    """The first `count` pictures of such a file."""
    with zipfile.ZipFile(path) as file:
        images = [
            Image.open(io.BytesIO(file.read(f"{i:05d}.png")), formats=["PNG"]).convert("RGB") for i in range(count)
        ]
    return [torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255 for image in images]


def grid(
    pixels: Float[Tensor, "b 3 h w"] | Sequence[Float[Tensor, "3 _ _"]], captions: Sequence[str] = (), columns: int = 0
) -> bytes:
    """A PNG with all pictures in rows, about as wide as high, and a caption under each if there are captions.

    Strips of a video's frames, which are wider than three times their height, stand one below the other. Pictures of
    other sizes are fitted into the largest one's place.

    Args:
        pixels: pictures in [0, 1].
        captions: one text for each picture (a prompt, a score), or none at all.
        columns: pictures in a row, where they are no strips; 0 for as many as make it square.

    Raises: ValueError where the number of captions is another one, or there is no picture.
    """
    images = to_images(pixels) if isinstance(pixels, Tensor) else [to_images(one[None])[0] for one in pixels]
    if not images:
        raise ValueError("a grid needs at least one picture")
    if captions and len(captions) != len(images):
        raise ValueError(f"{len(images)} pictures but {len(captions)} captions")
    width, height = max(image.width for image in images), max(image.height for image in images)
    factor = math.ceil(SMALLEST / width)
    width, height = width * factor, height * factor
    texts = [_wrap(caption, width) for caption in captions]
    strip = max((text.count("\n") + 1 for text in texts), default=0) * (TEXT + 4)
    columns = 1 if width > 3 * height else columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + strip + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    for i, image in enumerate(images):
        left, top = GAP + i % columns * (width + GAP), GAP + i // columns * (height + strip + GAP)
        sheet.paste(_fitted(image, width, height), (left, top))
        if texts:
            draw.multiline_text((left, top + height + 2), texts[i], fill="black", font=font, spacing=3)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """As large as fits, without smoothing where it is enlarged by a whole factor."""
    scale = min(width / image.width, height / image.height)
    size = round(image.width * scale), round(image.height * scale)
    return image.resize(size, Image.Resampling.NEAREST if scale == int(scale) else Image.Resampling.BICUBIC)


def _wrap(caption: str, width: int) -> str:
    """Lines that fit under a picture of this width; the caption's own line breaks stay; four lines at most."""
    letters = max(8, int(width / (0.55 * TEXT)))
    lines = [line for part in caption.splitlines() for line in textwrap.wrap(part, letters) or [""]]
    return "\n".join(lines[:4])

"""Size under JPEG compression, the rewards of DDPO (arXiv:2305.13301, section 5) that need no model."""

from __future__ import annotations

import io

import torch
from PIL import Image

from flowalign.pictures import to_images
from flowalign.records import Media, Prompts, Scores
from rewards.base import Reward, simple_scores
from rewards.pixels import finite, pictures

BYTES_PER_KB = 1000  # not 1024: as in DDPO's own code


class JPEGIncompressibility(Reward):
    """Size in kB (1000 bytes) of the picture as a JPEG: detail and noise are rewarded. Not differentiable.

    Pictures in [0, 1] are rounded to 8 bit; colour is subsampled (4:2:0), which is pillow's default and DDPO's setting.

    Args:
        quality: of the JPEG, 1 to 100.

    Raises: ValueError for another quality, and for videos.
    """

    name = "jpeg_incompressibility"

    def __init__(self, quality: int = 95) -> None:
        if not 1 <= quality <= 100:
            raise ValueError(f"quality must be in 1 ... 100, got {quality}")
        self.quality = quality

    def score(self, media: Media, prompts: Prompts) -> Scores:
        return simple_scores(self.name, self._kilobytes(media))

    def _kilobytes(self, media: Media) -> torch.Tensor:
        pixels = pictures(media, type(self).__name__)
        sizes = [_encoded_bytes(image, self.quality) / BYTES_PER_KB for image in to_images(pixels)]
        return torch.tensor(sizes, device=pixels.device).where(finite(pixels), torch.nan)


class JPEGCompressibility(JPEGIncompressibility):
    """Minus the size in kB: smooth and plain pictures are rewarded; else as `JPEGIncompressibility`."""

    name = "jpeg_compressibility"

    def score(self, media: Media, prompts: Prompts) -> Scores:
        return simple_scores(self.name, -self._kilobytes(media))


def _encoded_bytes(image: Image.Image, quality: int) -> int:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.tell()

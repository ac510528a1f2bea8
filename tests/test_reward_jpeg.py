"""JPEG size: the bytes of the very file that pillow writes, in units of 1000, and their sign."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.records import Media, Prompts
from rewards import JPEGCompressibility, JPEGIncompressibility


def prompts(count: int) -> Prompts:
    return Prompts(("",) * count, ({},) * count)


def written(picture: np.ndarray, quality: int) -> float:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=quality)
    return len(buffer.getvalue()) / 1000


@pytest.mark.parametrize("quality", [95, 50])
def test_size_of_the_file_in_kilobytes(quality: int) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    expected = [written(picture, quality) for picture in pictures]
    # rounded, not cut off: a third of a level more or less changes nothing
    shaken = pixels + torch.empty_like(pixels).uniform_(-0.33, 0.33) / 255
    for given in (pixels, shaken):
        more = JPEGIncompressibility(quality).score(Media(given), prompts(3))
        less = JPEGCompressibility(quality).score(Media(given), prompts(3))
        assert more.total.tolist() == pytest.approx(expected)
        assert less.total.tolist() == pytest.approx([-size for size in expected])
        assert more.parts.keys() == {"jpeg_incompressibility"}
        assert less.parts.keys() == {"jpeg_compressibility"}
        assert more.valid.all()


def test_noise_costs_more_than_a_plain_picture() -> None:
    pixels = torch.stack([torch.full((3, 64, 64), 0.3), torch.rand(3, 64, 64)])
    assert JPEGCompressibility().score(Media(pixels), prompts(2)).total.diff() < -3
    assert JPEGIncompressibility().score(Media(pixels), prompts(2)).total.diff() > 3
    assert not JPEGCompressibility().differentiable


def test_a_broken_picture_has_no_score() -> None:
    pixels = torch.rand(2, 3, 16, 16)
    pixels[0, 1, 2, 3] = math.nan
    for reward in (JPEGCompressibility(), JPEGIncompressibility()):
        assert reward.score(Media(pixels), prompts(2)).valid.tolist() == [False, True]


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"quality must be in 1 ... 100, got 101"):
        JPEGCompressibility(101)
    with pytest.raises(ValueError, match=r"JPEGCompressibility scores pictures .* \[1, 5, 3, 8, 8\]"):
        JPEGCompressibility().score(Media(torch.rand(1, 5, 3, 8, 8), 8.0), prompts(1))

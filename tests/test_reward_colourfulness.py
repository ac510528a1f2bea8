"""Colourfulness: numpy's own formula on 8-bit pictures, plain colours by hand, and a gradient that also grey has."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.cli import main
from flowalign.records import Media, Prompts
from rewards import Colourfulness


def prompts(count: int) -> Prompts:
    return Prompts(("",) * count, ({},) * count)


def plain(*colours: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(colours)[:, :, None, None].expand(-1, -1, 4, 6).clone()


def by_hand(picture: np.ndarray) -> float:
    """The paper's formula in float64, as one would write it for a picture [h, w, 3] of bytes."""
    red, green, blue = (picture[..., channel].astype(np.float64) for channel in range(3))
    rg, yb = red - green, 0.5 * (red + green) - blue
    return float(np.sqrt(rg.std() ** 2 + yb.std() ** 2) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2))


def test_the_formula_on_pictures_of_bytes() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (4, 24, 32, 3), dtype=np.uint8)
    pictures[1:] //= np.array([1, 2, 4], dtype=np.uint8)  # reddish ones, with a mean beside the spread
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    scores = Colourfulness()(Media(pixels), prompts(4))
    assert scores.total.tolist() == pytest.approx([by_hand(picture) for picture in pictures], rel=1e-5)
    assert torch.equal(scores.total, scores.parts["colourfulness"])
    assert torch.allclose(scores.total, scores.parts["colour_spread"] + 0.3 * scores.parts["colour_strength"])


def test_plain_colours_by_hand() -> None:
    pixels = plain((0.4, 0.4, 0.4), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0))
    scores = Colourfulness()(Media(pixels), prompts(5))
    strengths = [0.0, 255 * math.sqrt(1.25), 255 * math.sqrt(1.25), 255.0, 255.0]
    assert scores.parts["colour_strength"].tolist() == pytest.approx(strengths, abs=1e-4)
    assert scores.parts["colour_spread"].tolist() == pytest.approx([0.0] * 5, abs=1e-4)
    assert scores.total.tolist() == pytest.approx([0.3 * one for one in strengths], abs=1e-4)


def test_two_opposite_pixels_have_a_spread_alone() -> None:
    """R - G is +-51 and yb +-25.5, so the spread is 51 sqrt(5) / 2, and grows with the redder pixel's red alone."""
    pixels = torch.full((1, 3, 1, 2), 0.5)
    pixels[0, 0, 0] += torch.tensor([0.2, -0.2])
    pixels.requires_grad_()
    scores = Colourfulness()(Media(pixels), prompts(1), grad=True)
    assert scores.total.item() == pytest.approx(51 * math.sqrt(1.25), rel=1e-5)
    scores.parts["colour_spread"].sum().backward()
    assert pixels.grad is not None
    slope = 255 * math.sqrt(1.25) / 2
    assert pixels.grad[0, 0, 0].tolist() == pytest.approx([slope, -slope], rel=1e-4)


def test_gradient_of_plain_red_by_hand() -> None:
    pixels = plain((1.0, 0.0, 0.0)).requires_grad_()
    Colourfulness()(Media(pixels), prompts(1), grad=True).total.sum().backward()
    assert pixels.grad is not None
    per_pixel = 0.3 * 255 / 24 / math.sqrt(1.25)
    expected = [(1 + 0.25) * per_pixel, (-1 + 0.25) * per_pixel, -0.5 * per_pixel]
    assert pixels.grad.mean((0, 2, 3)).tolist() == pytest.approx(expected, rel=1e-4)


def test_grey_has_a_gradient_that_is_finite() -> None:
    pixels = torch.full((2, 3, 4, 4), 0.5).requires_grad_()
    Colourfulness()(Media(pixels), prompts(2), grad=True).total.sum().backward()
    assert pixels.grad is not None
    assert torch.equal(pixels.grad, torch.zeros_like(pixels))


def test_a_broken_picture_has_no_score_and_a_video_is_refused() -> None:
    pixels = torch.rand(3, 3, 8, 8)
    pixels[0, 1, 2, 3], pixels[2, 0, 0, 0] = math.nan, math.inf
    assert Colourfulness()(Media(pixels), prompts(3)).valid.tolist() == [False, True, False]
    with pytest.raises(ValueError, match="Colourfulness scores pictures"):
        Colourfulness()(Media(torch.rand(1, 5, 3, 8, 8), 8.0), prompts(1))


def test_the_command_scores_a_file(tmp_path: Path) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "0.png")
    words = ["score", "rewards.Colourfulness", "--media", str(tmp_path / "0.png"), "--prompt", "a", "--out"]
    assert main([*words, str(tmp_path / "scores")]) == 0
    lines = (tmp_path / "scores" / "scores.jsonl").read_text().splitlines()
    assert "colourfulness" in lines[0]
    assert json.loads(lines[0])["total"] == pytest.approx(by_hand(picture), rel=1e-5)

"""What pictures look like, in numbers that no reward is needed for: colour, clipping, fine detail, grids, variety.

A policy that exploits its reward often shows it here first: colours that run full, noise that a network takes for
texture, the pattern of a decoder's patches, or one and the same picture for all prompts. None of these numbers is good
or bad in itself; what tells is how far they go from those of the pictures that a run has started from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

HALF_STEP = 0.5 / 255  # of 8 bits: a value so near to 0 or 1 is written as 0 or 255
FINE = 0.25  # cycles per pixel: half of what pixels can hold (Nyquist's 0.5)
LINES = 8  # pixels between the lines of a grid: a latent's side in the usual VAEs, and JPEG's block
TILE = 16  # pixels: a patch of two latents, as transformers cut them; what repeats with 2, 4 or 8 repeats with 16
LEAST = (0.1 / 255) ** 2  # mean square of a change: less is rounding in a picture of one colour
SMALL = 32  # pixels: the side of the copies that are compared with one another
SMALL_STRIP = (16, 96)  # height and width of those of a video's frames side by side

NAMES = ("saturation", "clipped", "fine_detail", "grid_lines", "tiling")
ALARM = "watch/alarm/"  # and its kind: in the numbers of the evaluation that raises it first


@torch.no_grad()
def looks(pixels: Float[Tensor, "b *frames 3 h w"]) -> Float[Tensor, "b looks"]:
    """All of them in the order of `NAMES`, of videos means over their frames; in float32 on the CPU."""
    frames = pixels.float().clamp(0, 1)
    flat = frames.reshape(-1, *frames.shape[-3:])
    measures = [measure(flat) for measure in (saturation, clipped, fine_detail, grid_lines, tiling)]
    return torch.stack(measures, 1).view(len(frames), -1, len(NAMES)).mean(1).cpu()


def saturation(pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Mean over pixels of the largest channel minus the smallest (HSV's chroma): 0 for grey, 1 for pure colours."""
    return (pixels.amax(1) - pixels.amin(1)).mean((1, 2))


def clipped(pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """The share of all channels' values that 8 bits write as 0 or as 255."""
    return ((pixels < HALF_STEP) | (pixels > 1 - HALF_STEP)).float().mean((1, 2, 3))


def fine_detail(pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """The share of the spectrum's energy, without the mean's, at more than a quarter of a cycle per pixel.

    Along either axis, so that the corners of the spectrum count. 0 for a picture of one colour.
    """
    energy = torch.fft.fft2(_centred(pixels), norm="ortho").abs().square().mean(1)
    down, across = (torch.fft.fftfreq(n, device=pixels.device).abs() for n in pixels.shape[-2:])
    fine = torch.maximum(down[:, None], across[None]) > FINE
    return _share((energy * fine).mean((1, 2)), energy.mean((1, 2)))


def grid_lines(pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """How much of the squared steps between neighbouring pixels lies across the lines of a grid of 8 pixels.

    (s - e) / (1 - e), s the lines' share of the steps' energy and e that of the places where there are lines: 1 where
    the picture is made of squares of one colour, 0 where the lines are as any other place, and a little below where it
    is flat across them. 0 for a picture of one colour, and for one without a line.
    """
    down, across = pixels.diff(dim=2).square().mean((1, 3)), pixels.diff(dim=3).square().mean((1, 2))
    places = torch.cat([torch.arange(1, n, device=pixels.device) for n in pixels.shape[-2:]])
    steps, lines = torch.cat([down, across], 1), (places % LINES == 0).float()
    return _share((steps * lines).mean(1), steps.mean(1), float(lines.mean()))


def tiling(pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """How much of a picture is one tile of 16 x 16 pixels over and over, as a checkerboard or a decoder's pattern is.

    (v - 1/n) / (1 - 1/n), v the variance of the mean of the n whole tiles over the variance of all their pixels: 1
    where all tiles are one, 0 on average for noise. 0 for a picture of one colour, and for one of fewer than two tiles.
    """
    rows, columns = pixels.shape[2] // TILE, pixels.shape[3] // TILE
    if rows * columns < 2:
        return pixels.new_zeros(len(pixels))
    whole = _centred(pixels[..., : rows * TILE, : columns * TILE])
    common = whole.unflatten(3, (columns, TILE)).unflatten(2, (rows, TILE)).mean((2, 4))
    return _share(common.square().mean((1, 2, 3)), whole.square().mean((1, 2, 3)), 1 / (rows * columns))


def small(pictures: Sequence[Float[Tensor, "3 _ _"]]) -> Float[Tensor, "b d"]:
    """Small copies, 32 x 32 whatever the pictures' shapes, or 16 x 96 of strips of a video's frames; each as a row.

    Averages over areas, divided by the root of their length, so that |a - b| is the root of the mean squared
    difference: 1 between black and white. In float64.
    """
    sizes = [SMALL_STRIP if one.shape[-1] > 3 * one.shape[-2] else (SMALL, SMALL) for one in pictures]
    copies = [interpolate(one[None].double(), size, mode="area") for one, size in zip(pictures, sizes, strict=True)]
    rows = torch.cat([one.flatten(1) for one in copies])
    return rows / rows.shape[1] ** 0.5


def variety(copies: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """The mean distance of each small copy to all others; 0 for a single one.

    In [0, 1]: 0 where all are one picture.
    """
    distances = torch.cdist(copies, copies, compute_mode="use_mm_for_euclid_dist").fill_diagonal_(0)
    return distances.sum(1) / max(len(copies) - 1, 1)


def _centred(pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    return pixels - pixels.mean((2, 3), keepdim=True)


def _share(part: Float[Tensor, " b"], whole: Float[Tensor, " b"], expected: float = 0.0) -> Float[Tensor, " b"]:
    """part / whole, as a share of what is above the expected one; 0 where the whole is rounding."""
    known = whole > LEAST
    return ((part / whole.where(known, 1.0) - expected) / (1 - expected)).where(known, 0.0)

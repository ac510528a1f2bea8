"""What shape an object has, from how much of every pixel it covers: steady where frames are blurred and noisy.

The verifier of pictures compares bounding boxes, which one pixel of noise can move. Here the cover of an object is read
softly and resampled about its centroid, in units of the root of its area; patches of several frames can be averaged.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from jaxtyping import Float, Int
from scipy.ndimage import uniform_filter

from flowalign.shapes.scenes import COLORS, GREY, SHAPES, Placed, draw

REACH = 12  # pixels from the centre of an object that are looked at; the largest one's patch ends at 11.4
FAINT, FULL = 0.2, 0.75  # cover in units of a colour's contrast that counts as none, as noise is, and as whole
GRID = np.linspace(-0.95, 0.95, 11)  # of a patch, in roots of the area; a triangle's top lies at 0.94
RADII = ((3.8, 4.8), (4.8, 6.2))  # half extents of the two sizes of templates


def patches(
    frames: Float[np.ndarray, "n 3 h w"],
    which: Int[np.ndarray, " k"],
    centers: Float[np.ndarray, "k 2"],
    colors: list[str],
) -> Float[np.ndarray, "k cells"]:
    """The cover of each object, about its centroid and at the scale of its area.

    Args:
        frames: in [0, 1].
        which: the frame of each object.
        centers: about where it is, x and y in pixels.
        colors: its colour.
    """
    padded = np.pad((frames - GREY).astype(np.float32), ((0, 0), (0, 0), (REACH, REACH), (REACH, REACH)))
    corner = np.rint(centers).astype(int)  # of the window, in the padded frame
    steps = np.arange(2 * REACH)
    at = which[:, None, None], corner[:, 1, None, None] + steps[:, None], corner[:, 0, None, None] + steps
    contrast = np.array([COLORS[color] for color in colors], dtype=np.float32).reshape(-1, 3, 1, 1) - GREY
    channels = [padded[:, channel][at] / contrast[:, channel] for channel in range(3)]
    share = np.minimum.reduce(channels)  # of another colour's pixels none is whole in all channels
    cover = np.clip((np.nan_to_num(share) - FAINT) / (FULL - FAINT), 0, 1)
    area = np.maximum(cover.sum((1, 2)), 1e-6)
    rows, columns = (cover.sum(axis) @ steps / area for axis in (2, 1))
    spots = np.sqrt(area)[:, None] * GRID.astype(np.float32)
    return _sample(cover, rows[:, None] + spots, columns[:, None] + spots)


def _sample(
    cover: Float[np.ndarray, "k h w"], rows: Float[np.ndarray, "k g"], columns: Float[np.ndarray, "k g"]
) -> Float[np.ndarray, "k cells"]:
    """Bilinear samples at all pairs of rows and columns, 0 outside; in two matrix products of hat functions."""
    pixels = np.arange(cover.shape[1])
    down, across = (np.maximum(0, 1 - np.abs(spots[:, :, None] - pixels)) for spots in (rows, columns))
    return (down @ cover @ across.transpose(0, 2, 1)).reshape(len(cover), -1)


@cache
def _templates() -> Float[np.ndarray, "shapes variants cells"]:
    """The mean patch of each shape, in two sizes: as it is drawn, and through an average of 3 x 3 pixels."""
    rng = np.random.default_rng(0)
    made = []
    for shape in SHAPES:
        spots = [(*rng.uniform(15, 17, 2), rng.uniform(*radii)) for radii in RADII for _ in range(120)]
        crisp = np.stack([draw([Placed("black", shape, *spot)]) for spot in spots]) / 255
        blurred = uniform_filter(crisp, (0, 0, 3, 3), mode="nearest")
        cuts = [
            patches(frames, np.arange(240), np.full((240, 2), 16.0), ["black"] * 240) for frames in (crisp, blurred)
        ]
        made.append(np.concatenate([cut.reshape(len(RADII), 120, -1).mean(1) for cut in cuts]))
    return np.stack(made)


def resemblance(cut: Float[np.ndarray, "k cells"]) -> Float[np.ndarray, "k shapes"]:
    """How much a patch overlaps with that of each shape, in [0, 1]: 1 - sum |p - t| / sum (p + t) of the best template.

    The share of the whole that both have in common is Bray and Curtis's similarity (Ecol. Monogr. 27(4), 1957).
    """
    wanted = _templates()[None]
    differing = np.abs(cut[:, None, None] - wanted).sum(-1)
    return 1 - (differing / (cut[:, None, None] + wanted).sum(-1)).min(-1)

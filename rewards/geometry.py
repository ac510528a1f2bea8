"""How an object has moved, grown or stayed, from its box before and after an edit; Talk2Move (arXiv:2601.02356).

    o = centre after - centre before,   z = 0.1 (extents before + after),   d = sign(o) max(|o| - z, 0) / |o|_2
    translation = d . u,   staying = 1 - (|d_x| + |d_y|) / 2,   resizing = 1 - (|w'/w - f| + |h'/h - f|) / 4

u is the unit vector of the wanted direction, f the wanted factor of both sides. The dead zone z, axis by axis, is that
of GenEval's relations (arXiv:2310.11513).

Boxes are [b, 4]: left, top, right and bottom, x to the right and y downwards, those before and after in pixels of one
picture size: distances along x and y are compared, and fractions of a picture that is not square would not do. A box of
nan is one that was not found; whatever is made of it is nan.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

DEAD_ZONE = 0.1  # share of both boxes' extents along an axis within which an object counts as not moved along it
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

Boxes = Float[Tensor, "b 4"]


def direction_of(text: str) -> tuple[float, float]:
    """The unit vector (x to the right, y downwards) of "left", "right", "up", "down", or of two as in "up left".

    Raises: ValueError for any other text.
    """
    words = text.lower().replace("-", " ").split()
    named = [DIRECTIONS[word] for word in dict.fromkeys(words) if word in DIRECTIONS]
    x, y = (sum(axis) for axis in zip(*named, strict=True)) if named else (0, 0)
    if not words or abs(x) + abs(y) != len(words):
        raise ValueError(f'a direction is left, right, up or down, or two of them as in "up left", not {text!r}')
    return x / math.hypot(x, y), y / math.hypot(x, y)


def center(boxes: Boxes) -> Float[Tensor, "b 2"]:
    """The middle of each box."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def extent(boxes: Boxes) -> Float[Tensor, "b 2"]:
    """The width and height of each box."""
    return boxes[:, 2:] - boxes[:, :2]


def displacement(before: Boxes, after: Boxes) -> Float[Tensor, "b 2"]:
    """d: the way of the centres beyond the dead zone, as a share of the whole way; 0 for what did not move.

    |d| < 1: it nears 1 as the way grows, and does not tell how far an object went. Positive to the right and downwards.
    The authors' code takes before - after, so that a negative x there means moved to the right.
    """
    way = center(after) - center(before)
    beyond = way.sign() * (way.abs() - DEAD_ZONE * (extent(before) + extent(after))).clamp(min=0)
    return beyond / way.norm(dim=1, keepdim=True).clamp(min=torch.finfo(way.dtype).tiny)


def translation(before: Boxes, after: Boxes, direction: Float[Tensor, "b 2"]) -> Float[Tensor, " b"]:
    """d . u in (-1, 1): positive where it moved in the direction, negative against it, 0 aside or not at all.

    The authors give 0 against the direction, and for shares of up to 0.01; of two directions, as in "up left", they
    count the one along x, and the other only where there is none along x.

    Args:
        direction: unit vectors, as of `direction_of`.
    """
    return (displacement(before, after) * direction).sum(1)


def staying(before: Boxes, after: Boxes) -> Float[Tensor, " b"]:
    """1 - (|d_x| + |d_y|) / 2, between 0.29 and 1: 1 where the centre did not leave the dead zone."""
    return 1 - displacement(before, after).abs().sum(1) / 2


def resizing(before: Boxes, after: Boxes, factor: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """1 - (|w'/w - f| + |h'/h - f|) / 4, at most 1: 1 where both sides were multiplied by f.

    For f < 1 the ratios before / after are compared with 1 / f, so that halving counts as doubling does. An object left
    as it was, with f = 2, has 1/2. As in the authors' code, which is told 1 / f and "smaller", f is of the sides: the
    area grows by its square. A box without an extent has no ratio, and gives infinity or nan.

    Args:
        factor: f, positive.
    """
    shrinks = (factor < 1)[:, None]
    ratio = torch.where(shrinks, extent(before) / extent(after), extent(after) / extent(before))
    wanted = torch.where(shrinks, 1 / factor[:, None], factor[:, None])
    return 1 - (ratio - wanted).abs().sum(1) / 4

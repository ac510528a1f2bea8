"""An honest judge of pictures of shapes: it reads pixels only, and never the scene that a picture was drawn from.

Pixels are told from the background and from one another by the signs of (channel - grey); connected pixels of one
colour make an object; its bounding box, resampled to 8 x 8, is compared with the four shapes. Then every clause of the
caption is checked: the objects that it names, their counts and sizes, the relation, and that nothing else is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from flowalign.shapes.scenes import COLORS, GREY, RELATIONS, SHAPES, Group, Placed, Spec, draw

LEAST_CONTRAST = 0.16  # of every channel against grey, for a pixel to belong to an object; about half an object's own
LEAST_AREA = 10  # pixels; the smallest object has 20, and the specks of a decoder are smaller
LEAST_AGREEMENT = 0.78  # share of the 8 x 8 cells that must match a shape
LARGEST = 16.0  # pixels of extent; the largest object has 13.6 and covers 15 of them, and the background is no object
SIZE_BOUNDARY = 10.0  # pixels of extent between small (at most 8.4) and large (at least 11.6)
TEMPLATE_BOUNDARIES = (7.3, 8.8)  # pixels of extent between templates: boxes of up to 7 x 7, then of small objects
CELLS = 8


@dataclass(frozen=True)
class Detected:
    """An object found in a picture: "unknown" where its outline is no shape's or too large; extent, centre in pixels.

    `agreement` is the share of cells that match each shape, in the order of `SHAPES`. `box` is left, top, right and
    bottom in pixels, the last two exclusive.
    """

    color: str
    shape: str
    x: float
    y: float
    extent: float
    agreement: tuple[float, ...]
    box: tuple[float, float, float, float]


@cache
def _templates() -> Float[np.ndarray, "sizes shapes cells"]:
    """What each shape's bounding box looks like in 8 x 8 cells, for boxes of three sizes.

    Averages over sizes and sub-pixel places, drawn and cut out as any picture is: a circle of seven pixels is nearly a
    square, and what pixels do to its corners is in its template.
    """
    rng = np.random.default_rng(0)
    average = np.zeros((len(TEMPLATE_BOUNDARIES) + 1, len(SHAPES), CELLS**2))
    for i, shape in enumerate(SHAPES):
        radii = np.concatenate([rng.uniform(3.4, 4.4, 240), rng.uniform(4.4, 6.8, 240)])
        spots = zip(*rng.uniform(15, 17, (2, len(radii))), radii, strict=True)
        contrast = np.stack([draw([Placed("black", shape, *spot)]) for spot in spots]) / 255 - GREY
        boxes, cells = _cut_out(contrast)
        size = _template_of(_extent(boxes))
        average[:, i] = [cells[size == k].mean(0) for k in range(len(average))]
    return average


def _template_of(extent: Float[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
    return np.searchsorted(TEMPLATE_BOUNDARIES, extent)


@cache
def _color_codes() -> dict[int, str]:
    return {sum(1 << c for c in range(3) if rgb[c] > GREY): name for name, rgb in COLORS.items()}


@dataclass(frozen=True)
class _Boxes:
    """Components of all pictures: which picture, colour code, and bounding box [top, bottom) x [left, right)."""

    picture: Int[np.ndarray, " k"]
    code: Int[np.ndarray, " k"]
    top: Int[np.ndarray, " k"]
    bottom: Int[np.ndarray, " k"]
    left: Int[np.ndarray, " k"]
    right: Int[np.ndarray, " k"]


def _extent(boxes: _Boxes) -> Float[np.ndarray, " k"]:
    return np.sqrt((boxes.bottom - boxes.top) * (boxes.right - boxes.left))


def detect(pixels: Float[Tensor, "b 3 h w"]) -> list[list[Detected]]:
    """The objects of each picture in [0, 1], largest first."""
    boxes, cells = _cut_out(pixels.detach().float().cpu().numpy() - GREY)
    extent = _extent(boxes)
    agreement = 1 - np.abs(cells[:, None] - _templates()[_template_of(extent)]).mean(2)
    found: list[list[Detected]] = [[] for _ in range(len(pixels))]
    for i, picture in enumerate(boxes.picture):
        height, width = int(boxes.bottom[i] - boxes.top[i]), int(boxes.right[i] - boxes.left[i])
        regular = 0.7 <= width / height <= 1.43 and extent[i] <= LARGEST and agreement[i].max() >= LEAST_AGREEMENT
        found[picture].append(
            Detected(
                _color_codes()[int(boxes.code[i])],
                SHAPES[int(agreement[i].argmax())] if regular else "unknown",
                float(boxes.left[i] + boxes.right[i]) / 2,
                float(boxes.top[i] + boxes.bottom[i]) / 2,
                float(extent[i]),
                tuple(float(value) for value in agreement[i]),
                (float(boxes.left[i]), float(boxes.top[i]), float(boxes.right[i]), float(boxes.bottom[i])),
            )
        )
    return found


def _cut_out(contrast: Float[np.ndarray, "b 3 h w"]) -> tuple[_Boxes, Float[np.ndarray, "k cells"]]:
    """All objects of all pictures, largest first: their boxes, and how much of each cell of the box they fill."""
    solid = (np.abs(contrast) >= LEAST_CONTRAST).all(1)
    code = ((contrast > 0) * np.array([1, 2, 4])[:, None, None]).sum(1)
    at = np.nonzero(solid)
    label, count = _components(solid, code, at)
    area = np.bincount(label, minlength=count)
    kept = np.nonzero(area >= LEAST_AREA)[0]
    kept = kept[np.argsort(-area[kept], kind="stable")]
    if not len(kept):
        empty = np.zeros(0, dtype=int)
        return _Boxes(*[empty] * 6), np.zeros((0, CELLS**2))
    order = np.argsort(label, kind="stable")
    first = np.searchsorted(label[order], np.arange(count))
    picture, rows, columns = (axis[order] for axis in at)
    boxes = _Boxes(
        picture[first][kept],
        code[at][order][first][kept],
        np.minimum.reduceat(rows, first)[kept],
        np.maximum.reduceat(rows, first)[kept] + 1,
        np.minimum.reduceat(columns, first)[kept],
        np.maximum.reduceat(columns, first)[kept] + 1,
    )
    labels = np.full(solid.shape, -1)
    labels[at] = label
    return boxes, _cells(labels, kept, boxes)


def _components(
    solid: Bool[np.ndarray, "b h w"], code: Int[np.ndarray, "b h w"], at: tuple[np.ndarray, ...]
) -> tuple[Int[np.ndarray, " n"], int]:
    """Numbers the connected pixels of one colour, over all pictures at once; the pixels are those of `at`."""
    number = np.full(solid.shape, -1)
    number[at] = np.arange(len(at[0]))
    down = solid[:, :-1] & solid[:, 1:] & (code[:, :-1] == code[:, 1:])
    across = solid[:, :, :-1] & solid[:, :, 1:] & (code[:, :, :-1] == code[:, :, 1:])
    one = np.concatenate([number[:, :-1][down], number[:, :, :-1][across]])
    other = np.concatenate([number[:, 1:][down], number[:, :, 1:][across]])
    graph = coo_matrix((np.ones(len(one), dtype=np.int8), (one, other)), shape=(len(at[0]),) * 2)
    count, label = connected_components(graph, directed=False)
    return label, int(count)


def _cells(
    labels: Int[np.ndarray, "b h w"], numbers: Int[np.ndarray, " k"], boxes: _Boxes
) -> Float[np.ndarray, "k cells"]:
    ticks = (np.arange(CELLS * 2) + 0.5) / (CELLS * 2)
    rows = np.floor(boxes.top[:, None] + ticks * (boxes.bottom - boxes.top)[:, None]).astype(int)
    columns = np.floor(boxes.left[:, None] + ticks * (boxes.right - boxes.left)[:, None]).astype(int)
    mask = labels[boxes.picture[:, None, None], rows[:, :, None], columns[:, None, :]] == numbers[:, None, None]
    return mask.reshape(len(numbers), CELLS, 2, CELLS, 2).mean((2, 4)).reshape(len(numbers), CELLS**2)


def _is(thing: Detected, group: Group) -> bool:
    return thing.color == group.color and thing.shape == group.shape


def _likeness(thing: Detected, group: Group) -> float:
    """1 for the named object; half for the colour alone, or less the less the outline resembles the shape."""
    if thing.color != group.color:
        return 0.0
    return 1.0 if thing.shape == group.shape else 0.5 * thing.agreement[SHAPES.index(group.shape)]


def _size_right(thing: Detected, size: str) -> float:
    beyond = thing.extent - SIZE_BOUNDARY if size == "large" else SIZE_BOUNDARY - thing.extent
    return float(1 / (1 + np.exp(-2 * beyond)))


def _alignment(first: Detected, second: Detected, relation: str) -> float:
    """Cosine of the angle between first - second and the direction that the relation names."""
    offset = np.array([first.x - second.x, first.y - second.y])
    return float(offset @ np.array(RELATIONS[relation]) / max(float(np.hypot(*offset)), 1e-6))


def clauses(spec: Spec, things: list[Detected]) -> dict[str, float]:
    """A score in [0, 1] for every clause of a caption, smooth enough to climb; 1 (over one half for size and relation)
    where the clause holds.

    As in GenEval (arXiv:2310.11513) a relation holds where the offset lies within 60 degrees of its direction, and
    counts are exact.
    """
    scores: dict[str, float] = {}
    best = []
    for i, group in enumerate(spec.groups):
        likeness = sorted(((_likeness(thing, group), j) for j, thing in enumerate(things)), reverse=True)[: group.count]
        scores[f"object {i}"] = sum(value for value, _ in likeness) / group.count
        exact = sum(_is(thing, group) for thing in things)
        scores[f"count {i}"] = max(0.0, 1 - abs(exact - group.count) / group.count)
        best.append(things[likeness[0][1]] if likeness and likeness[0][0] == 1 else None)
        if group.size is not None:
            scores[f"size {i}"] = _size_right(best[i], group.size) if best[i] is not None else 0.0  # type: ignore[arg-type]
    if spec.relation is not None:
        one, other = best[0], best[1]
        met = one is not None and other is not None
        scores["relation"] = (
            float(1 / (1 + np.exp(-4 * (_alignment(one, other, spec.relation) - 0.5))))  # type: ignore[arg-type]
            if met
            else 0.0
        )
    wanted = sum(group.count for group in spec.groups)
    scores["nothing else"] = max(0.0, 1 - abs(len(things) - wanted) / wanted)
    return scores


def passes(scores: dict[str, float]) -> bool:
    """Whether every clause holds."""
    return all(value >= 0.5 if name.startswith(("size", "relation")) else value == 1 for name, value in scores.items())


def verify(pixels: Float[Tensor, "b 3 h w"], specs: list[Spec]) -> tuple[list[dict[str, float]], Bool[Tensor, " b"]]:
    """Clause scores and the strict verdict for each picture against its own spec."""
    scores = [clauses(spec, things) for spec, things in zip(specs, detect(pixels), strict=True)]
    return scores, torch.tensor([passes(score) for score in scores], dtype=torch.bool)

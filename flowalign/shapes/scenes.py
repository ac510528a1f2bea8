"""Scenes of coloured shapes: what a caption asks for, how it is worded, and a picture that shows it.

A `Spec` is the meaning of a caption. `render` draws one of the many scenes that fit it; `corrupt` gives a neighbouring
meaning that is wrong in one respect, as captions on the web often are. Pictures are 32 x 32 on mid grey; every colour
is near a corner of the RGB cube, so that the sign of (channel - grey) tells colours apart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

SIZE = 32
GREY = 0.5
SHAPES = ("circle", "square", "triangle", "cross")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.80, 0.15),
    "blue": (0.12, 0.20, 0.92),
    "yellow": (0.95, 0.88, 0.10),
    "purple": (0.80, 0.12, 0.88),
    "cyan": (0.10, 0.85, 0.90),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.05),
}
RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
VERTICAL = {"above": ("above", "over", "on top of"), "below": ("below", "under", "beneath")}
KINDS = ("single", "size", "count", "pair", "relation", "triple", "count_pair")
# These pairs stand in no training caption: held-out prompts that name them test composition, not memory.
UNSEEN = frozenset({("red", "cross"), ("cyan", "triangle"), ("purple", "square"), ("white", "circle")})
# An object's half extent in pixels, by size word; the verifier's threshold lies in the gap between small and large.
RADII: dict[str | None, tuple[float, float]] = {"small": (3.4, 4.2), "large": (5.8, 6.8), None: (3.6, 5.8)}
NUMBERS = {2: "two", 3: "three"}


def known(name: str, value: Any, words: tuple[Any, ...]) -> None:
    """Raises: ValueError for a value that is none of these words."""
    if value not in words:
        raise ValueError(f"{name} {value!r} is none of {', '.join(str(word) for word in words if word is not None)}")


@dataclass(frozen=True)
class Group:
    """`count` objects of one colour and shape, of a size if one is asked for ("small" or "large").

    Raises: ValueError for words that this world does not know, and a count that is no positive whole number.
    """

    color: str
    shape: str
    count: int = 1
    size: str | None = None

    def __post_init__(self) -> None:
        known("color", self.color, tuple(COLORS))
        known("shape", self.shape, SHAPES)
        known("size", self.size, tuple(RADII))
        if not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"count must be a positive whole number, not {self.count!r}")


@dataclass(frozen=True)
class Spec:
    """What a caption asks for: groups of objects and, between the first two groups, perhaps a relation.

    Raises: ValueError for no group, an unknown kind or relation, and a relation of fewer than two groups.
    """

    kind: str
    groups: tuple[Group, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        known("kind", self.kind, KINDS)
        known("relation", self.relation, (*RELATIONS, None))
        least = 1 if self.relation is None else 2
        if len(self.groups) < least:
            raise ValueError(f"it has {len(self.groups)} groups, and needs at least {least}")

    @property
    def unseen(self) -> bool:
        """Whether it names a colour and shape together that no training caption does."""
        return any((g.color, g.shape) in UNSEEN for g in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data, for a prompt's metadata."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Any) -> Spec:
        """The inverse of `to_dict`. Raises: KeyError, TypeError or ValueError for other data."""
        return Spec(data["kind"], tuple(Group(**group) for group in data["groups"]), data.get("relation"))


def _distinct_objects(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    colors, shapes = rng.choice(list(COLORS), count, replace=False), rng.choice(SHAPES, count, replace=False)
    return [(str(color), str(shape)) for color, shape in zip(colors, shapes, strict=True)]


def random_spec(rng: np.random.Generator, kinds: tuple[str, ...] = KINDS) -> Spec:
    """A meaning drawn at random: its kind first, then colours and shapes (all different within a scene) and counts."""
    kind = str(rng.choice(kinds))
    if kind == "single" or kind == "size":
        color, shape = _distinct_objects(rng, 1)[0]
        size = str(rng.choice(["small", "large"])) if kind == "size" else None
        return Spec(kind, (Group(color, shape, size=size),))
    if kind == "count":
        color, shape = _distinct_objects(rng, 1)[0]
        return Spec(kind, (Group(color, shape, count=int(rng.integers(2, 4))),))
    if kind == "count_pair":
        first, second = _distinct_objects(rng, 2)
        return Spec(kind, (Group(*first, count=2), Group(*second)))
    groups = tuple(Group(*named) for named in _distinct_objects(rng, 3 if kind == "triple" else 2))
    return Spec(kind, groups, str(rng.choice(list(RELATIONS))) if kind == "relation" else None)


def corrupt(spec: Spec, rng: np.random.Generator) -> Spec:
    """The same meaning with one thing wrong: relation reversed, another count or size, or two colours exchanged."""
    first = spec.groups[0]
    if spec.kind == "relation" and spec.relation is not None:
        return replace(spec, relation=OPPOSITE[spec.relation])
    if spec.kind == "count":
        return replace(spec, groups=(replace(first, count=5 - first.count),))
    if spec.kind == "size":
        return replace(spec, groups=(replace(first, size="large" if first.size == "small" else "small"),))
    if spec.kind == "count_pair":
        second = spec.groups[1]
        return replace(spec, groups=(replace(first, count=1), replace(second, count=2)))
    if spec.kind in ("pair", "triple"):
        i, j = rng.choice(len(spec.groups), 2, replace=False)
        groups = list(spec.groups)
        groups[i], groups[j] = replace(groups[i], color=groups[j].color), replace(groups[j], color=groups[i].color)
        return replace(spec, groups=tuple(groups))
    shape = str(rng.choice([s for s in SHAPES if s != first.shape]))
    return replace(spec, groups=(replace(first, shape=shape),))


def caption(spec: Spec, rng: np.random.Generator) -> str:
    """One of several wordings of the same meaning, in lower case."""
    words = [_words(group) for group in spec.groups]
    if spec.relation in ("left of", "right of"):
        side = spec.relation.split()[0]
        link = str(rng.choice([f"{side} of", f"to the {side} of", f"on the {side} of"]))
    elif spec.relation is not None:
        link = str(rng.choice(VERTICAL[spec.relation]))
    if spec.relation is not None:
        text = f"{words[0]} {link} {words[1]}"
    elif len(words) == 3:
        text = f"{words[0]}, {words[1]} and {words[2]}"
    else:
        text = str(rng.choice([" and ", " with "])).join(words)
    opening = "there are " if spec.groups[0].count > 1 else "there is "
    return str(rng.choice(["", opening])) + text


def _words(group: Group) -> str:
    number = NUMBERS.get(group.count, "a")
    size = f"{group.size} " if group.size else ""
    plural = ("es" if group.shape.endswith("s") else "s") if group.count > 1 else ""
    return f"{number} {size}{group.color} {group.shape}{plural}"


@dataclass(frozen=True)
class Placed:
    """An object in a picture: centre and half extent in pixels."""

    color: str
    shape: str
    x: float
    y: float
    radius: float


def place(spec: Spec, rng: np.random.Generator) -> list[Placed]:
    """Positions and sizes of all objects of a scene that fits the spec: inside the picture, two pixels apart at least.

    A relation is drawn clearly: its axis holds at least 1.5 times the other axis's distance.
    """
    wanted = [group for group in spec.groups for _ in range(group.count)]
    while True:
        radii = [rng.uniform(*RADII[group.size]) for group in wanted]
        if len(wanted) == 3:
            radii = [min(radius, 5.0) for radius in radii]
        placed = [
            Placed(g.color, g.shape, rng.uniform(r + 1, SIZE - r - 1), rng.uniform(r + 1, SIZE - r - 1), r)
            for g, r in zip(wanted, radii, strict=True)
        ]
        if apart(placed) and (spec.relation is None or related(placed[0], placed[1], spec.relation)):
            return placed


def apart(placed: list[Placed]) -> bool:
    """Whether objects are two pixels apart at least, box from box."""
    pairs = [(a, b) for i, a in enumerate(placed) for b in placed[i + 1 :]]
    return all(max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + 2 for a, b in pairs)


def related(first: Placed, second: Placed, relation: str) -> bool:
    """Whether a relation holds clearly: its axis holds at least 1.5 times the other axis's distance."""
    across, down = RELATIONS[relation]
    dx, dy = first.x - second.x, first.y - second.y
    along, aside = (dx * across, abs(dy)) if across else (dy * down, abs(dx))
    return along > 0 and along >= 1.5 * aside


def inside(shape: str, u: Float[np.ndarray, "*n"], v: Float[np.ndarray, "*m"]) -> np.ndarray:
    """Whether points (u right, v down, in half extents from the centre) lie in a shape that fills [-1, 1] squared."""
    box = np.maximum(np.abs(u), np.abs(v)) <= 1
    if shape == "circle":
        return u * u + v * v <= 1
    if shape == "triangle":
        return box & (np.abs(u) <= (v + 1) / 2)
    if shape == "cross":
        return box & (np.minimum(np.abs(u), np.abs(v)) <= 1 / 3)
    return box


def draw(placed: list[Placed], supersample: int = 4) -> UInt8[np.ndarray, "3 h w"]:
    """The picture of placed objects, antialiased by supersampling."""
    ticks = (np.arange(SIZE * supersample, dtype=np.float32) + 0.5) / supersample
    canvas = np.full((3, SIZE, SIZE), GREY, dtype=np.float32)
    for item in placed:
        mask = inside(item.shape, (ticks[None, :] - item.x) / item.radius, (ticks[:, None] - item.y) / item.radius)
        cover = mask.reshape(SIZE, supersample, SIZE, supersample).mean(axis=(1, 3), dtype=np.float32)
        canvas += cover * (np.asarray(COLORS[item.color], dtype=np.float32)[:, None, None] - canvas)
    return np.round(canvas * 255).astype(np.uint8)


def render(spec: Spec, rng: np.random.Generator) -> UInt8[np.ndarray, "3 h w"]:
    """A picture of one scene that fits the spec."""
    return draw(place(spec, rng))

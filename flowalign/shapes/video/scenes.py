"""Moving scenes of coloured shapes: what a caption of a video asks for, and how it is worded.

A `Spec` is the meaning of a caption. `corrupt` gives a neighbouring meaning that is wrong in one respect. What a
caption does not set in motion stays where it is. Colours, shapes and the pairs of them that no training caption names
are those of the pictures, `flowalign.shapes.scenes`. "quickly" and "slowly" are about the way that an object makes from
the first frame to the last, in pixels, so that neither the number of frames nor their rate matters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from flowalign.shapes.scenes import COLORS, SHAPES, UNSEEN, known

FRAMES = 9  # 4 k + 1, as Wan's autoencoder takes them
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
STILL = "still"
SPEEDS = ("slowly", "quickly")
MEETINGS = ("meet", "part")
KINDS = ("move", "speed", "still", "opposite", "meeting", "change")
# Beside `UNSEEN` pairs of colour and shape, these stand in no training caption: a colour that moves so, or turns so.
UNSEEN_MOTIONS = frozenset({("blue", "left"), ("black", "right"), ("yellow", "up"), ("purple", "down")})
UNSEEN_CHANGES = frozenset({("red", "green"), ("blue", "yellow"), ("white", "black"), ("cyan", "red")})


@dataclass(frozen=True)
class Actor:
    """An object and what it does.

    motion: a direction or "still"; None where the spec's meeting says it. speed: "slowly" or "quickly", if the caption
    says so. becomes: the colour it has in the end, where that is another one.

    Raises: ValueError for words that this world does not know.
    """

    color: str
    shape: str
    motion: str | None = STILL
    speed: str | None = None
    becomes: str | None = None

    def __post_init__(self) -> None:
        known("color", self.color, tuple(COLORS))
        known("shape", self.shape, SHAPES)
        known("motion", self.motion, (*DIRECTIONS, STILL, None))
        known("speed", self.speed, (*SPEEDS, None))
        known("becomes", self.becomes, (*COLORS, None))


@dataclass(frozen=True)
class Spec:
    """What a caption asks for: one or two objects, all of different colours and shapes, and perhaps a meeting.

    meeting: "meet" or "part", where the caption is about both objects together.

    Raises: ValueError for an unknown kind or meeting, no object, and a meeting of one.
    """

    kind: str
    actors: tuple[Actor, ...]
    meeting: str | None = None

    def __post_init__(self) -> None:
        known("kind", self.kind, KINDS)
        known("meeting", self.meeting, (*MEETINGS, None))
        least = 1 if self.meeting is None else 2
        if len(self.actors) < least:
            raise ValueError(f"it has {len(self.actors)} actors, and needs at least {least}")

    @property
    def unseen(self) -> bool:
        """Whether it names together what no training caption does: colour and shape, or motion, or next colour."""
        return any(
            (actor.color, actor.shape) in UNSEEN
            or (actor.becomes, actor.shape) in UNSEEN
            or (actor.color, actor.motion) in UNSEEN_MOTIONS
            or (actor.color, actor.becomes) in UNSEEN_CHANGES
            for actor in self.actors
        )

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data, for a prompt's metadata."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Any) -> Spec:
        """The inverse of `to_dict`. Raises: KeyError, TypeError or ValueError for other data."""
        return Spec(data["kind"], tuple(Actor(**actor) for actor in data["actors"]), data.get("meeting"))


def _choose(options: tuple[str, ...] | list[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def random_spec(rng: np.random.Generator, kinds: tuple[str, ...] = KINDS) -> Spec:
    """A meaning drawn at random: its kind first, then colours and shapes (all different within a scene) and motions."""
    kind = _choose(kinds, rng)
    colors, shapes = rng.choice(list(COLORS), 2, replace=False), rng.choice(SHAPES, 2, replace=False)
    first, second = (Actor(str(color), str(shape)) for color, shape in zip(colors, shapes, strict=True))
    direction = _choose(tuple(DIRECTIONS), rng)
    moving = replace(first, motion=direction)
    if kind == "move":
        return Spec(kind, (moving,))
    if kind == "speed":
        return Spec(kind, (replace(moving, speed=_choose(SPEEDS, rng)),))
    if kind == "change":
        return Spec(kind, (replace(first, becomes=second.color),))
    if kind == "still":
        return Spec(kind, (moving, second))
    if kind == "opposite":
        return Spec(kind, (moving, replace(second, motion=OPPOSITE[direction])))
    return Spec(kind, (replace(first, motion=None), replace(second, motion=None)), _choose(MEETINGS, rng))


def _turned(spec: Spec, rng: np.random.Generator) -> Spec:
    """Everything moves the other way."""
    return replace(spec, actors=tuple(replace(a, motion=OPPOSITE.get(str(a.motion), a.motion)) for a in spec.actors))


def _redirected(spec: Spec, rng: np.random.Generator) -> Spec:
    """The first object moves in one of the three other directions."""
    first, *others = spec.actors
    others_of = [direction for direction in DIRECTIONS if direction != first.motion]
    return replace(spec, actors=(replace(first, motion=_choose(others_of, rng)), *others))


def _other_shape(spec: Spec, rng: np.random.Generator) -> Spec:
    """The first object has a shape that no object had."""
    first, *others = spec.actors
    left = [shape for shape in SHAPES if shape not in {actor.shape for actor in spec.actors}]
    return replace(spec, actors=(replace(first, shape=_choose(left, rng)), *others))


def _other_speed(spec: Spec, rng: np.random.Generator) -> Spec:
    first = spec.actors[0]
    return replace(spec, actors=(replace(first, speed="slowly" if first.speed == "quickly" else "quickly"),))


def _colors_exchanged(spec: Spec, rng: np.random.Generator) -> Spec:
    one, other = spec.actors
    return replace(spec, actors=(replace(one, color=other.color), replace(other, color=one.color)))


def _other_one_moves(spec: Spec, rng: np.random.Generator) -> Spec:
    one, other = spec.actors
    return replace(spec, actors=(replace(other, motion=one.motion), replace(one, motion=other.motion)))


def _other_meeting(spec: Spec, rng: np.random.Generator) -> Spec:
    return replace(spec, meeting="part" if spec.meeting == "meet" else "meet")


def _backwards(spec: Spec, rng: np.random.Generator) -> Spec:
    """The last colour comes first."""
    first = spec.actors[0]
    assert first.becomes is not None
    return replace(spec, actors=(replace(first, color=first.becomes, becomes=first.color),))


def _other_end(spec: Spec, rng: np.random.Generator) -> Spec:
    first = spec.actors[0]
    left = [color for color in COLORS if color not in (first.color, first.becomes)]
    return replace(spec, actors=(replace(first, becomes=_choose(left, rng)),))


MISTAKES: dict[str, tuple[Callable[[Spec, np.random.Generator], Spec], ...]] = {
    "move": (_turned, _redirected, _other_shape),
    "speed": (_other_speed, _turned),
    "still": (_other_one_moves, _turned, _colors_exchanged),
    "opposite": (_turned, _colors_exchanged),
    "meeting": (_other_meeting, _other_meeting, _other_shape),
    "change": (_backwards, _other_end),
}


def corrupt(spec: Spec, rng: np.random.Generator) -> Spec:
    """The same meaning with one thing wrong: where to, how fast, which one, meeting or parting, or which colours."""
    mistakes = MISTAKES[spec.kind]
    return mistakes[int(rng.integers(len(mistakes)))](spec, rng)


WAYS = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
}
# {a} and {b} are the objects, {way} and {back} where to they go
WORDINGS = {
    "move": ("{a} moves {way}", "{a} moving {way}", "there is {a} moving {way}"),
    "speed": ("{a} moves {way} {speed}", "{a} {speed} moves {way}", "{a} moving {way} {speed}"),
    "still": (
        "{a} moves {way} while {b} stays still",
        "{b} stays still while {a} moves {way}",
        "{a} moves {way} and {b} does not move",
    ),
    "opposite": (
        "{a} moves {way} and {b} moves {back}",
        "{a} moves {way} while {b} moves {back}",
        "{a} moving {way} and {b} moving {back}",
    ),
    "meet": ("{a} and {b} meet", "{a} meets {b}", "{a} and {b} come together"),
    "part": ("{a} and {b} part", "{a} parts from {b}", "{a} and {b} move apart"),
    "change": (
        "{a} turns {end}",
        "{a} becomes {end}",
        "a {shape} changes from {start} to {end}",
        "a {shape} turns from {start} to {end}",
    ),
}


def caption(spec: Spec, rng: np.random.Generator) -> str:
    """One of several wordings of the same meaning, in lower case."""
    first, last = spec.actors[0], spec.actors[-1]
    form = int(rng.integers(2))
    return _choose(WORDINGS[spec.meeting or spec.kind], rng).format(
        a=f"a {first.color} {first.shape}",
        b=f"a {last.color} {last.shape}",
        way=WAYS[first.motion][form] if first.motion in WAYS else "",
        back=WAYS[last.motion][form] if last.motion in WAYS else "",
        speed=first.speed,
        shape=first.shape,
        start=first.color,
        end=first.becomes,
    )

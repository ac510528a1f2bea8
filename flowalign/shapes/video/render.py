"""Videos of scenes: where objects start and end, and their pixels, for many scenes at once.

Every motion is uniform and lies wholly inside the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from flowalign.shapes.scenes import COLORS, GREY, SHAPES, SIZE, inside
from flowalign.shapes.video.scenes import DIRECTIONS, FRAMES, Actor, Spec

RADIUS = (4.0, 6.0)  # half extent in pixels of an object that is alone
RADIUS_OF_TWO = (3.9, 4.8)  # two of the largest, side by side, leave room for 8 pixels of way
WAY: dict[str | None, tuple[float, float]] = {"slowly": (5.0, 7.5), "quickly": (14.0, 18.0), None: (6.0, 16.0)}
APART = 4.0  # least gap in pixels, at all times, of objects that do not meet
MET = (0.0, 1.0)  # gap in pixels of objects that meet
CLOSING = (8.0, 12.0)  # by how many pixels the gap of objects that meet or part changes
BORDER = 1.0  # least distance in pixels from the edge of the picture
HALF = 8  # half the side in pixels of the square that an object is drawn in
SUPERSAMPLE = 4
CHUNK = 256  # videos drawn at once


@dataclass(frozen=True)
class Course:
    """The way of an object through a video: half extent, centre in the first and in the last frame, in pixels.

    From frame `change` on its colour is `becomes`.
    """

    actor: Actor
    radius: float
    start: tuple[float, float]
    end: tuple[float, float]
    change: int


def place(spec: Spec, rng: np.random.Generator, frames: int = FRAMES) -> list[Course]:
    """The courses of all objects of a scene that fits the spec.

    A colour changes in the middle, with frame `frames // 2` or the next; for nine frames the second of these is where
    the third group of Wan's autoencoder begins.
    """
    change = frames // 2 + int(rng.integers(2))
    while True:
        courses = _meeting(spec, rng, change) if spec.meeting else [_course(a, spec, rng, change) for a in spec.actors]
        if spec.meeting or _apart(courses):
            return courses


def _course(actor: Actor, spec: Spec, rng: np.random.Generator, change: int) -> Course:
    radius = rng.uniform(*(RADIUS if len(spec.actors) == 1 else RADIUS_OF_TWO))
    length = rng.uniform(*WAY[actor.speed])
    across, down = (length * part for part in DIRECTIONS.get(str(actor.motion), (0, 0)))
    low, high = radius + BORDER, SIZE - radius - BORDER
    x = rng.uniform(low + max(-across, 0), high - max(across, 0))
    y = rng.uniform(low + max(-down, 0), high - max(down, 0))
    return Course(actor, radius, (x, y), (x + across, y + down), change)


def _meeting(spec: Spec, rng: np.random.Generator, change: int) -> list[Course]:
    """Two objects on one line, which come together at the same speed, or the same backwards in time."""
    radii = rng.uniform(*RADIUS_OF_TWO, 2)
    gap, length = rng.uniform(*MET), 2 * radii.sum()
    closing = rng.uniform(CLOSING[0], min(CLOSING[1], SIZE - 2 * BORDER - length - gap))
    begin = rng.uniform(BORDER, SIZE - BORDER - length - gap - closing)
    far = np.array([begin + radii[0], begin + length + gap + closing - radii[1]])
    near = far + np.array([closing / 2, -closing / 2])
    low, high = radii.max() + BORDER, SIZE - radii.max() - BORDER
    aside = np.clip(rng.uniform(low, high) + rng.uniform(-1, 1, 2), low, high)
    start, end = (far, near) if spec.meeting == "meet" else (near, far)
    order, upright = rng.permutation(2), bool(rng.integers(2))

    def point(along: float, across: float) -> tuple[float, float]:
        return (across, along) if upright else (along, across)

    return [
        Course(actor, float(radii[i]), point(start[i], aside[i]), point(end[i], aside[i]), change)
        for actor, i in zip(spec.actors, order, strict=True)
    ]


def _apart(courses: list[Course]) -> bool:
    if len(courses) == 1:
        return True
    one, other = courses
    time = np.linspace(0, 1, 9)[:, None]
    between = [(1 - time) * np.subtract(one.start, other.start) + time * np.subtract(one.end, other.end)]
    return bool((np.abs(between[0]).max(1) >= one.radius + other.radius + APART).all())


def draw(courses: list[list[Course]], frames: int = FRAMES) -> UInt8[np.ndarray, "b f 3 h w"]:
    """The videos of placed objects, antialiased; each frame is that of `flowalign.shapes.scenes.draw`."""
    parts = [_draw(courses[i : i + CHUNK], frames) for i in range(0, len(courses), CHUNK)]
    return np.concatenate(parts) if parts else np.zeros((0, frames, 3, SIZE, SIZE), dtype=np.uint8)


def _draw(courses: list[list[Course]], frames: int) -> UInt8[np.ndarray, "b f 3 h w"]:
    wide = SIZE + 2 * HALF
    canvas = np.full((len(courses), frames, wide, wide, 3), GREY, dtype=np.float32)
    for turn in range(max(len(scene) for scene in courses)):
        rows = [i for i, scene in enumerate(courses) if len(scene) > turn]
        for shape in SHAPES:
            chosen = [i for i in rows if courses[i][turn].actor.shape == shape]
            if chosen:
                _paint(canvas, np.array(chosen), [courses[i][turn] for i in chosen], shape)
    picture = canvas[:, :, HALF:-HALF, HALF:-HALF]
    return np.ascontiguousarray(np.round(picture * 255).astype(np.uint8).transpose(0, 1, 4, 2, 3))


def _paint(canvas: Float[np.ndarray, "b f h w 3"], rows: np.ndarray, courses: list[Course], shape: str) -> None:
    """Draws one object of one shape into each of the chosen videos, in a square around its centre."""
    frames = canvas.shape[1]
    time = np.linspace(0, 1, frames)[None, :, None]
    start, end = (np.array(points)[:, None] for points in zip(*((c.start, c.end) for c in courses), strict=True))
    center = (1 - time) * start + time * end
    corner = np.floor(center).astype(int) - HALF
    radius = np.array([course.radius for course in courses])[:, None, None, None]
    ticks = (np.arange(2 * HALF * SUPERSAMPLE) + 0.5) / SUPERSAMPLE
    spots = (((corner - center)[..., None] + ticks) / radius).astype(np.float32)
    mask = inside(shape, spots[:, :, 0, None, :], spots[:, :, 1, :, None])
    cells = mask.reshape(len(rows), frames, 2 * HALF, SUPERSAMPLE, 2 * HALF, SUPERSAMPLE)
    cover = cells.mean((3, 5), dtype=np.float32)[..., None]
    at = corner[..., None] + np.arange(HALF, 3 * HALF)
    where = rows[:, None, None, None], np.arange(frames)[:, None, None], at[:, :, 1, :, None], at[:, :, 0, None, :]
    color = np.array([[COLORS[_color(course, k)] for k in range(frames)] for course in courses], dtype=np.float32)
    below = canvas[where]
    canvas[where] = below + cover * (color[:, :, None, None] - below)


def _color(course: Course, frame: int) -> str:
    becomes = course.actor.becomes
    return becomes if becomes is not None and frame >= course.change else course.actor.color


def render(specs: list[Spec], rng: np.random.Generator, frames: int = FRAMES) -> UInt8[np.ndarray, "b f 3 h w"]:
    """A video of one scene that fits each spec.

    Raises: ValueError for less than two frames.
    """
    if frames < 2:
        raise ValueError(f"a video of the world has at least 2 frames, got {frames}")
    return draw([place(spec, rng, frames) for spec in specs], frames)

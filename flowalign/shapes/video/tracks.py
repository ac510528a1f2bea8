"""The objects of a caption, followed through the frames of a video by their colour."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from flowalign.shapes.scenes import SHAPES
from flowalign.shapes.verifier import LARGEST, Detected
from flowalign.shapes.video.outlines import patches, resemblance
from flowalign.shapes.video.scenes import Actor, Spec

LEAST_RESEMBLANCE = 0.86  # blurred, noisy and pale shapes have 0.88 at least; a half circle, a ring, a bar less
EVEN = 0.01  # by which another shape may resemble more: of blurred videos, it is often less
LEAST_SEEN = 0.6  # share of frames an object has to be found in, for its motion to be told


@dataclass(frozen=True)
class Track:
    """What was found of one object, frame by frame: no colour and nan where nothing has its colour.

    extent: the median over frames. likeness: 1 where the shape is right too, at most 1/2 where not, 0 for nothing.
    """

    colors: tuple[str | None, ...]
    places: Float[np.ndarray, "f 2"]
    extent: float
    likeness: Float[np.ndarray, " f"]


@dataclass(frozen=True)
class Line:
    """The line fitted to a quantity over the frames: its values in the first and the last frame, and r^2."""

    first: float
    last: float
    steady: float

    @property
    def change(self) -> float:
        """From the first frame to the last."""
        return self.last - self.first


def fit(values: Float[np.ndarray, " f"]) -> Line:
    """Least squares over the frames that are not nan; nan, and 0 for r^2, where these are too few."""
    seen = np.isfinite(values)
    if seen.sum() < max(3, LEAST_SEEN * len(values)):
        return Line(math.nan, math.nan, 0.0)
    time = np.linspace(0, 1, len(values))[seen]
    v, deviation = values[seen], time - time.mean()
    slope = deviation @ v / (deviation @ deviation)
    first, spread = v.mean() - slope * time.mean(), ((v - v.mean()) ** 2).sum()
    steady = slope**2 * (deviation @ deviation) / spread if spread > 1e-9 else 0.0
    return Line(float(first), float(first + slope), float(steady))


def follow(
    frames: Float[np.ndarray, "n 3 h w"], found: list[list[Detected]], specs: list[Spec]
) -> list[tuple[Track, ...]]:
    """The tracks of each spec's objects through its video: in each frame the largest thing of the object's colour.

    Args:
        frames: of all videos, one after the other.
        found: the things in each of them, largest first.
    """
    count = len(found) // max(len(specs), 1)
    owners = [(i, actor) for i, spec in enumerate(specs) for actor in spec.actors]
    chosen = [[_own(actor, things) for things in found[i * count : (i + 1) * count]] for i, actor in owners]
    known = [
        (i * count + k, thing)
        for (i, _), things in zip(owners, chosen, strict=True)
        for k, thing in enumerate(things)
        if thing
    ]
    likely = iter(_resemblances(frames, known))
    tracks = iter([
        _track(actor, things, np.array([next(likely) if thing else np.zeros(len(SHAPES)) for thing in things]))
        for (_, actor), things in zip(owners, chosen, strict=True)
    ])  # fmt: skip
    return [tuple(next(tracks) for _ in spec.actors) for spec in specs]


def _own(actor: Actor, things: list[Detected]) -> Detected | None:
    return next((thing for thing in things if thing.color in (actor.color, actor.becomes)), None)


def _resemblances(frames: Float[np.ndarray, "n 3 h w"], known: list[tuple[int, Detected]]) -> Float[np.ndarray, "k s"]:
    if not known:
        return np.zeros((0, len(SHAPES)))
    centers = np.array([(thing.x, thing.y) for _, thing in known])
    alike = resemblance(patches(frames, np.array([k for k, _ in known]), centers, [thing.color for _, thing in known]))
    return alike * np.array([thing.extent <= LARGEST for _, thing in known])[:, None]


def _track(actor: Actor, things: list[Detected | None], alike: Float[np.ndarray, "f s"]) -> Track:
    shape = SHAPES.index(actor.shape)
    own = alike[:, shape]
    right = (own >= alike.max(1) - EVEN) & (own >= LEAST_RESEMBLANCE)
    extents = [thing.extent for thing in things if thing]
    return Track(
        tuple(thing.color if thing else None for thing in things),
        np.array([(thing.x, thing.y) if thing else (math.nan, math.nan) for thing in things]),
        float(np.median(extents)) if extents else math.nan,
        np.where(right, 1.0, 0.5 * own),
    )

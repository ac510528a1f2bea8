"""An honest judge of videos of shapes: it reads pixels only, and never the scene that a video was drawn from.

Every frame is read as a picture is (`flowalign.shapes.verifier.detect`); an object of the caption is followed by its
colour, and straight lines are fitted to where it is over the frames. Then every clause of the caption is checked: the
objects that it names, where to and how fast they move or that they do not, that they meet or part, the order of
colours, and that nothing else is there. Ways are in pixels from the first frame to the last, so that the number of
frames and their rate do not matter.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowalign.shapes.verifier import detect
from flowalign.shapes.video.scenes import DIRECTIONS, STILL, Actor, Spec
from flowalign.shapes.video.tracks import LEAST_SEEN, Track, fit, follow

LEAST_FRAMES = 5  # below that a line fits about anything
LEAST_WAY = 3.5  # pixels that a moving object makes at least; those drawn make 5
LARGEST_ASIDE = 0.5  # of its way, that it strays at right angles, beside the pixel by which a place may be misread
SPEED_BOUNDARY = 10.75  # pixels between slow ways (at most 7.5) and quick ones (at least 14)
LARGEST_WANDER = 3.0  # pixels between any two places; an object that is still is read to a pixel, what moves makes 5
NEAR, FAR = 3.5, 5.5  # pixels of gap, at most where objects meet and at least where they do not; drawn 1 and 8
# The least score with which a clause holds. An object may be unlike itself in one frame of nine, or of another shape in
# two; r^2 of uniform motion is nearly 1, that of a jump half way 0.75, that of shuffled frames less.
LEAST = {
    "object": 0.85,
    "motion": 0.5,
    "steady": 0.85,
    "speed": 0.5,
    "still": 0.5,
    "meeting": 0.5,
    "change": 0.85,
    "nothing else": 0.85,
}


def _logistic(beyond: float) -> float:
    """One half at the boundary; 0 for what could not be measured."""
    return 0.0 if math.isnan(beyond) else 1 / (1 + math.exp(-max(min(beyond, 50.0), -50.0)))


def _motion(track: Track, direction: str) -> tuple[float, float, float]:
    """Way in the direction, how far it strays at right angles to it, and how steadily the way is made."""
    across, down = DIRECTIONS[direction]
    along, aside = track.places.T if across else track.places.T[::-1]
    line, strayed = fit(along), aside[np.isfinite(aside)]
    return line.change * (across + down), float(np.ptp(strayed)) if len(strayed) else math.nan, line.steady


def _wander(track: Track) -> float:
    """The largest distance between any two places; nan if the object is seen too seldom."""
    places = track.places[np.isfinite(track.places[:, 0])]
    if len(places) < LEAST_SEEN * len(track.places):
        return math.nan
    return float(np.hypot(*(places[:, None] - places).transpose(2, 0, 1)).max())


def _order(track: Track, actor: Actor) -> float:
    """Share of frames that fit the best moment for the colour to change; half of it if an end has the wrong colour."""
    before = np.array([color == actor.color for color in track.colors])
    after = np.array([color == actor.becomes for color in track.colors])
    fitting = [before[:k].sum() + after[k:].sum() for k in range(2, len(before) - 1)]
    return float(max(fitting) / len(before) * (1.0 if before[0] and after[-1] else 0.5))


def _meeting(one: Track, other: Track, meeting: str) -> tuple[float, float]:
    """How well objects meet or part, and how steadily the gap between them closes or opens."""
    gap = np.abs(one.places - other.places).max(1) - (one.extent + other.extent) / 2
    line = fit(gap)
    far, near = (line.first, line.last) if meeting == "meet" else (line.last, line.first)
    return min(_logistic(NEAR - near), _logistic(far - FAR)), line.steady


def _clauses_of_one(actor: Actor, track: Track) -> dict[str, float]:
    scores = {"object": float(track.likeness.mean())}
    if actor.becomes is not None:
        scores["change"] = _order(track, actor)
    if actor.motion == STILL:
        scores["still"] = _logistic(2 * (LARGEST_WANDER - _wander(track)))
    elif actor.motion is not None:
        way, aside, scores["steady"] = _motion(track, actor.motion)
        scores["motion"] = min(_logistic(way - LEAST_WAY), _logistic(1 + LARGEST_ASIDE * way - aside))
        if actor.speed is not None:
            beyond = way - SPEED_BOUNDARY
            scores["speed"] = min(_logistic(beyond if actor.speed == "quickly" else -beyond), scores["motion"])
    return scores


def clauses(spec: Spec, tracks: tuple[Track, ...], counts: Int[np.ndarray, " f"]) -> dict[str, float]:
    """A score in [0, 1] for every clause of a caption, smooth enough to climb; it holds from `LEAST` of its kind on.

    Args:
        tracks: of the spec's objects.
        counts: of all things in each frame.
    """
    scores = {
        f"{name} {i}": value
        for i, (actor, track) in enumerate(zip(spec.actors, tracks, strict=True))
        for name, value in _clauses_of_one(actor, track).items()
    }
    if spec.meeting is not None:
        scores["meeting"], scores["steady"] = _meeting(tracks[0], tracks[1], spec.meeting)
    scores["nothing else"] = float((1 / (1 + np.abs(counts - len(spec.actors)))).mean())
    return scores


def least(name: str) -> float:
    """The least score with which the clause of that name, "motion 1" or "nothing else", holds."""
    return LEAST[name.rstrip(" 01")]


def passes(scores: dict[str, float]) -> bool:
    """Whether every clause holds."""
    return all(value >= least(name) for name, value in scores.items())


def verify(pixels: Float[Tensor, "b f 3 h w"], specs: list[Spec]) -> tuple[list[dict[str, float]], Bool[Tensor, " b"]]:
    """Clause scores and the strict verdict for each video against its own spec.

    Raises: ValueError for videos of fewer than five frames.
    """
    count = pixels.shape[1]
    if count < LEAST_FRAMES:
        raise ValueError(f"motion is read from at least {LEAST_FRAMES} frames, and these videos have {count}")
    frames = pixels.detach().float().cpu().flatten(0, 1)
    found = detect(frames)
    counts = np.array([len(things) for things in found], dtype=int).reshape(-1, count)
    tracks = follow(frames.numpy(), found, specs)
    scores = [clauses(*given) for given in zip(specs, tracks, counts, strict=True)]
    return scores, torch.tensor([passes(score) for score in scores], dtype=torch.bool)

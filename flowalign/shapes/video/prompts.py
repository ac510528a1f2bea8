"""Prompts of the embedded world of videos: training and held-out meanings are disjoint, whatever the wording.

A meaning is held out if it names an unseen composition (`Spec.unseen`) or if its hash says so (one in eight).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from flowalign.randomness import key_generator
from flowalign.records import Prompts
from flowalign.shapes.video.render import render
from flowalign.shapes.video.scenes import FRAMES, KINDS, Spec, caption, corrupt, random_spec


def meaning(spec: Spec) -> str:
    """A key that equal meanings share: "A moves left and B right" is "B moves right and A left"."""
    actors = sorted(f"{a.color} {a.shape} {a.motion} {a.speed} {a.becomes}" for a in spec.actors)
    return f" {spec.meeting} ".join(actors)


def held_out(spec: Spec) -> bool:
    """Whether the meaning belongs to the held-out set."""
    return spec.unseen or hashlib.blake2b(meaning(spec).encode(), digest_size=8).digest()[0] % 8 == 0


def train_prompts(count: int = 4096, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> Prompts:
    """`count` captions of training meanings, drawn at random; none of their meanings is in any held-out set."""
    return _draw("shapes-video-train", count, seed, False, kinds)


def held_out_prompts(count: int = 512, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> Prompts:
    """`count` captions of held-out meanings; `metadata["unseen"]` tells those with an unseen composition."""
    return _draw("shapes-video-held-out", count, seed, True, kinds)


def _draw(purpose: str, count: int, seed: int, wanted: bool, kinds: tuple[str, ...]) -> Prompts:
    rng = key_generator(seed, purpose)
    specs = [_drawn(rng, wanted, kinds) for _ in range(count)]
    texts = tuple(caption(spec, rng) for spec in specs)
    return Prompts(texts, tuple({"spec": spec.to_dict(), "kind": spec.kind, "unseen": spec.unseen} for spec in specs))


def _drawn(rng: np.random.Generator, wanted: bool, kinds: tuple[str, ...]) -> Spec:
    while held_out(spec := random_spec(rng, kinds)) != wanted:
        pass
    return spec


@dataclass(frozen=True)
class Captioned:
    """Videos in 8 bit with their captions, and the specs that they were drawn from."""

    videos: UInt8[np.ndarray, "b f 3 h w"]
    captions: tuple[str, ...]
    specs: tuple[Spec, ...]


def captioned(
    count: int,
    seed: int = 0,
    wrong: Mapping[str, float] | None = None,
    frames: int = FRAMES,
    kinds: tuple[str, ...] = KINDS,
) -> Captioned:
    """A training set: `count` scenes of training meanings, some of them with a caption that is wrong in one respect.

    Neither the scene nor the caption has a held-out meaning. The same arguments give the same set.

    Args:
        wrong: for each kind the share of scenes whose caption is made wrong; a kind that is not there has none. Where
            four wrong captions in a row have a held-out meaning the right one is taken, so the share is a little less.
    """
    shares = dict(wrong or {})
    rng = key_generator(seed, "shapes-video-captioned")
    specs, captions = [], []
    for _ in range(count):
        spec = _drawn(rng, False, kinds)
        told = _mistaken(spec, rng) if rng.random() < shares.get(spec.kind, 0.0) else spec
        specs.append(spec)
        captions.append(caption(told, rng))
    return Captioned(render(specs, rng, frames), tuple(captions), tuple(specs))


def _mistaken(spec: Spec, rng: np.random.Generator) -> Spec:
    tries = (corrupt(spec, rng) for _ in range(4))
    return next((wrong for wrong in tries if not held_out(wrong)), spec)

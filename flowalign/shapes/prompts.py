"""Prompts of the embedded world: training and held-out meanings are disjoint, whatever the wording.

A meaning is held out if it names an unseen composition (`scenes.UNSEEN`) or if its hash says so (one in eight), so the
split needs no list and nobody can train on a held-out meaning by accident.
"""

from __future__ import annotations

import hashlib

from flowalign.randomness import key_generator
from flowalign.records import Prompts
from flowalign.shapes.scenes import KINDS, OPPOSITE, Spec, caption, random_spec


def meaning(spec: Spec) -> str:
    """A key that equal meanings share: "A left of B" is "B right of A", and "A and B" is "B and A"."""
    groups = [f"{g.count} {g.size} {g.color} {g.shape}" for g in spec.groups]
    if spec.relation in ("right of", "below"):
        return f"{groups[1]} {OPPOSITE[spec.relation]} {groups[0]}"
    return f" {spec.relation} ".join(groups if spec.relation else sorted(groups))


def held_out(spec: Spec) -> bool:
    """Whether the meaning belongs to the held-out set."""
    return spec.unseen or hashlib.blake2b(meaning(spec).encode(), digest_size=8).digest()[0] % 8 == 0


def train_prompts(count: int = 4096, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> Prompts:
    """`count` captions of training meanings, drawn at random; none of their meanings is in any held-out set."""
    return _draw("shapes-train", count, seed, False, kinds)


def held_out_prompts(count: int = 512, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> Prompts:
    """`count` captions of held-out meanings; `metadata["unseen"]` tells those with an unseen composition."""
    return _draw("shapes-held-out", count, seed, True, kinds)


def _draw(purpose: str, count: int, seed: int, wanted: bool, kinds: tuple[str, ...]) -> Prompts:
    rng = key_generator(seed, purpose)
    specs: list[Spec] = []
    while len(specs) < count:
        spec = random_spec(rng, kinds)
        if held_out(spec) == wanted:
            specs.append(spec)
    texts = tuple(caption(spec, rng) for spec in specs)
    return Prompts(texts, tuple({"spec": spec.to_dict(), "kind": spec.kind, "unseen": spec.unseen} for spec in specs))

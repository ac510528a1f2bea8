"""Edits of the embedded world: a picture of a scene, what is to be done to it, and the caption of what it shall show.

    move     an object is on one side of another and shall come to a side of it that is next to that one, a quarter turn
             around it: in 32 pixels there is seldom room on two opposite sides
    resize   an object is small and shall be large, or the reverse, where it is

The models of the world know captions alone, so that a prompt is the caption of the edited scene; its record holds the
picture before the edit, drawn in memory, and what rewards need to know of the instruction:

    media, references       the picture before the edit, as a PNG in the record itself
    edit, instruction       "move" or "resize", and a sentence
    object                  what is edited, such as "red circle"
    anchor, direction       of a move: the other object, and where to go, such as "up left" (`rewards.Translation`)
    factor                  of a resize: how many times as wide and high (`rewards.Resize`)
    spec, kind, unseen      of the caption, as all prompts of the world have them

Where objects stood when the picture was drawn is not in it: a reward has to look. There is room for the object where it
is to go, with all else left as it is, and the verifier reads the picture as it was meant, and as not yet done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from flowalign.media import inline
from flowalign.randomness import key_generator
from flowalign.records import Prompts
from flowalign.shapes.prompts import held_out
from flowalign.shapes.scenes import (
    OPPOSITE,
    RELATIONS,
    SIZE,
    Placed,
    Spec,
    apart,
    caption,
    draw,
    place,
    random_spec,
    related,
)
from flowalign.shapes.verifier import verify

EDITS = ("move", "resize")
FACTOR = 5 / 3  # between the sides of large and small objects, whose mean half extents are 6.3 and 3.8 pixels
TRIES = 50  # to find room where an object is to go; another scene after that
TOGETHER = 64  # pictures that the verifier reads at once
WORDS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


@dataclass(frozen=True)
class Edit:
    """before, after: what the picture shows and shall show. told: of the record, what only this kind of edit has."""

    before: Spec
    after: Spec
    picture: UInt8[np.ndarray, "3 h w"]
    told: dict[str, Any]


def train_edits(count: int = 4096, seed: int = 0, kinds: tuple[str, ...] = EDITS) -> Prompts:
    """`count` edits whose captions have training meanings; none of these is in any held-out set."""
    return _prompts("shapes-edits-train", count, seed, False, kinds)


def held_out_edits(count: int = 256, seed: int = 0, kinds: tuple[str, ...] = EDITS) -> Prompts:
    """`count` edits whose captions have held-out meanings."""
    return _prompts("shapes-edits-held-out", count, seed, True, kinds)


def _prompts(purpose: str, count: int, seed: int, wanted: bool, kinds: tuple[str, ...]) -> Prompts:
    unknown = [kind for kind in kinds if kind not in EDITS]
    if unknown or not kinds:
        raise ValueError(f"kinds of edits are {', '.join(EDITS)}, got {unknown[0] if unknown else 'none'!r}")
    rng, texts, records = key_generator(seed, purpose), list[str](), list[dict[str, Any]]()
    for edit in _legible(rng, wanted, kinds):
        if len(texts) == count:
            break
        texts.append(caption(edit.after, rng))
        records.append(_record(edit))
    return Prompts(tuple(texts), tuple(records))


def _record(edit: Edit) -> dict[str, Any]:
    first, picture = edit.after.groups[0], inline(edit.picture)
    own = {"spec": edit.after.to_dict(), "kind": edit.after.kind, "unseen": edit.after.unseen}
    return {"media": picture, "references": [picture], "object": f"{first.color} {first.shape}"} | edit.told | own


def _legible(rng: np.random.Generator, wanted: bool, kinds: tuple[str, ...]) -> Iterator[Edit]:
    """Edits of pictures that the verifier reads as they were meant, and that are not yet what they shall be."""
    while True:
        some = [_edit(rng, wanted, kinds) for _ in range(TOGETHER)]
        pixels = torch.from_numpy(np.stack([edit.picture for edit in some])).float() / 255
        _, before = verify(pixels, [edit.before for edit in some])
        _, after = verify(pixels, [edit.after for edit in some])
        yield from (edit for edit, fits in zip(some, (before & ~after).tolist(), strict=True) if fits)


def _edit(rng: np.random.Generator, wanted: bool, kinds: tuple[str, ...]) -> Edit:
    kind, made = str(rng.choice(kinds)), None
    while made is None:
        after = random_spec(rng, ("relation" if kind == "move" else "size",))
        if held_out(after) == wanted:
            made = _move(after, rng) if kind == "move" else _resize(after, rng)
    return made


def _move(after: Spec, rng: np.random.Generator) -> Edit | None:
    """None where there turns out to be no room for the object where it is to go."""
    assert after.relation is not None
    aside = [other for other in RELATIONS if other not in (after.relation, OPPOSITE[after.relation])]
    relation = str(rng.choice(aside))
    before = replace(after, relation=relation)
    first, second = place(before, rng)
    if not any(_fits(_elsewhere(first, rng), second, after.relation) for _ in range(TRIES)):
        return None
    thing, anchor = (f"{group.color} {group.shape}" for group in after.groups)
    told = {
        "edit": "move",
        "instruction": f"move the {thing} {WORDS[after.relation]} the {anchor}",
        "anchor": anchor,
        "direction": direction(relation, after.relation),
    }
    return Edit(before, after, draw([first, second]), told)


def _elsewhere(item: Placed, rng: np.random.Generator) -> Placed:
    low, high = item.radius + 1, SIZE - item.radius - 1
    return replace(item, x=rng.uniform(low, high), y=rng.uniform(low, high))


def _fits(first: Placed, second: Placed, relation: str) -> bool:
    return apart([first, second]) and related(first, second, relation)


def direction(before: str, after: str) -> str:
    """Where an object goes from one side of another to one that is next to it, such as "up left"."""
    across, down = (b - a for a, b in zip(RELATIONS[before], RELATIONS[after], strict=True))
    return f"{'up' if down < 0 else 'down'} {'left' if across < 0 else 'right'}"


def _resize(after: Spec, rng: np.random.Generator) -> Edit:
    """The large one is placed, so that there is room for it; the small one is where it is."""
    (group,) = after.groups
    grows = group.size == "large"
    large = replace(after, groups=(replace(group, size="large"),))
    before = replace(after, groups=(replace(group, size="small" if grows else "large"),))
    (item,) = place(large, rng)
    shown = replace(item, radius=item.radius / FACTOR) if grows else item
    told = {
        "edit": "resize",
        "instruction": f"make the {group.color} {group.shape} {'larger' if grows else 'smaller'}",
        "factor": FACTOR if grows else 1 / FACTOR,
    }
    return Edit(before, after, draw([shown]), told)

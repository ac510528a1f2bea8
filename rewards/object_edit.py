"""Was an object moved or resized, as its prompt's record says, and the rest left where it was? Talk2Move's reward.

    total = (1 - w) edit + w position

edit is max(translation, 0) of what is to be moved, and the resizing of what is to be resized; position is that of what
is to stay (`rewards.geometry`; arXiv:2601.02356). Prompts of both kinds can be in one run:

    {"prompt": "...", "object": "cup", "direction": "left", "anchor": "plate", "references": ["before.png"]}
    {"prompt": "...", "object": "cup", "factor": 2, "references": ["before.png"]}
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, Reward, simple_scores
from rewards.finders import Finder
from rewards.move import Position, Resize, Translation

PARTS = ("translation", "resize", "position", "found")


class ObjectEdit(Reward):
    """See above; in [0, 1] but for objects that were resized far beyond what was asked; not differentiable.

    What is to stay is the record's "anchor" where an object is moved, and the object itself where it is resized; a move
    without an anchor has no position, and edit alone is its total. Talk2Move weighs position 0.1, as here; like its
    code a way in the wrong direction counts as none. Parts: "translation" (not cut off at 0), "resize", "position" and
    "found" (1 where the edited object is there after the edit, else 0), nan where they do not apply.

    Args:
        finder: of the objects: `rewards.ShapesFinder` for the embedded world, `rewards.GroundingDINO` for photographs.
        position_weight: w, in [0, 1).
        missing: what translation, resize or position are where an object is there before the edit and not found after
            it; None for no valid score.

    Raises: ValueError for a record with both "direction" and "factor", or neither; and as `rewards.Translation` does.
    """

    name = "object_edit"
    card = Card(usual=(0.0, 1.0))

    def __init__(self, finder: Finder, position_weight: float = 0.1, missing: float | None = 0.0) -> None:
        if not 0 <= position_weight < 1:
            raise ValueError(f"position_weight must lie in [0, 1), got {position_weight}")
        self.position_weight = float(position_weight)
        self.edits: dict[str, Reward] = {"direction": Translation(finder, missing), "factor": Resize(finder, missing)}
        self.position = Position(finder, missing)

    def score(self, media: Media, prompts: Prompts) -> Scores:
        asked = [self._asked(prompts, i) for i in range(len(prompts))]
        parts = {name: torch.full((len(media),), torch.nan, device=media.pixels.device) for name in PARTS}
        for key, reward in self.edits.items():
            rows = [i for i, one in enumerate(asked) if one == key]
            _fill(parts, reward, media, prompts, rows)
        staying = [_staying(row, key) for row, key in zip(prompts.metadata, asked, strict=True)]
        kept = [i for i, name in enumerate(staying) if name is not None]
        named = tuple(row | {"object": name} for row, name in zip(prompts.metadata, staying, strict=True))
        _fill(parts, self.position, media, replace(prompts, metadata=named), kept)
        moved = torch.tensor([key == "direction" for key in asked], device=media.pixels.device)
        edit = parts["translation"].clamp(min=0).where(moved, parts["resize"])
        both = (1 - self.position_weight) * edit + self.position_weight * parts["position"]
        whole = torch.tensor([name is not None for name in staying], device=media.pixels.device)
        return simple_scores(self.name, both.where(whole, edit), parts)

    def _asked(self, prompts: Prompts, index: int) -> str:
        named = [key for key in self.edits if prompts.metadata[index].get(key) is not None]
        if len(named) != 1:
            raise ValueError(
                f'ObjectEdit: prompt {index} ({prompts.text[index]!r}) must name either "direction" or "factor" in its '
                f"record; it names {' and '.join(named) or 'neither'}"
            )
        return named[0]


def _staying(row: dict[str, object], asked: str) -> object:
    """What is to stay where it is, None where nothing is known to."""
    return row.get("anchor") if asked == "direction" else row.get("object")


def _fill(parts: dict[str, Tensor], reward: Reward, media: Media, prompts: Prompts, rows: list[int]) -> None:
    """Score some rows."""
    if not rows:
        return
    scores = reward.score(media.rows(rows), prompts.rows(rows))
    parts[reward.name][rows] = scores.total
    if reward.name != "position":
        parts["found"][rows] = scores.parts[f"{reward.name}/found"]

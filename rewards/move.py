"""Was the object moved or resized as the prompt says? Rewards for editing, from its box before and after the edit.

The rewards of Talk2Move (arXiv:2601.02356), whose formulas are in `rewards.geometry`. A prompt's record names the
object and the picture before the edit:

    {"prompt": "Move the cup to the left", "object": "cup", "direction": "left", "references": ["before.png"]}
    {"prompt": "Make the cup twice as large", "object": "cup", "factor": 2, "references": ["before.png"]}
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Bool
from torch import Tensor

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, Reward, simple_scores
from rewards.finders import Finder
from rewards.geometry import Boxes, direction_of, resizing, staying, translation
from rewards.pixels import finite, pictures
from rewards.subject import references_of

Rule = Callable[[Tensor, Tensor], Tensor]  # boxes before and after -> scores


class BoxReward(Reward):
    """Compares the boxes of a prompt's object before and after the edit; not differentiable. See the subclasses.

    Where the object is not found before the edit the score is not valid, and so it is where it is not found after the
    edit, unless `missing` says what that is worth: an edit that loses the object is then a bad one, and one that the
    finder misses as well. Talk2Move's code scores 0 in both cases. The part "<name>/found" is 1 where the object was
    found after the edit, else 0.

    The picture before the edit may have another size: its boxes are scaled to the edit's.

    Args:
        finder: of the objects: `rewards.ShapesFinder` for the embedded world, `rewards.GroundingDINO` for photographs.
        missing: the score where the object is found before the edit and not after it; None for no valid score.

    Raises: ValueError for media that are no pictures or come without exactly one reference each, and for a prompt whose
    record names no object, or not what the subclass asks for.
    """

    def __init__(self, finder: Finder, missing: float | None = None) -> None:
        if missing is not None and not math.isfinite(missing):
            raise ValueError(f"missing must be a finite number or None, got {missing}")
        self.finder, self.missing = finder, missing

    @abstractmethod
    def rule(self, prompts: Prompts) -> Rule:
        """How the boxes of these prompts are compared: scores [b] of boxes [b, 4] before and after."""

    def score(self, media: Media, prompts: Prompts) -> Scores:
        pixels, name = pictures(media, type(self).__name__), type(self).__name__
        rule, objects = self.rule(prompts), [_text(prompts, i, "object", name) for i in range(len(prompts))]
        before = self._before(media, objects)
        after = self.finder.find(pixels, objects).float().cpu()
        known = finite(pixels).cpu()
        total, found = rule(before, after), _found(after)
        if self.missing is not None:
            total = total.where(found | ~_found(before), self.missing)
        total = total.where(known, torch.nan)
        parts = {f"{self.name}/found": (found & known).float().to(pixels.device)}
        return simple_scores(self.name, total.to(pixels.device), parts)

    def _before(self, media: Media, objects: Sequence[str]) -> Boxes:
        """Boxes in the pictures before the edit, in pixels of the edited; each is looked for once in a picture."""
        references = references_of(media, type(self).__name__)
        many = next((len(pixels) for pixels in references if len(pixels) != 1), None)
        if many is not None:
            raise ValueError(f"{type(self).__name__} needs one reference, the picture before the edit, and got {many}")
        height, width = media.pixels.shape[-2:]
        boxes: dict[tuple[int, str], Tensor] = {}
        for pixels, wanted in zip(references, objects, strict=True):
            if (id(pixels), wanted) not in boxes:
                across, down = width / pixels.shape[3], height / pixels.shape[2]
                box = self.finder.find(pixels.to(media.pixels.device), [wanted]).float().cpu()
                boxes[id(pixels), wanted] = box * torch.tensor([across, down, across, down])
        return torch.cat([boxes[id(pixels), wanted] for pixels, wanted in zip(references, objects, strict=True)])


class Translation(BoxReward):
    """How much of the object's way goes in the wanted "direction", beyond a dead zone: in (-1, 1), negative against it.

    "left", "right", "up", "down", or two as in "up left". Talk2Move's code gives 0 for the wrong direction: that is
    `Clip(Translation(finder, missing=0), 0, 1)`. See `rewards.geometry.translation` for the formula.
    """

    name = "translation"
    card = Card(usual=(-1.0, 1.0))

    def rule(self, prompts: Prompts) -> Rule:
        return partial(translation, direction=torch.tensor([_direction(prompts, i) for i in range(len(prompts))]))


class Resize(BoxReward):
    """How near the object's width and height come to "factor" times what they were: at most 1, 1 where both are right.

    The factor, positive, is of the sides, not of the area. See `rewards.geometry.resizing` for the formula.
    """

    name = "resize"
    card = Card(usual=(0.0, 1.0))

    def rule(self, prompts: Prompts) -> Rule:
        return partial(resizing, factor=torch.tensor([_factor(prompts, i) for i in range(len(prompts))]))


class Position(BoxReward):
    """Whether the object is where it was: 1 within a dead zone, down to 0.29. See `rewards.geometry.staying`.

    For edits that are to leave the object where it is: Talk2Move weighs it 0.1 beside 0.9 of how an object was turned.
    """

    name = "position"
    card = Card(usual=(0.29, 1.0))

    def rule(self, prompts: Prompts) -> Rule:
        return staying


def _found(boxes: Boxes) -> Bool[Tensor, " b"]:
    return boxes.isfinite().all(1)


def _text(prompts: Prompts, index: int, key: str, name: str) -> str:
    value = prompts.metadata[index].get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f'{name}: prompt {index} ({prompts.text[index]!r}) must name "{key}" in its record, a text; got {value!r}'
        )
    return value


def _direction(prompts: Prompts, index: int) -> tuple[float, float]:
    text = _text(prompts, index, "direction", "Translation")
    try:
        return direction_of(text)
    except ValueError as error:
        raise ValueError(f"prompt {index} ({prompts.text[index]!r}): {error}") from error


def _factor(prompts: Prompts, index: int) -> float:
    value = prompts.metadata[index].get("factor")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(
            f'Resize: prompt {index} ({prompts.text[index]!r}) must name "factor" in its record, a positive number of '
            f"times as wide and high; got {value!r}"
        )
    return float(value)

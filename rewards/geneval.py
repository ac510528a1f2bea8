"""Are the objects that a prompt asks for in the picture, as many, as coloured and as placed as it says?

The benchmark is GenEval (arXiv:2310.11513, Ghosh et al.); the graded reward is that of Flow-GRPO's code
(arXiv:2505.05470). First the decision, from objects that were detected; then the colours and the reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from flowalign.records import Media, Prompts, Scores
from rewards.base import Reward
from rewards.card import Card
from rewards.clip import CLIPScore
from rewards.mask2former import CONFIDENCE, NAMES, Box, Detection, Detector, Objects
from rewards.pixels import Preprocessing, finite, pictures, to_eight_bit

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")

COUNTING_CONFIDENCE = 0.9  # an object counts above it for prompts with the tag "counting", else above CONFIDENCE
MOST = 16  # objects of one class, the surest
APART = 0.1  # a relation needs centres further apart than this share of both objects' extents
GREY = 0x99 / 255  # around a cut-out object: GenEval's "#999"

Colors = Callable[[str, int], list[str]]  # the colours of the n surest objects of a class


@dataclass(frozen=True)
class Clause:
    """`count` objects of a class, of a colour, and in a relation to those of an earlier clause (by its number)."""

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Spec:
    """What a prompt asks for; of `exclude` there must be fewer than their count."""

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()
    counting: bool = False


def read_spec(prompts: Prompts, index: int) -> Spec:
    """A prompt's spec from metadata as in GenEval's evaluation_metadata.jsonl.

    Raises: ValueError where there is none, or one that names an unknown class, colour, relation or clause.
    """
    row = prompts.metadata[index]
    try:
        include = tuple(_read_clause(clause, i) for i, clause in enumerate(row["include"]))
        exclude = tuple(_read_clause(clause, 0) for clause in row.get("exclude", ()))
        if not include:
            raise ValueError("'include' is empty")
        return Spec(include, exclude, row["tag"] == "counting")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"prompt {index} ({prompts.text[index]!r}) has no metadata as in GenEval's evaluation_metadata.jsonl "
            f'({{"tag": ..., "include": [{{"class": ..., "count": ...}}]}}): {error!r}'
        ) from error


def _read_clause(row: Any, number: int) -> Clause:
    clause = Clause(row["class"], int(row["count"]), row.get("color"))
    if clause.name not in NAMES or clause.count < 1 or clause.color not in (None, *COLORS):
        raise ValueError(f"class, count or color not known in {row}")
    if row.get("position") is None:
        return clause
    relation, target = row["position"]
    if relation not in RELATIONS or not 0 <= target < number:
        raise ValueError(f"position not known, or not of an earlier clause, in {row}")
    return Clause(clause.name, clause.count, clause.color, (relation, target))


def kept(objects: Objects, counting: bool) -> Objects:
    """The objects that count: sure enough, and no more than `MOST` of a class. No overlap is too large in GenEval."""
    least = COUNTING_CONFIDENCE if counting else CONFIDENCE
    sure = {name: [found for found in all_ if found.score > least][:MOST] for name, all_ in objects.items()}
    return {name: found for name, found in sure.items() if found}


def relations(a: Box, b: Box) -> set[str]:
    """Where `a` is as seen from `b`: one relation, two on a diagonal, or none where their centres are near.

    Of the centres' offset, 0.1 of both extents is taken off in each direction; what is left has to be more than half
    of the whole offset's length.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    slack = [APART * (a[i + 2] - a[i] + b[i + 2] - b[i]) for i in (0, 1)]
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    left = [max(abs(d) - s, 0.0) * (1 if d > 0 else -1) for d, s in zip(offset, slack, strict=True)]
    if max(map(abs, left)) < 1e-3:
        return set()
    found = {"left of": -left[0], "right of": left[0], "above": -left[1], "below": left[1]}
    return {relation for relation, distance in found.items() if distance / length > 0.5}


def placed(objects: Sequence[Detection], targets: Sequence[Detection], relation: str) -> bool:
    """Whether every object is in the relation to every target."""
    return all(relation in relations(a.box, b.box) for a in objects for b in targets)


def correct(objects: Objects, spec: Spec, colors: Colors) -> bool:
    """GenEval's own verdict: at least the count, judged by the surest, and less than `exclude` says."""
    matched: list[list[Detection] | None] = []
    for clause in spec.include:
        found = objects.get(clause.name, [])[: clause.count]
        good = len(found) == clause.count
        if good and clause.color is not None:
            good = colors(clause.name, clause.count).count(clause.color) == clause.count
        if good and clause.position is not None:
            relation, target = clause.position[0], matched[clause.position[1]]
            good = target is not None and placed(found, target, relation)
        matched.append(found if good else None)
    few = all(len(objects.get(clause.name, [])) < clause.count for clause in spec.exclude)
    return few and all(found is not None for found in matched)


def graded(objects: Objects, spec: Spec, colors: Colors, half_credit: bool = True) -> tuple[float, bool]:
    """Flow-GRPO's reward, a mean of credits and at most 1, and whether all is right with the exact counts.

    Credits of a clause: 1 - |count - found| / count, which is negative for more than twice as many; then, if it has a
    colour or a position, one 0 where the count is wrong, else 1 - wrong / count of the colours, and, where those are
    right, the position's. A wrong position has two credits in the authors' code, a 0 and a 1, and without `half_credit`
    a 0; so it has without target.
    `exclude` is not read: counts are exact.
    """
    credits: list[float] = []
    matched: list[list[Detection] | None] = []
    for clause in spec.include:
        found = objects.get(clause.name, [])
        earned, good = _grade(clause, found, matched, colors, half_credit)
        credits += earned
        matched.append(found if good else None)
    return sum(credits) / len(credits), all(found is not None for found in matched)


def _grade(
    clause: Clause,
    found: list[Detection],
    matched: Sequence[list[Detection] | None],
    colors: Colors,
    half_credit: bool,
) -> tuple[list[float], bool]:
    credits = [1 - abs(clause.count - len(found)) / clause.count]
    if len(found) != clause.count:
        more = clause.color is not None or clause.position is not None
        return credits + [0.0] * more, False
    if clause.color is not None:
        right = colors(clause.name, clause.count).count(clause.color)
        credits.append(right / clause.count)
        if right != clause.count:
            return credits, False
    if clause.position is None:
        return credits, True
    relation, target = clause.position[0], matched[clause.position[1]]
    if target is None:
        return [*credits, 0.0], False
    if not placed(found, target, relation):
        return [*credits, 0.0, *([1.0] * half_credit)], False
    return [*credits, 1.0], True


class GenEval(Reward):
    """`graded` in [-inf, 1], the total and part "geneval"; parts "geneval_strict" and "geneval_correct" are 0 or 1.

    "geneval_strict" is Flow-GRPO's strict accuracy, with exact counts, and "geneval_correct" the benchmark's. Not
    differentiable. Every prompt needs metadata as in GenEval's evaluation_metadata.jsonl.

    GenEval detects with mmdetection's Mask2Former (Swin-S). This one is the same network with the weights of its
    authors, made ready and read out in mmdetection's way. Colours are CLIP's zero-shot choice among ten for an object
    cut out on grey, as in GenEval. Not verified, as no published weights could be run: that the two checkpoints
    detect alike, and so any published number; decisions, read-out and cut-outs are tested by themselves.

    Args:
        detector: a folder or hub id of a transformers Mask2FormerForUniversalSegmentation with COCO's 80 classes. The
            code is under the MIT licence; the published model's card names its licence "other".
        clip: of the colours, a model of `CLIPScore`. OpenAI's weights are under the MIT licence.
        short_side: pixels of the shorter side in the detector; 800 as in GenEval.
        device: where the models stay; by default they follow the pictures.
        batch_size: pictures that pass through the detector at once.
        half_credit: give a wrong position the two credits 0 and 1 of Flow-GRPO's code, not a 0 alone.

    Raises: ValueError where a model cannot be had or has other classes, for videos, and for a prompt without metadata.
    """

    name = "geneval"
    card = Card(
        "facebook/mask2former-swin-small-coco-instance, openai/clip-vit-large-patch14",
        'MIT (CLIP), "other" (the detector\'s card; its code: MIT)',
        (0.0, 1.0),
    )

    def __init__(
        self,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        short_side: int = 800,
        device: str | None = None,
        batch_size: int = 4,
        half_credit: bool = True,
    ) -> None:
        self.detector, self.clip = Detector(detector, short_side, batch_size), CLIPScore(clip)
        assert isinstance(self.clip.prepare, Preprocessing)
        self.clip.prepare = replace(self.clip.prepare, rounded=True)  # GenEval's open_clip crops by torchvision
        self.device, self.half_credit = device, half_credit

    @torch.no_grad()
    def score(self, media: Media, prompts: Prompts) -> Scores:
        pixels = pictures(media, "GenEval")
        specs = [read_spec(prompts, i) for i in range(len(prompts))]
        device = torch.device(self.device or pixels.device)
        self.detector.network.to(device)
        self.clip.model.to(device)
        with torch.autocast(device.type, enabled=False):
            clean = to_eight_bit(pixels.to(device).float().nan_to_num())
            verdicts = [self._judge(*of) for of in zip(clean, self.detector(clean), specs, strict=True)]
        soft, strict, right = torch.tensor(verdicts, device=pixels.device).float().unbind(1)
        parts = {"geneval": soft, "geneval_strict": strict, "geneval_correct": right}
        return Scores(soft, parts, finite(pixels))

    def _judge(self, picture: Float[Tensor, "3 h w"], detected: Objects, spec: Spec) -> tuple[float, bool, bool]:
        objects = kept(detected, spec.counting)

        @cache
        def colors(name: str, count: int) -> list[str]:
            return classify_colors(self.clip, picture, objects[name][:count], name)

        return *graded(objects, spec, colors, self.half_credit), correct(objects, spec, colors)


def classify_colors(
    clip: CLIPScore, picture: Float[Tensor, "3 h w"], objects: Sequence[Detection], name: str
) -> list[str]:
    """Of each object, cut out on grey, the colour whose three texts' mean embedding is nearest."""
    texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
    means = clip.embed_texts(texts, picture.device).view(len(COLORS), len(TEMPLATES), -1).mean(1)
    cuts = torch.cat([clip.embed_pictures(cut_out(picture, found)[None]) for found in objects])
    return [COLORS[i] for i in (cuts @ F.normalize(means, dim=1).T).argmax(1).tolist()]


def cut_out(picture: Float[Tensor, "3 h w"], found: Detection) -> Float[Tensor, "3 k l"]:
    """An object's box, grey where the object is not."""
    left, top, right, bottom = map(int, found.box)
    return torch.where(found.mask, picture, GREY)[:, top:bottom, left:right]

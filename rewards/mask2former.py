"""Objects in pictures by Mask2Former (arXiv:2112.01527), in mmdetection's way, which GenEval uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from rewards.pixels import normalise, to_eight_bit

# COCO's 80 classes in COCO's order, under the names of GenEval's prompts
_NAMES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse,
tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
teddy bear, hair drier, toothbrush"""
NAMES = tuple(_NAMES.replace("\n", " ").split(", "))
CONFIDENCE = 0.3  # least score of an object, GenEval's
INSTANCES = 100  # proposed in a picture (mmdetection's max_per_image)
LONGEST = 1333 / 800  # of the input: the longer side at most, by the shorter (COCO's usual test size)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One object: left, top, right and bottom in pixels (the last two exclusive), how sure, and its pixels."""

    box: Box
    score: float
    mask: Bool[Tensor, "h w"]


Objects = dict[str, list[Detection]]  # by class, the surest first


class Detector:
    """A Mask2FormerForUniversalSegmentation of COCO's 80 classes.

    Args:
        model: a folder or hub id.
        short_side: pixels of a picture's shorter side in the network.
        batch_size: pictures that pass through the network at once.

    Raises: ValueError where the model cannot be had or has other classes.
    """

    def __init__(self, model: str, short_side: int = 800, batch_size: int = 4) -> None:
        if batch_size < 1 or short_side < 32:
            raise ValueError(
                f"batch_size must be at least 1 and short_side at least 32, not {batch_size}, {short_side}"
            )
        self.network, self.short_side, self.batch_size = _load(model), short_side, batch_size

    @torch.no_grad()
    def __call__(self, pixels: Float[Tensor, "b 3 h w"]) -> list[Objects]:
        """The objects in each picture, of scores above `CONFIDENCE`."""
        found: list[Objects] = []
        for part in pixels.split(self.batch_size):
            inputs, crop = network_input(part, self.short_side)
            made = self.network(pixel_values=inputs)
            for rows in zip(made.class_queries_logits.float(), made.masks_queries_logits.float(), strict=True):
                found.append(instances(*rows, inputs.shape[2:], crop, pixels.shape[2:]))
        return found


def network_input(pixels: Float[Tensor, "b 3 h w"], short: int) -> tuple[Float[Tensor, "b 3 k l"], tuple[int, int]]:
    """Pictures resized to the shorter side `short`, normalised, padded to multiples of 32; and the size before that."""
    height, width = pixels.shape[2:]
    factor = min(short / min(height, width), short * LONGEST / max(height, width))
    size = int(height * factor + 0.5), int(width * factor + 0.5)
    resized = to_eight_bit(_resized(pixels, size))
    return F.pad(normalise(resized, MEAN, STD), (0, -size[1] % 32, 0, -size[0] % 32)), size


def instances(
    class_logits: Float[Tensor, "q c"], mask_logits: Float[Tensor, "q k l"], size: Sequence[int], crop: Sequence[int],
    original: Sequence[int],
) -> Objects:  # fmt: skip
    """Detections in one picture from a Mask2Former's output; their masks may overlap.

    An object's score is its class probability times the mean probability of its mask's pixels.

    Args:
        class_logits: of 80 classes and "no object". size: height and width of the network's input.
        crop: of the input without its padding. original: of the picture.
    """
    sure, order = class_logits.softmax(1)[:, :-1].flatten().sort(descending=True)
    count = int((sure[:INSTANCES] > CONFIDENCE).sum())
    if not count:
        return {}
    rows, labels = order[:count] // len(NAMES), order[:count] % len(NAMES)
    large = _resized(mask_logits[rows, None], size)[..., : crop[0], : crop[1]]
    logits = _resized(large, original)[:, 0]
    masks = logits > 0
    scores = sure[:count] * (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
    objects: Objects = {}
    for i in scores.argsort(descending=True).tolist():
        if scores[i] > CONFIDENCE:
            objects.setdefault(NAMES[int(labels[i])], []).append(Detection(_box(masks[i]), float(scores[i]), masks[i]))
    return objects


def _resized(values: Float[Tensor, "b c h w"], size: Sequence[int]) -> Float[Tensor, "b c k l"]:
    return F.interpolate(values, tuple(size), mode="bilinear", align_corners=False)


def _box(mask: Bool[Tensor, "h w"]) -> Box:
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def _load(name: str) -> Any:
    from transformers import Mask2FormerForUniversalSegmentation

    try:
        network, report = Mask2FormerForUniversalSegmentation.from_pretrained(name, output_loading_info=True)
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"the detector {name!r} can be had neither as a folder nor from the hub: {reason}") from error
    if report["missing_keys"]:
        raise ValueError(f"{name} lacks weights of a Mask2Former: {', '.join(sorted(report['missing_keys'])[:3])}")
    labels = network.config.id2label
    other = [label for i, label in labels.items() if label in NAMES and NAMES[int(i)] != label]
    if len(labels) != len(NAMES) or other:
        raise ValueError(f"{name} does not detect COCO's 80 classes in COCO's order: it has {len(labels)}, {other[:3]}")
    return network.eval().requires_grad_(False)

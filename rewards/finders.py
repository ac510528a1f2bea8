"""Where is the named object? What finds one box in each picture, for rewards that compare boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.shapes.scenes import COLORS, SHAPES, SIZE
from flowalign.shapes.verifier import Detected, detect
from rewards.geometry import Boxes
from rewards.pixels import BILINEAR, IMAGENET_MEAN, IMAGENET_STD, normalise, resize
from rewards.towers import Network, frozen

LONGEST = 1333 / 800  # of a detector's input: the longer side at most, by the shorter; COCO's usual test size
NOWHERE = (torch.nan,) * 4  # the box of what was not found


@runtime_checkable
class Finder(Protocol):
    """Finds objects by their names."""

    def find(self, pixels: Float[Tensor, "b 3 h w"], names: Sequence[str]) -> Boxes:
        """The box of the named object in each picture in [0, 1]: left, top, right and bottom in pixels, right and
        bottom exclusive, in float32 on the CPU; nan where there is none.

        Of several that fit one is taken: which one, the finder says. Raises: ValueError for a name it cannot read.
        """
        ...


class ShapesFinder:
    """Objects of the embedded world, named as "red circle", as its verifier reads them from pixels; the largest.

    What has the colour and not the shape, or an outline of no shape, is not found. The verifier knows shapes of 3.4 to
    6.8 pixels of half extent. Boxes are whole pixels: half an object's edge pixels belong to it.

    Raises: ValueError for another name, and for pictures that are not 32 x 32.
    """

    def find(self, pixels: Float[Tensor, "b 3 h w"], names: Sequence[str]) -> Boxes:
        if pixels.shape[2:] != (SIZE, SIZE):
            raise ValueError(f"ShapesFinder reads pictures of {SIZE} x {SIZE}, got {list(pixels.shape[2:])}")
        wanted = [_color_and_shape(name) for name in names]
        rows = [_largest(things, *pair) for things, pair in zip(detect(pixels), wanted, strict=True)]
        return torch.tensor(rows).reshape(-1, 4)


def _color_and_shape(name: str) -> tuple[str, str]:
    words = name.lower().split()
    if len(words) != 2 or words[0] not in COLORS or words[1] not in SHAPES:
        raise ValueError(
            f'ShapesFinder looks for a colour and a shape such as "red circle", not {name!r}; colours are '
            f"{', '.join(COLORS)}, shapes {', '.join(SHAPES)}"
        )
    return words[0], words[1]


def _largest(things: Sequence[Detected], color: str, shape: str) -> tuple[float, ...]:
    return next((thing.box for thing in things if (thing.color, thing.shape) == (color, shape)), NOWHERE)


class GroundingDINO:
    """Objects of any name by Grounding DINO (arXiv:2303.05499), as transformers has it: the surest box.

    A box's score is the largest probability of any token of the name, and a box counts above `threshold`. Talk2Move
    detects with the tiny model at 0.3 and takes the first of the boxes above it, which need not be the surest. Pictures
    are resized as transformers' processor does on PIL, and normalised by ImageNet's constants. The published weights
    were not run here: tested are inputs and read-out, on a small random network against transformers' own.

    Args:
        model: a folder or hub id of a GroundingDinoForObjectDetection with its tokenizer. The licence of the published
            ones, IDEA-Research/grounding-dino-tiny and -base, is Apache-2.0.
        threshold: the least score of a box, in [0, 1).
        short_side: pixels of a picture's shorter side in the network, at least 96; fewer where the longer would have
            more than 1.67 times as many.
        device: where the network stays; by default it follows the pictures.
        batch_size: pictures that pass through the network at once.
        offload: keeps the network on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError where the model cannot be had or lacks weights, for numbers out of range, and for an empty name.
    """

    def __init__(
        self,
        model: str = "IDEA-Research/grounding-dino-tiny",
        threshold: float = 0.3,
        short_side: int = 800,
        device: str | None = None,
        batch_size: int = 4,
        offload: bool = False,
    ) -> None:
        if not 0 <= threshold < 1 or short_side < 96 or batch_size < 1:
            raise ValueError(
                "threshold must be in [0, 1), short_side at least 96 and batch_size at least 1, "
                f"got {threshold}, {short_side} and {batch_size}"
            )
        loaded, self.tokenizer = _load(model)
        self.model = frozen(loaded)
        self.network = Network(self.model, offload)
        self.threshold, self.short_side = float(threshold), short_side
        self.device, self.batch_size = device, batch_size

    @torch.no_grad()
    def find(self, pixels: Float[Tensor, "b 3 h w"], names: Sequence[str]) -> Boxes:
        texts, device = [_as_text(name) for name in names], torch.device(self.device or pixels.device)
        starts = range(0, len(pixels), self.batch_size)

        def look() -> list[Tensor]:
            return [
                self._look(pixels[i : i + self.batch_size].to(device), texts[i : i + self.batch_size]) for i in starts
            ]

        return torch.cat([torch.zeros(0, 4), *self.network.run(device, look)])

    def _look(self, pixels: Float[Tensor, "b 3 h w"], texts: list[str]) -> Boxes:
        height, width = pixels.shape[2:]
        given = resize(pixels, *input_size(height, width, self.short_side), BILINEAR)
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(pixels.device)
        made = self.model(pixel_values=normalise(given, IMAGENET_MEAN, IMAGENET_STD), **tokens)
        return surest(made.logits.float().cpu(), made.pred_boxes.float().cpu(), self.threshold, height, width)


def input_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """A picture's size in the network: the shorter side `short_side`, or less where the longer would be too long."""
    low, high = min(height, width), max(height, width)
    short = min(float(short_side), int(short_side * LONGEST) * low / high)
    sides = round(short), int(short * high / low)
    return sides if height <= width else sides[::-1]


def surest(
    logits: Float[Tensor, "b q n"], boxes: Float[Tensor, "b q 4"], threshold: float, height: int, width: int
) -> Boxes:
    """The box with the highest probability of any token, in pixels; nan where none is above the threshold.

    Args:
        boxes: centre, width and height as shares of the picture.
    """
    score, query = logits.sigmoid().amax(2).max(1)
    chosen = boxes[torch.arange(len(boxes)), query] * torch.tensor([width, height, width, height])
    corners = torch.cat([chosen[:, :2] - chosen[:, 2:] / 2, chosen[:, :2] + chosen[:, 2:] / 2], 1)
    return corners.where((score > threshold)[:, None], torch.nan)


def _as_text(name: str) -> str:
    text = name.strip().lower().rstrip(".")
    if not text:
        raise ValueError(f"GroundingDINO looks for an object by its name, and got {name!r}")
    return f"{text}."  # each phrase in lower case and ended by a full stop, as it was trained


def _load(name: str) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, GroundingDinoForObjectDetection, PretrainedConfig

    folder = str(Path(name).expanduser())
    try:
        kind = PretrainedConfig.get_config_dict(folder)[0].get("model_type")
        if kind != "grounding-dino":
            raise ValueError(f"{name} holds a model of type {kind!r}, and GroundingDINO needs a 'grounding-dino'")
        model, report = GroundingDinoForObjectDetection.from_pretrained(folder, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: weights of another shape
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the detector {name!r} can be had neither as a folder nor from the hub: {reason}") from error
    if report["missing_keys"]:
        lacking = ", ".join(sorted(report["missing_keys"])[:3])
        raise ValueError(f"{name} lacks weights of a Grounding DINO: {lacking}")
    return model, tokenizer

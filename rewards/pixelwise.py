"""Consistency of depth and of segments, by networks of transformers; see `rewards.consistency`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rewards.base import Card
from rewards.clip import load_pretrained, local_name, preprocessor_config, unavailable
from rewards.consistency import LEAST, Consistency, Errors, Map, ValueConsistency
from rewards.siglip import Squash, square_preprocessing
from rewards.towers import Dtype, Network, frozen, weights_file

DEPTH = {"dpt": "DPTForDepthEstimation", "depth_anything": "DepthAnythingForDepthEstimation"}
SEGMENTS = {"segformer": "SegformerForSemanticSegmentation", "upernet": "UperNetForSemanticSegmentation"}
IGNORED = 255  # of a label: the pixel does not count


class Predictor:
    """A frozen network over pictures in [0, 1], which are squashed to the size that it was trained on.

    Args:
        model: a folder or hub id. kinds: of transformers' classes, by their model type. reader: the reward that asks.
        Others: as of `rewards.towers.PictureTower`.

    Raises: ValueError where the model is of no such kind, or cannot be had.
    """

    def __init__(
        self,
        model: str,
        kinds: Mapping[str, str],
        reader: str,
        image_size: int,
        device: str | None,
        batch_size: int,
        dtype: Dtype,
        offload: bool,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model: Any = frozen(_load(model, kinds, reader), dtype)
        self.network = Network(self.model, offload)
        self.dtype, self.device, self.batch_size = getattr(torch, dtype), device, batch_size
        config = preprocessor_config(local_name(model))
        if not config:
            raise ValueError(f"{model} has no preprocessor_config.json, which tells {reader} how it wants its pictures")
        self.prepare: Squash = square_preprocessing(model, config, image_size)

    def __call__(self, pixels: Float[Tensor, "b 3 h w"], output: str) -> Tensor:
        """A field of the network's output, in float32 on the pictures' device."""
        device = torch.device(self.device or pixels.device)

        def run() -> Tensor:
            parts = pixels.to(device).split(self.batch_size)
            made = [self.model(pixel_values=self.prepare(part).to(self.dtype))[output] for part in parts]
            return torch.cat(made).float()

        return self.network.run(device, run).to(pixels.device)


def _load(model: str, kinds: Mapping[str, str], reader: str) -> Any:
    import transformers

    folder = local_name(model)
    try:
        kind = transformers.PretrainedConfig.get_config_dict(folder)[0].get("model_type")
    except OSError as error:
        raise ValueError(unavailable(reader, model, error)) from error
    if kind not in kinds:
        raise ValueError(f"{model} holds a model of type {kind!r}; {reader} takes {' or '.join(kinds)}")
    return load_pretrained(getattr(transformers, kinds[kind]), kind, model, reader)


class DepthConsistency(ValueConsistency):
    """Consistency of relative depth, nearest 1: of each map by its largest value, as Ctrl-U's authors compare them.

    Args:
        model: a folder or hub id of a DPTForDepthEstimation, or DepthAnythingForDepthEstimation of relative depth. The
            weights of Ctrl-U's, dpt-hybrid-midas, are under Apache-2.0, and so are those of Depth Anything V2 Small;
            its larger ones are for non-commercial use.
        of_media: see `Consistency`. False: control pictures of depth are maps of it, near white.
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures that pass through the model at once.
        dtype: of the model; the rest is float32. See `rewards.towers.frozen`.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError where the model cannot be had, or estimates metres.
    """

    name = "depth_consistency"
    card = Card("Intel/dpt-hybrid-midas", "Apache-2.0", (-0.2, 0.0), opens_files=True)

    def __init__(
        self,
        model: str = "Intel/dpt-hybrid-midas",
        of_media: bool = False,
        device: str | None = None,
        batch_size: int = 8,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        self.of_media = of_media
        self.predictor = Predictor(model, DEPTH, "DepthConsistency", 384, device, batch_size, dtype, offload)
        if getattr(self.predictor.model.config, "depth_estimation_type", "relative") != "relative":
            raise ValueError(
                f"{model} estimates metres, which grow with distance; DepthConsistency needs relative depth"
            )

    def predict(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        depth = self.predictor(pixels, "predicted_depth")[:, None]
        return by_largest(F.interpolate(depth, pixels.shape[2:], mode="bilinear", align_corners=False))

    def told(self, pixels: Float[Tensor, "b 3 h w"]) -> Map:
        return by_largest(super().told(pixels))


def by_largest(depth: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Each map divided by its largest value, through which gradients run too."""
    return depth / depth.amax((1, 2, 3), keepdim=True).clamp(min=LEAST)


class SegmentConsistency(Consistency):
    """Consistency of semantic segments: minus the mean cross-entropy of the wanted class at each pixel.

    Two maps are KL(p_2 || p_1) of class probabilities apart, as in Ctrl-U's code. Pixels of no class do not count.

    Args:
        model: a folder or hub id of a SegformerForSemanticSegmentation or UperNetForSemanticSegmentation. The weights
            of UperNet's with ConvNeXt are under MIT; NVIDIA's SegFormer's are for non-commercial use.
        palette: a file .npy of [classes + 1, 3] colours in 0 ... 255: the first is of no class, the others of the
            model's classes in their order, as ADE20K's are painted. Each pixel of a control picture has the class of
            the nearest colour. Without one the classes are those that the model sees in the prompt's real picture.
        device, batch_size, dtype, offload: as of `DepthConsistency`.

    Raises: ValueError where the model cannot be had, and for a palette of another number of colours.
    """

    name = "segment_consistency"
    card = Card("openmmlab/upernet-convnext-small", "MIT", (-5.0, 0.0), opens_files=True)

    def __init__(
        self,
        model: str = "openmmlab/upernet-convnext-small",
        palette: str | None = None,
        device: str | None = None,
        batch_size: int = 8,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        self.of_media = palette is None
        self.predictor = Predictor(model, SEGMENTS, "SegmentConsistency", 512, device, batch_size, dtype, offload)
        classes = int(self.predictor.model.config.num_labels)
        self.colours = torch.zeros(1, 3) if palette is None else read_palette(palette, classes)

    def predict(self, pixels: Float[Tensor, "b 3 h w"]) -> Map:
        """Logits, at the network's own resolution."""
        return self.predictor(pixels, "logits")

    def told(self, pixels: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b h w"]:
        flat = (255 * pixels).permute(0, 2, 3, 1).flatten(0, 2)
        nearest = torch.cat([torch.cdist(part, self.colours.to(part)).argmin(1) for part in flat.split(2**16)])
        classes = nearest.view(len(pixels), *pixels.shape[2:]) - 1
        return classes.where(classes >= 0, IGNORED)

    def seen(self, predicted: Map) -> Int[Tensor, "b h w"]:
        return predicted.argmax(1)

    def compare(self, predicted: Map, wanted: Tensor) -> tuple[Errors, Bool[Tensor, "b k l"]]:
        labels = F.interpolate(wanted[:, None].float(), predicted.shape[2:], mode="nearest")[:, 0].long()
        return F.cross_entropy(predicted, labels, ignore_index=IGNORED, reduction="none"), labels != IGNORED

    def apart(self, first: Map, second: Map) -> Errors:
        return F.kl_div(first.log_softmax(1), second.log_softmax(1), reduction="none", log_target=True).sum(1)


def read_palette(file: str, classes: int) -> Float[Tensor, "n 3"]:
    """The colours of a palette's file. Raises: ValueError where they are not one more than there are classes."""
    path = weights_file(file, "palette.npy")
    try:
        colours = torch.from_numpy(np.load(path, allow_pickle=False)).float()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an array of numpy's: {error}") from error
    if colours.shape != (classes + 1, 3):
        raise ValueError(
            f"{path} has the shape {[*colours.shape]}; a model of {classes} classes needs [{classes + 1}, 3] colours: "
            "that of no class, then one of each"
        )
    return colours

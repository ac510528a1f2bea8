"""CLIPScore by any model of open_clip (github.com/mlfoundations/open_clip): the extra `openclip`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rewards.base import Card
from rewards.pixels import normalise, resize, resize_shortest
from rewards.siglip import Squash
from rewards.towers import Dtype, TwoTowers


class OpenCLIPScore(TwoTowers):
    """cos(image embedding, text embedding) in float32, in [-1, 1]; differentiable to the pixels.

    The model's own tokenizer, with its cleaning, and its own preprocessing: the shortest side and the middle, the
    longest side and a border, or squashed; with its size and channel constants. Texts are cut at the model's length.

    Args:
        model: a name of open_clip, such as "ViT-B-16-SigLIP", or "hf-hub:" and a hub id, or "local-dir:" and a folder
            with an open_clip_config.json.
        pretrained: open_clip's tag of the weights, such as "webli", or a file of them; empty where `model` is a hub id
            or a folder. Licences are those of the weights chosen.
        prefix: put before every prompt.
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures, or prompts, that pass through the model at once.
        dtype: of the model; the rest is float32. See `rewards.towers.frozen`.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError without open_clip, where it has no such model or weights, and for a resize that is not bicubic.
    """

    name = "openclip_score"
    card = Card("open_clip: model and pretrained", "of the weights chosen")

    def __init__(
        self,
        model: str,
        pretrained: str = "",
        prefix: str = "",
        device: str | None = None,
        batch_size: int = 32,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        open_clip = _open_clip()
        network = _network(open_clip, model, pretrained)
        super().__init__(network, device, batch_size, dtype, offload)
        self.prepare = preparation(open_clip.get_model_preprocess_cfg(network), f"{model} {pretrained}".strip())
        self.tokenizer, self.prefix = open_clip.get_tokenizer(model), prefix

    def picture_features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.model.encode_image(self.prepare(pixels).to(self.dtype))

    def text_features(self, texts: list[str], device: torch.device) -> Float[Tensor, "b d"]:
        return self.model.encode_text(self.tokenizer([self.prefix + text for text in texts]).to(device))


def _open_clip() -> Any:
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError beside a torch of another build
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            "OpenCLIPScore needs open_clip and a torchvision that fits torch: "
            f"pip install 'flowalign-diffusion[openclip]': {reason}"
        ) from error
    return open_clip


def _network(open_clip: Any, model: str, pretrained: str) -> Any:
    """The model with its weights: one with random ones would score too."""
    if not pretrained and not model.startswith(("hf-hub:", "local-dir:")):
        known = ", ".join(open_clip.list_pretrained_tags_by_model(model)[:5]) or "none; see open_clip.list_models()"
        raise ValueError(f"which weights of {model!r}? open_clip's tags for it: {known}")
    try:
        return open_clip.create_model(model, pretrained=pretrained or None, require_pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        weights = f"weights {pretrained!r}" if pretrained else "its weights"
        raise ValueError(f"open_clip cannot make {model!r} with {weights}: {reason}") from error


def preparation(config: dict[str, Any], name: str) -> Callable[[Tensor], Tensor]:
    """From pictures in [0, 1] to the network's input, as open_clip's `image_transform` does it in evaluation.

    Raises: ValueError for a way of resizing that is not known.
    """
    if config["interpolation"] not in ("bicubic", "random"):  # "random" is of training, and bicubic in evaluation
        raise ValueError(f"{name} resizes {config['interpolation']}, and only bicubic is known")
    height, width = (config["size"],) * 2 if isinstance(config["size"], int) else config["size"]
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if config["resize_mode"] == "squash":
        return Squash(height, width, mean, std)
    if config["resize_mode"] == "shortest" and height == width:
        return ShortestSide(height, mean, std)
    if config["resize_mode"] == "longest":
        return LongestSideIn(height, width, config["fill_color"] / 255, mean, std)
    raise ValueError(f"{name} resizes the {config['resize_mode']} side to {height} x {width}, which is not known")


@dataclass(frozen=True)
class ShortestSide:
    """The shortest side to `size` and the middle; the margin's half is rounded to even, as torchvision does."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 k k"]:
        """The network's input for pictures in [0, 1]; differentiable."""
        resized = resize_shortest(pixels, self.size)
        return normalise(crop_or_pad(resized, self.size, self.size, 0.0), self.mean, self.std)


@dataclass(frozen=True)
class LongestSideIn:
    """As large as fits into `height` x `width`, with a border of the level `fill` around it."""

    height: int
    width: int
    fill: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 k l"]:
        """The network's input for pictures in [0, 1]; differentiable."""
        ratio = max(pixels.shape[2] / self.height, pixels.shape[3] / self.width)
        resized = resize(pixels, max(round(pixels.shape[2] / ratio), 1), max(round(pixels.shape[3] / ratio), 1))
        return normalise(crop_or_pad(resized, self.height, self.width, self.fill), self.mean, self.std)


def crop_or_pad(pixels: Float[Tensor, "b 3 h w"], height: int, width: int, fill: float) -> Float[Tensor, "b 3 k l"]:
    """The middle `height` x `width`, with a border where the picture is smaller."""
    more_h, more_w = max(height - pixels.shape[2], 0), max(width - pixels.shape[3], 0)
    around = (more_w // 2, more_w - more_w // 2, more_h // 2, more_h - more_h // 2)
    padded = F.pad(pixels, around, value=fill)
    top, left = round((padded.shape[2] - height) / 2), round((padded.shape[3] - width) / 2)
    return padded[:, :, top : top + height, left : left + width]

"""SigLIP: the cosine of picture and prompt by a model trained on pairs alone (arXiv:2303.15343, Zhai et al.)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card
from rewards.clip import load_pretrained, local_name, preprocessor_config, resize_kernel, unavailable
from rewards.pixels import BICUBIC, Kernel, normalise, resize
from rewards.towers import Dtype, TwoTowers

HALF = (0.5, 0.5, 0.5)  # both mean and standard deviation of SigLIP's pixels


@dataclass(frozen=True)
class Squash:
    """A picture to `height` x `width` whatever its aspect, in 8 bit as PIL; channels normalised."""

    height: int
    width: int
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    kernel: Kernel = BICUBIC

    def __call__(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 k l"]:
        """The network's input for pictures in [0, 1]; differentiable."""
        return normalise(resize(pixels, self.height, self.width, self.kernel), self.mean, self.std)


class SigLIPScore(TwoTowers):
    """cos(image embedding, text embedding) in float32, in [-1, 1]; differentiable to the pixels.

    The part "siglip_logit" is exp(scale) cos + bias; its sigmoid is the model's probability that the two belong to one
    another. Texts are in lower case, and always padded to the model's length, as in training.

    Args:
        model: a folder or hub id of a SiglipModel with its tokenizer. The weights of Google's are under Apache-2.0. The
            first SigLIP's tokenizers need the package sentencepiece. SigLIP2 of a fixed size is a SiglipModel too; its
            preprocessor_config.json asks for a bilinear resize, and is followed.
        prefix: put before every prompt; for class names SigLIP's authors use "a photo of ".
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures, or prompts, that pass through the model at once.
        processor: a folder or hub id of the tokenizer and the preprocessor_config.json, where they are not the model's.
        dtype: of the model; the rest is float32. See `rewards.towers.frozen`.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError where the model is none, lacks weights or tokenizer, or prepares pictures in another way.
    """

    name = "siglip_score"
    card = Card("google/siglip-so400m-patch14-384", "Apache-2.0")

    def __init__(
        self,
        model: str = "google/siglip-so400m-patch14-384",
        prefix: str = "",
        device: str | None = None,
        batch_size: int = 16,
        processor: str | None = None,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        from transformers import SiglipModel

        network = load_pretrained(SiglipModel, "siglip", model, "SigLIPScore")
        super().__init__(network, device, batch_size, dtype, offload)
        self.tokenizer, self.prefix = _tokenizer(processor or model), prefix
        config = preprocessor_config(local_name(processor or model))
        self.prepare = square_preprocessing(model, config, int(network.config.vision_config.image_size))

    def score(self, media: Media, prompts: Prompts) -> Scores:
        total = self.cosine(media, [self.prefix + text for text in prompts.text])
        scale, bias = (value.detach().to(total.device) for value in (self.model.logit_scale, self.model.logit_bias))
        parts = {self.name: total, "siglip_logit": scale.exp() * total + bias}
        return Scores(total, parts, torch.isfinite(total.detach()))

    def picture_features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.model.get_image_features(pixel_values=self.prepare(pixels)).pooler_output

    def text_features(self, texts: list[str], device: torch.device) -> Float[Tensor, "b d"]:
        length = int(self.model.config.text_config.max_position_embeddings)
        lower = [text.lower() for text in texts]
        tokens = self.tokenizer(lower, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self.model.get_text_features(input_ids=tokens.input_ids.to(device)).pooler_output  # no mask, as trained


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(local_name(name))
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(unavailable("SigLIP tokenizer's", name, error)) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"{name} has no tokenizer; save the model's into its folder")
    return tokenizer


def square_preprocessing(name: str, config: dict[str, Any], image_size: int) -> Squash:
    """What the config says, as far as it is SigLIP's way: a resize to a fixed size, normalised.

    Raises: ValueError where it says something else.
    """
    size = config.get("size", {"height": image_size, "width": image_size})
    size = {"height": size, "width": size} if isinstance(size, int) else size
    steps = all(config.get(step, True) for step in ("do_resize", "do_rescale", "do_normalize"))
    if not steps or config.get("do_center_crop") or {*size} != {"height", "width"}:
        raise ValueError(f"{name} does not resize to a fixed height and width, as SigLIP does: {config}")
    mean, std = (tuple(map(float, config.get(key, HALF))) for key in ("image_mean", "image_std"))
    return Squash(size["height"], size["width"], mean, std, resize_kernel(name, config))

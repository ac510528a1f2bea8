"""CLIPScore: the cosine between a CLIP model's embeddings of a picture and of its prompt (arXiv:2104.08718)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from flowalign.records import Media, Prompts, Scores
from rewards.base import Reward, simple_scores
from rewards.pixels import CLIP_MEAN, CLIP_STD, Preprocessing, pictures

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

SHAPES = "shapes"
BICUBIC = 3  # PIL's number for the filter, as in preprocessor_config.json


class CLIPScore(Reward):
    """cos(image embedding, text embedding) in float32, in [-1, 1]; differentiable to the pixels.

    The plain cosine: no factor 2.5 and no clipping at zero, which CLIPScore's authors add, and no logit scale. Each
    distinct prompt is embedded once and kept. Prompts beyond the model's length are cut.

    Args:
        model: a folder or hub id of a transformers CLIPModel with its tokenizer, or "shapes", the embedded one. The
            weights of openai/clip-vit-large-patch14 are under the MIT licence, the embedded ones under Apache-2.0. A
            preprocessor_config.json beside the weights is followed; without one, pictures are resized to the model's
            image size and normalised with OpenAI CLIP's constants.
        prefix: put before every prompt; CLIPScore's authors use "A photo depicts ".
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures, or prompts, that pass through the model at once.
        processor: a folder or hub id of the tokenizer and the preprocessor_config.json, where they are not the model's.

    Raises: ValueError where the model is none, lacks weights or tokenizer, or prepares pictures in another way.
    """

    name = "clip_score"
    differentiable = True

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        prefix: str = "",
        device: str | None = None,
        batch_size: int = 32,
        processor: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        loaded, self.tokenizer, config = _load(model, processor or model)
        self.model = loaded.float().eval().requires_grad_(False)
        self.prepare = _preprocessing(model, config, int(loaded.config.vision_config.image_size))
        self.prefix, self.device, self.batch_size = prefix, device, batch_size
        self._embedded: dict[str, Tensor] = {}

    def score(self, media: Media, prompts: Prompts) -> Scores:
        pixels = pictures(media, type(self).__name__)
        device = torch.device(self.device or pixels.device)
        self.model.to(device)
        with torch.autocast(device.type, enabled=False):  # a bfloat16 cosine has errors as large as a group's spread
            texts = self.embed_texts([self.prefix + text for text in prompts.text], device)
            images = torch.cat([self.embed_pictures(part) for part in pixels.to(device).split(self.batch_size)])
            total = (images * texts).sum(1)
        return simple_scores(self.name, total.to(pixels.device))

    def embed_pictures(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit embeddings of pictures on the model's device."""
        features = self.model.get_image_features(pixel_values=self.prepare(pixels))
        return F.normalize(features.pooler_output.float(), dim=1)

    @torch.no_grad()
    def embed_texts(self, texts: list[str], device: torch.device) -> Float[Tensor, "b d"]:
        """Unit embeddings of texts; `device` is the model's."""
        new = [text for text in dict.fromkeys(texts) if text not in self._embedded]
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            tokens = self.tokenizer(part, padding=True, truncation=True, max_length=self._length, return_tensors="pt")
            ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
            features = self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
            self._embedded.update(zip(part, F.normalize(features.float(), dim=1).cpu(), strict=True))
        return torch.stack([self._embedded[text] for text in texts]).to(device)

    @property
    def _length(self) -> int:
        return min(int(self.tokenizer.model_max_length), int(self.model.config.text_config.max_position_embeddings))


def _load(name: str, processor: str) -> tuple[CLIPModel, CLIPTokenizer, dict[str, Any]]:
    """The model, its tokenizer and its preprocessor config, {} where there is none."""
    from transformers import CLIPModel, CLIPTokenizer, PretrainedConfig

    from flowalign.shapes import WEIGHTS, clip

    folder = str(WEIGHTS / "clip") if name == SHAPES else str(Path(name).expanduser())
    if name.startswith((".", "/", "~")) and not Path(folder).is_dir():
        raise ValueError(f"{name} is not a folder; name a CLIPModel's folder, a hub id, or 'shapes'")
    beside = folder if processor == name else str(Path(processor).expanduser())
    try:
        kind = PretrainedConfig.get_config_dict(folder)[0].get("model_type")
        if kind != "clip":
            raise ValueError(f"{name} holds a model of type {kind!r}, CLIPScore needs a CLIPModel (type 'clip')")
        if name == SHAPES:
            return *clip(), _preprocessor_config(folder)
        model, report = CLIPModel.from_pretrained(folder, output_loading_info=True)
        tokenizer = CLIPTokenizer.from_pretrained(beside)
    except OSError as error:
        raise ValueError(_unavailable(name, error)) from error
    if report["missing_keys"]:
        raise ValueError(f"{name} lacks weights of a CLIPModel: {', '.join(sorted(report['missing_keys'])[:3])}")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without tokenizer files
        raise ValueError(f"{processor} has no tokenizer; save the model's CLIPTokenizer into its folder")
    return model, tokenizer, _preprocessor_config(beside)


def _unavailable(name: str, error: OSError) -> str:
    reason = str(error).strip().split("\n")[0]
    return f"the CLIP model {name!r} can be had neither as a folder nor from the hub: {reason}"


def _preprocessor_config(folder: str) -> dict[str, Any]:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return dict(ImageProcessingMixin.get_image_processor_dict(folder)[0])
    except OSError:
        return {}


def _preprocessing(name: str, config: dict[str, Any], image_size: int) -> Preprocessing:
    """What the config says, as far as it is CLIP's way: bicubic to the shortest side, centre crop, normalised."""
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    size, crop = _shortest(config.get("size", image_size)), _side(config.get("crop_size", image_size))
    if size is None or crop is None or not all(config.get(step, True) for step in steps):
        raise ValueError(f"{name} does not resize the shortest side and crop the middle, as CLIP does: {config}")
    if config.get("resample", BICUBIC) != BICUBIC:
        raise ValueError(f"{name} resizes with PIL's filter {config['resample']}, CLIPScore only with bicubic (3)")
    mean, std = config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)
    return Preprocessing(size, crop, tuple(map(float, mean)), tuple(map(float, std)))


def _shortest(size: int | dict[str, int | None]) -> int | None:
    """The shortest side in pixels, in any of transformers' spellings; None where the config asks for another resize."""
    if isinstance(size, int):
        return size
    return None if size.get("longest_edge") else size.get("shortest_edge")


def _side(crop: int | dict[str, int | None]) -> int | None:
    """The side of a square crop in pixels; None where it is not square."""
    if isinstance(crop, int):
        return crop
    return crop.get("height") if crop.get("height") == crop.get("width") else None

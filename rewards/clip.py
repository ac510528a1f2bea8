"""CLIPScore: the cosine between a CLIP model's embeddings of a picture and of its prompt (arXiv:2104.08718)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, simple_scores
from rewards.pixels import BICUBIC, BILINEAR, CLIP_MEAN, CLIP_STD, Kernel, Preprocessing
from rewards.towers import Dtype, TwoTowers

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

SHAPES = "shapes"
KERNELS = {2: BILINEAR, 3: BICUBIC}  # by PIL's number, as in preprocessor_config.json


class CLIPTowers(TwoTowers):
    """The cosine by a transformers CLIPModel.

    prepare: from pictures in [0, 1] to the network's input.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        prepare: Callable[[Tensor], Tensor],
        device: str | None,
        batch_size: int,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        super().__init__(model, device, batch_size, dtype, offload)
        self.tokenizer, self.prepare = tokenizer, prepare

    def picture_features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.model.get_image_features(pixel_values=self.prepare(pixels)).pooler_output

    def text_features(self, texts: list[str], device: torch.device) -> Float[Tensor, "b d"]:
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self._length, return_tensors="pt")
        ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
        return self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output

    @property
    def _length(self) -> int:
        return min(int(self.tokenizer.model_max_length), int(self.model.config.text_config.max_position_embeddings))


class CLIPScore(CLIPTowers):
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
        dtype: of the model; the rest is float32. See `rewards.towers.frozen`.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError where the model is none, lacks weights or tokenizer, or prepares pictures in another way.
    """

    name = "clip_score"
    card = Card("openai/clip-vit-large-patch14", "MIT", (0.15, 0.4))

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        prefix: str = "",
        device: str | None = None,
        batch_size: int = 32,
        processor: str | None = None,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        loaded, tokenizer, config = load_clip(model, processor or model)
        prepare = preprocessing(model, config, int(loaded.config.vision_config.image_size))
        super().__init__(loaded, tokenizer, prepare, device, batch_size, dtype, offload)
        self.prefix = prefix

    def score(self, media: Media, prompts: Prompts) -> Scores:
        return simple_scores(self.name, self.cosine(media, [self.prefix + text for text in prompts.text]))


def load_clip(name: str, processor: str) -> tuple[CLIPModel, CLIPTokenizer, dict[str, Any]]:
    """The model, its tokenizer and its preprocessor config, {} where there is none."""
    from flowalign.shapes import clip

    folder = local_name(name)
    beside = folder if processor == name else local_name(processor)
    if name == SHAPES:
        try:
            return *clip(), preprocessor_config(folder)
        except OSError as error:
            raise ValueError(unavailable("CLIP", name, error)) from error
    return load_clip_model(name, "CLIPScore"), load_tokenizer(beside, processor), preprocessor_config(beside)


def local_name(name: str) -> str:
    """A folder or hub id as transformers takes it.

    Raises: ValueError for a path that is no folder.
    """
    from flowalign.shapes import WEIGHTS

    folder = str(WEIGHTS / "clip") if name == SHAPES else str(Path(name).expanduser())
    if name.startswith((".", "/", "~")) and not Path(folder).is_dir():
        raise ValueError(f"{name} is not a folder; name a model's folder, a hub id, or 'shapes'")
    return folder


def load_clip_model(name: str, reader: str) -> CLIPModel:
    """The CLIPModel of a folder or hub id; `reader` is the reward that asks for it."""
    from transformers import CLIPModel

    return load_pretrained(CLIPModel, "clip", name, reader)


def load_pretrained(kind: Any, model_type: str, name: str, reader: str) -> Any:
    """A model of a transformers class with all its weights; a folder may hold more weights than it has.

    Raises: ValueError where the model is of another type, or is missing, or some of its weights are.
    """
    from transformers import PretrainedConfig

    folder, what = local_name(name), kind.__name__.removesuffix("Model")
    try:
        found = PretrainedConfig.get_config_dict(folder)[0].get("model_type")
        if found != model_type:
            raise ValueError(
                f"{name} holds a model of type {found!r}, {reader} needs a {kind.__name__} (type {model_type!r})"
            )
        model, report = kind.from_pretrained(folder, output_loading_info=True)
    except OSError as error:
        raise ValueError(unavailable(what, name, error)) from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ValueError(f"{name} lacks weights of a {kind.__name__}: {missing}")
    return model


def load_tokenizer(folder: str, name: str) -> CLIPTokenizer:
    """The CLIPTokenizer of a folder or hub id; `name` is what the user calls it.

    Raises: ValueError where there is none.
    """
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except OSError as error:
        raise ValueError(unavailable("CLIP", name, error)) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without tokenizer files
        raise ValueError(f"{name} has no tokenizer; save the model's CLIPTokenizer into its folder")
    return tokenizer


def unavailable(kind: str, name: str, error: Exception) -> str:
    """One line about what can be had neither as a folder nor from the hub."""
    reason = str(error).strip().split("\n")[0]
    return f"the {kind} model {name!r} can be had neither as a folder nor from the hub: {reason}"


def preprocessor_config(folder: str) -> dict[str, Any]:
    """What preprocessor_config.json of a folder or hub id says, {} where there is none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return dict(ImageProcessingMixin.get_image_processor_dict(folder)[0])
    except OSError:
        return {}


def preprocessing(name: str, config: dict[str, Any], image_size: int) -> Preprocessing:
    """What the config says, as far as it is CLIP's way: a resize of the shortest side, the middle, normalised."""
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    size, crop = _shortest(config.get("size", image_size)), _side(config.get("crop_size", image_size))
    if size is None or crop is None or not all(config.get(step, True) for step in steps):
        raise ValueError(f"{name} does not resize the shortest side and crop the middle, as CLIP does: {config}")
    mean, std = config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)
    return Preprocessing(size, crop, tuple(map(float, mean)), tuple(map(float, std)), resize_kernel(name, config))


def resize_kernel(name: str, config: dict[str, Any]) -> Kernel:
    """The kernel of the config's "resample", bicubic where it does not say.

    Raises: ValueError for one that is neither bilinear nor bicubic.
    """
    number = config.get("resample", 3)
    if number not in KERNELS:
        raise ValueError(f"{name} resizes with PIL's filter {number}; known are bilinear (2) and bicubic (3)")
    return KERNELS[number]


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

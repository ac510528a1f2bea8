"""Is it the same subject? Embeddings of a picture and of reference pictures, as DreamBooth measures (arXiv:2208.12242).

Its third measure, CLIP-T, is `CLIPScore("openai/clip-vit-base-patch32")`: the cosine of picture and prompt.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, simple_scores
from rewards.clip import CLIPScore
from rewards.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise, resize_shortest, rounded_center_crop
from rewards.towers import Dtype, PictureTower, check_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ReferenceScore(PictureTower):
    """Mean of cos(picture, reference) over a picture's references, in float32, in [-1, 1].

        score_i = 1 / k_i sum_j e(x_i) e(r_ij),   |e| = 1

    Each picture may have another number of references; the mean of the scores of n pictures with the same references is
    the mean over all pairs that DreamBooth reports. Differentiable to the pictures, not to the references.

    Raises: ValueError for media without references, and for a set of them that is empty or no pictures.
    """

    def score(self, media: Media, prompts: Prompts) -> Scores:
        references = references_of(media, type(self).__name__)
        device = self.place(media)

        def rate() -> Float[Tensor, " b"]:
            return (self.embed_media(media) * self.mean_embeddings(references, device)).sum(1)

        return simple_scores(self.name, self.network.run(device, rate).to(media.pixels.device))

    @torch.no_grad()
    def mean_embeddings(self, references: Sequence[Tensor], device: torch.device) -> Float[Tensor, "b d"]:
        """Mean unit embedding of each set; sets that are one tensor, as in a group, are embedded once."""
        distinct = {id(pixels): pixels for pixels in references}
        means = {key: self.embed_media(Media(pixels.to(device))).mean(0) for key, pixels in distinct.items()}
        return torch.stack([means[id(pixels)] for pixels in references])


def references_of(media: Media, name: str) -> Sequence[Tensor]:
    """The references [k, 3, h, w] of each of the media, in [0, 1], at least one.

    Raises: ValueError, with the reward's name, where there are none, or not such.
    """
    if media.references is None:
        raise ValueError(
            f'{name} compares pictures with references, and there are none: name their files as "references" in each '
            "prompt's record, or give Media(pixels, references=...) a tensor [k, 3, h, w] for each of the media"
        )
    for i, pixels in enumerate(media.references):
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels) or not pixels.is_floating_point():
            raise ValueError(
                f"{name}: the references of media {i} must be pictures [k, 3, h, w] in [0, 1] with k of at least 1, "
                f"got the shape {list(pixels.shape)} and {pixels.dtype}"
            )
    return media.references


class CLIPImageScore(ReferenceScore):
    """CLIP-I: the mean cosine to the references by a CLIP's picture embeddings, about 0.5 to 0.95; differentiable.

    DreamBooth's authors report 0.885 between real pictures of one subject, and 0.80 to 0.81 for their own.

    Args:
        model: a folder or hub id of a transformers CLIPModel as for `CLIPScore`, or "shapes", the embedded one. The
            published one's licence is MIT. Pictures are prepared as its preprocessor_config.json says.
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures that pass through the model at once.
        dtype: of the model; the rest is float32. See `rewards.towers.frozen`.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError as `CLIPScore` and `ReferenceScore` do.
    """

    name = "clip_i"
    card = Card("openai/clip-vit-base-patch32", "MIT", (0.5, 0.95))

    def __init__(
        self,
        model: str = "openai/clip-vit-base-patch32",
        device: str | None = None,
        batch_size: int = 32,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        self.clip = CLIPScore(model, device=device, batch_size=batch_size)
        super().__init__(self.clip.model, device, batch_size, dtype, offload)

    def picture_features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.clip.picture_features(pixels)


class VisionScore(ReferenceScore):
    """The mean cosine to the references by the [CLS] state, after the last norm, of a vision transformer.

    Pictures are prepared as DINO's authors do in their evaluation (github.com/facebookresearch/dino, eval_knn.py): by
    PIL's bicubic resize of the shortest side, the middle cropped as torchvision does, and ImageNet's constants. This
    reproduces numbers of DreamBooth's paper (github.com/google/dreambooth, issue 3); DINO's preprocessor_config.json on
    the hub does not.

    Args:
        resize: of the shortest side, in pixels.
        crop: the side of what the network sees, in pixels; position embeddings of another size are interpolated.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        resize: int,
        crop: int,
        device: str | None,
        batch_size: int,
        dtype: Dtype,
        offload: bool,
    ) -> None:
        if not 1 <= crop <= resize:
            raise ValueError(f"crop must be at least 1 and at most resize, got {crop} and {resize}")
        super().__init__(model, device, batch_size, dtype, offload)
        self.resize, self.crop = resize, crop

    @abstractmethod
    def states(self, given: Float[Tensor, "b 3 k k"]) -> Float[Tensor, "b n d"]:
        """Last states of prepared pictures, [CLS] first."""

    def picture_features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        cropped = rounded_center_crop(resize_shortest(pixels, self.resize), self.crop)
        return self.states(normalise(cropped, IMAGENET_MEAN, IMAGENET_STD))[:, 0]


class DINOScore(VisionScore):
    """DINO: the mean cosine to the references by DINO's ViT-S/16 (arXiv:2104.14294), about 0.2 to 0.9; differentiable.

    Trained without labels, it tells one dog from another where CLIP sees two dogs. DreamBooth's authors report 0.774
    between real pictures of one subject, and 0.67 to 0.70 for their own.

    Args:
        model: a folder or hub id of a transformers ViTModel. The published one's licence is Apache-2.0.
        resize: of the shortest side, in pixels.
        crop: the side of what the network sees, in pixels.
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures that pass through the model at once.
        dtype: of the model; the rest is float32. See `rewards.towers.frozen`.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError where the model is none or lacks weights, and as `ReferenceScore` does.
    """

    name = "dino"
    card = Card("facebook/dino-vits16", "Apache-2.0", (0.2, 0.9))

    def __init__(
        self,
        model: str = "facebook/dino-vits16",
        resize: int = 256,
        crop: int = 224,
        device: str | None = None,
        batch_size: int = 32,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        super().__init__(load_vit(model), resize, crop, device, batch_size, dtype, offload)

    def states(self, given: Float[Tensor, "b 3 k k"]) -> Float[Tensor, "b n d"]:
        return self.model(pixel_values=given, interpolate_pos_encoding=True).last_hidden_state


class DINOv2Score(VisionScore):
    """`DINOScore` by DINOv2 (arXiv:2304.07193) instead.

    Args:
        model: a folder or hub id of a transformers Dinov2Model. The published ones' licence is Apache-2.0.
        resize: of the shortest side, in pixels.
        crop: the side of what the network sees, in pixels.
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures that pass through the model at once.
        dtype: of the model; the rest is float32. See `rewards.towers.frozen`.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError as `DINOScore` does.
    """

    name = "dinov2"
    card = Card("facebook/dinov2-small", "Apache-2.0", (0.1, 0.9))

    def __init__(
        self,
        model: str = "facebook/dinov2-small",
        resize: int = 256,
        crop: int = 224,
        device: str | None = None,
        batch_size: int = 32,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        from transformers import Dinov2Model

        network = load_vision(model, "dinov2", Dinov2Model.from_pretrained)
        super().__init__(network, resize, crop, device, batch_size, dtype, offload)

    def states(self, given: Float[Tensor, "b 3 k k"]) -> Float[Tensor, "b n d"]:
        return self.model(pixel_values=given).last_hidden_state


def load_vit(name: str) -> PreTrainedModel:
    """A ViTModel without a pooler, as DINO's are. Raises: ValueError as `load_vision` does."""
    from transformers import ViTModel

    return load_vision(name, "vit", partial(ViTModel.from_pretrained, add_pooling_layer=False))


def load_vision(name: str, kind: str, read: Callable[..., Any]) -> PreTrainedModel:
    """A model of a folder or hub id, with exactly the weights that it has.

    Args:
        kind: the model_type of its config.
        read: the class's from_pretrained.

    Raises: ValueError where there is none, it is of another type, or lacks weights or has others.
    """
    from transformers import PretrainedConfig

    folder = str(Path(name).expanduser())
    if name.startswith((".", "/", "~")) and not Path(folder).is_dir():
        raise ValueError(f"{name} is not a folder; name a folder or a hub id of a {kind} model")
    try:
        found = PretrainedConfig.get_config_dict(folder)[0].get("model_type")
        if found != kind:
            raise ValueError(f"{name} holds a model of type {found!r}, and one of type {kind!r} is needed")
        model, report = read(folder, output_loading_info=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: weights of another shape
        raise ValueError(
            f"the {kind} model {name!r} can be had neither as a folder nor from the hub; pass model=FOLDER: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    check_names(name, {*model.state_dict()} - report["missing_keys"] | report["unexpected_keys"], model.state_dict())
    return model

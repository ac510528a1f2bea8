"""Two predictors of how much people like the look of a picture, whatever the prompt: one linear head each.

Both heads were trained as five linear layers with nothing between them, so they are one: score = w . e + b, where e
is the unit embedding of the picture. The layers are multiplied in float64, and the score is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, simple_scores
from rewards.clip import load_clip_model, load_pretrained, local_name, preprocessing, preprocessor_config
from rewards.siglip import square_preprocessing
from rewards.towers import Dtype, PictureTower, check_names, read_weights, weights_file


class LinearHead(PictureTower):
    """w . e + b of a picture's unit embedding e; differentiable to the pixels. The prompt does not matter."""

    def __init__(
        self,
        model: nn.Module,
        weight: Float[Tensor, " d"],
        bias: Float[Tensor, ""],
        width: int,
        prepare: Callable[[Tensor], Tensor],
        device: str | None,
        batch_size: int,
        dtype: Dtype,
        offload: bool,
    ) -> None:
        super().__init__(model, device, batch_size, dtype, offload)
        if len(weight) != width:
            raise ValueError(
                f"the head of {type(self).__name__} takes {len(weight)} numbers, the model's embeddings have {width}"
            )
        self.weight, self.bias, self.prepare = weight, bias, prepare

    def score(self, media: Media, prompts: Prompts) -> Scores:
        images = self.embed_media(media)
        with torch.autocast(images.device.type, enabled=False):
            total = (images * self.weight.to(images.device)).sum(1) + self.bias.to(images.device)
        return simple_scores(self.name, total.to(media.pixels.device))


class Aesthetic(LinearHead):
    """LAION's aesthetic predictor v2 ("sac+logos+ava1-l14-linearMSE"), about 4 to 7.5; differentiable to the pixels.

    github.com/christophschuhmann/improved-aesthetic-predictor; DDPO's (arXiv:2305.13301) aesthetic reward. For their
    ReLU heads it is not. Bicubic to the shortest side, the middle, CLIP's constants, then CLIP's projected embedding.

    Args:
        model: a folder or hub id of the CLIPModel that the head belongs to, ViT-L/14 of OpenAI (MIT licence).
        head: the head's file, "sac+logos+ava1-l14-linearMSE.pth" of the repository above, or a folder or hub id that
            has it as "aesthetic-model.pth", as TRL's has. It is under Apache-2.0.
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures that pass through the model at once.
        dtype: of the model; the rest is float32. See `rewards.towers.frozen`.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError where model or head are not there, or are something else.
    """

    name = "aesthetic"
    card = Card("trl-lib/ddpo-aesthetic-predictor aesthetic-model.pth", "Apache-2.0", (4.0, 7.5))

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        device: str | None = None,
        batch_size: int = 32,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        weight, bias = read_head(weights_file(head, "aesthetic-model.pth"), "layers", (0, 2, 4, 6, 7))
        network = load_clip_model(model, "Aesthetic")
        network.text_model = nn.Identity()  # 123 million weights that nobody asks
        config = preprocessor_config(local_name(model))
        prepare = preprocessing(model, config, int(network.config.vision_config.image_size))
        width = network.config.projection_dim
        super().__init__(network, weight, bias, width, prepare, device, batch_size, dtype, offload)

    def picture_features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.model.get_image_features(pixel_values=self.prepare(pixels)).pooler_output


class AestheticV25(LinearHead):
    """Aesthetic predictor v2.5, 1 to 10, above 5.5 for good pictures; differentiable to the pixels.

    github.com/discus0434/aesthetic-predictor-v2-5. Its head is under AGPL-3.0: it does not come with this package, and
    what is made with it may be bound by that licence. Pictures are squashed to a square, then SigLIP's pooled output.

    Args:
        head: the file models/aesthetic_predictor_v2_5.pth of the repository above, or a folder that has it.
        model: a folder or hub id of the SiglipModel that the head belongs to (Apache-2.0).
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures that pass through the model at once.
        dtype: of the model; the rest is float32. See `rewards.towers.frozen`.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError where model or head are not there, or are something else.
    """

    name = "aesthetic_v2_5"
    card = Card("github.com/discus0434/aesthetic-predictor-v2-5", "AGPL-3.0 (head)", (1.0, 10.0))

    def __init__(
        self,
        head: str,
        model: str = "google/siglip-so400m-patch14-384",
        device: str | None = None,
        batch_size: int = 16,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        from transformers import SiglipVisionModel

        weight, bias = read_head(weights_file(head, "aesthetic_predictor_v2_5.pth"), "scoring_head", (0, 2, 4, 6, 8))
        network = load_pretrained(SiglipVisionModel, "siglip", model, "AestheticV25")
        config = preprocessor_config(local_name(model))
        prepare = square_preprocessing(model, config, int(network.config.image_size))
        width = network.config.hidden_size
        super().__init__(network, weight, bias, width, prepare, device, batch_size, dtype, offload)

    def picture_features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.model(pixel_values=self.prepare(pixels)).pooler_output


def read_head(path: Path, prefix: str, layers: Sequence[int]) -> tuple[Float[Tensor, " d"], Float[Tensor, ""]]:
    """w and b of the linear layers `prefix`.`layers` of a file, one after the other.

    Raises: ValueError where the file has other layers (with ReLUs they are numbered in another way), or one of them
    does not fit onto the next.
    """
    state = {name: value.double() for name, value in read_weights(path).items()}
    check_names(path, state, [f"{prefix}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")])
    weight, bias = state[f"{prefix}.{layers[0]}.weight"], state[f"{prefix}.{layers[0]}.bias"]
    for layer in layers[1:]:
        after = state[f"{prefix}.{layer}.weight"]
        if after.shape[1] != len(weight):
            raise ValueError(
                f"{path}: layer {layer} takes {after.shape[1]} numbers, and the one before makes {len(weight)}"
            )
        weight, bias = after @ weight, after @ bias + state[f"{prefix}.{layer}.bias"]
    if len(weight) != 1:
        raise ValueError(f"{path} makes {len(weight)} scores, not one")
    return weight[0].float(), bias[0].float()

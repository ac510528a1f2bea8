"""ImageReward: BLIP with a head, trained on how people ranked pictures (arXiv:2304.05977, Xu et al.).

The prompt is read by BERT with cross-attention to the picture's patches, and the first token's state becomes a number.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, Reward, simple_scores
from rewards.pixels import CLIP_MEAN, CLIP_STD, normalise, pictures, resize_shortest, rounded_center_crop
from rewards.towers import Dtype, Network, check_names, frozen, read_weights, weights_file

if TYPE_CHECKING:
    from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig

_log = logging.getLogger("flowalign")

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of raw scores, in the authors' ImageReward.py
TOKENS = 35  # of a prompt, with [CLS] and [SEP]: as in training
VISION_EPS = 1e-6  # of the vision tower's layer norms; transformers' 1e-5 shifts scores by 4e-5
VISION_HEAD = 64  # channels of an attention head, in every ViT that BLIP is made with
HEAD_WIDTHS = (1024, 128, 64, 16, 1)
HEAD_NUMBERS = (0, 2, 4, 6, 7)  # of the head's layers in the checkpoint, which counts dropouts

TORCH_FILE, MED_CONFIG = "ImageReward.pt", "med_config.json"
SAFE_FILES = ("ImageReward.safetensors", "model.safetensors")  # of the same names, in a folder
VISION = "blip.visual_encoder."
RENAMED = {
    VISION + "cls_token": "vision_model.embeddings.class_embedding",
    VISION + "pos_embed": "vision_model.embeddings.position_embedding",
    VISION + "patch_embed.proj.": "vision_model.embeddings.patch_embedding.",
    VISION + "blocks.": "vision_model.encoder.layers.",
    VISION + "norm.": "vision_model.post_layernorm.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    "blip.text_encoder.": "text_encoder.",
    "mlp.layers.": "head.",
}
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class ImageReward(Reward):
    """(head(state of [CLS]) - 0.167) / 1.033 in float32, about -2 to 2; differentiable to the pixels.

    Pictures are resized to 224 on the shortest side as PIL does it, cropped in the middle as torchvision does it and
    normalised with CLIP's constants. The prompt is read with the picture in sight, so that no text can be kept for the
    next picture. Prompts beyond 35 tokens are cut: they are kept in `cut`, and the first are said in the log.

    The published weights were not run here: tested are the model's arithmetic, preprocessing and tokens against
    numbers of the authors' package at a tiny size, and the names and shapes of all weights at full size.

    Args:
        model: a folder with ImageReward.pt (or ImageReward.safetensors, model.safetensors, of the same names) and
            med_config.json, the file itself beside that config, or a hub id. The authors' code and weights are under
            the Apache-2.0 licence.
        tokenizer: a folder or hub id of BERT's uncased tokenizer.
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures that pass through the model at once.
        dtype: of the model; the head and the rest are float32. See `rewards.towers.frozen`.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError where weights, config or tokenizer are not there, or are not ImageReward's.
    """

    name = "image_reward"
    differentiable = True
    card = Card(weights="THUDM/ImageReward: ImageReward.pt", licence="Apache-2.0", usual=(-2.0, 2.0), modality="image")

    def __init__(
        self,
        model: str = "THUDM/ImageReward",
        tokenizer: str = "bert-base-uncased",
        device: str | None = None,
        batch_size: int = 32,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.tower = load_tower(model)
        frozen(self.tower)
        for part in (self.tower.vision_model, self.tower.text_encoder):
            frozen(part, dtype)
        self.network = Network(self.tower, offload)
        self.tokenizer = _load_tokenizer(tokenizer, int(self.tower.text_encoder.config.vocab_size))
        self.device, self.batch_size = device, batch_size
        self.cut: set[str] = set()

    def score(self, media: Media, prompts: Prompts) -> Scores:
        pixels = pictures(media, "ImageReward")
        device = torch.device(self.device or pixels.device)
        ids, mask = (tokens.to(device) for tokens in self.tokens(prompts.text))
        parts = [part.split(self.batch_size) for part in (pixels.to(device), ids, mask)]

        def rate() -> Float[Tensor, " b"]:
            return torch.cat([self.tower(self.prepare(few), *text) for few, *text in zip(*parts, strict=True)])

        return simple_scores(self.name, self.network.run(device, rate).to(pixels.device))

    def prepare(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 k k"]:
        """The network's input for pictures in [0, 1]."""
        size = int(self.tower.vision_model.config.image_size)
        return normalise(rounded_center_crop(resize_shortest(pixels, size), size), CLIP_MEAN, CLIP_STD)

    def tokens(self, texts: Sequence[str]) -> tuple[Int[Tensor, "b 35"], Int[Tensor, "b 35"]]:
        """Ids and attention mask; adds to `cut` what is too long."""
        lengths = {text: len(self.tokenizer(text, verbose=False).input_ids) for text in dict.fromkeys(texts)}
        new = {text for text, length in lengths.items() if length > TOKENS} - self.cut
        if new and not self.cut:
            _log.warning(
                "ImageReward reads %d tokens: it does not see the end of %d of %d prompts (said once)",
                TOKENS, len(new), len(lengths),
            )  # fmt: skip
        self.cut |= new
        read = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        return read.input_ids, read.attention_mask


class Tower(nn.Module):
    """transformers' BLIP for image-text retrieval, with ImageReward's head in place of its own.

    The head is affine: its five layers have no activations between them.
    """

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        self.vision_model: Any = BlipVisionModel(vision)
        self.text_encoder: Any = BlipTextModel(text, add_pooling_layer=False)
        widths = (text.hidden_size, *HEAD_WIDTHS)
        layers = [nn.Linear(a, b) for a, b in zip(widths, HEAD_WIDTHS, strict=False)]
        self.head = nn.Sequential(OrderedDict(zip(map(str, HEAD_NUMBERS), layers, strict=True)))

    def forward(
        self, pixels: Float[Tensor, "b 3 k k"], ids: Int[Tensor, "b n"], mask: Int[Tensor, "b n"]
    ) -> Float[Tensor, " b"]:
        """Scores of prepared pictures for tokens."""
        patches = self.vision_model(pixel_values=pixels).last_hidden_state
        seen = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
        read = self.text_encoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=patches, encoder_attention_mask=seen
        )
        state = read.last_hidden_state[:, 0].to(next(self.head.parameters()).dtype)
        return (self.head(state).squeeze(1) - MEAN) / STD


def load_tower(name: str) -> Tower:
    """The tower with a folder's or hub id's weights.

    Raises: ValueError where they are not there, or not ImageReward's.
    """
    weights, med = _read(name)
    tower = Tower(*configs(weights, med, name))
    state = renamed(weights)
    check_weights(state, tower, name)
    tower.load_state_dict(state)
    return tower


def check_weights(state: dict[str, Tensor], tower: Tower, source: str) -> None:
    """Raises: ValueError that names what is missing, does not belong, or has another shape."""
    wanted = tower.state_dict()
    check_names(source, state, wanted)
    wrong = sorted(key for key in wanted if state[key].shape != wanted[key].shape)
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights of {source} have another shape than the model's: {', '.join(wrong[:3])}"
        )


def configs(weights: dict[str, Tensor], med: dict[str, Any], name: str) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """The vision tower's sizes, which are those of its weights, and the text encoder's, from med_config.json.

    Raises: ValueError where either lacks one.
    """
    from transformers import BlipTextConfig, BlipVisionConfig

    sized = ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    asked = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    lacking = [VISION + key for key in sized if VISION + key not in weights] + [key for key in asked if key not in med]
    if lacking:
        raise ValueError(f"{name} does not hold an ImageReward: its weights or {MED_CONFIG} lack {', '.join(lacking)}")
    positions, patches, wide = (weights[VISION + key].shape for key in sized)
    vision = BlipVisionConfig(
        hidden_size=positions[2],
        intermediate_size=wide[0],
        num_hidden_layers=len({key.split(".")[3] for key in weights if key.startswith(VISION + "blocks.")}),
        num_attention_heads=positions[2] // VISION_HEAD,
        image_size=round((positions[1] - 1) ** 0.5) * patches[3],
        patch_size=patches[3],
        layer_norm_eps=VISION_EPS,
    )
    optional = ("max_position_embeddings", "layer_norm_eps", "hidden_act", "pad_token_id")
    read = {key: med[key] for key in (*asked, *optional) if key in med}
    return vision, BlipTextConfig(encoder_hidden_size=positions[2], **read)


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors under the tower's names, without the projections that ImageReward does not use."""
    made = {}
    for key, value in weights.items():
        if key.startswith(UNUSED):
            continue
        for theirs, ours in RENAMED.items():
            key = key.replace(theirs, ours)
        made[key] = value
    return made


def _read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The checkpoint as it is, and med_config.json beside it."""
    path = Path(name).expanduser()
    safe = [path / file for file in SAFE_FILES if (path / file).is_file()]
    weights = read_weights(safe[0] if safe else weights_file(name, TORCH_FILE))
    config = weights_file(str(path.parent) if path.is_file() else name, MED_CONFIG)
    try:
        return weights, dict(json.loads(config.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config} is no JSON object: {error}") from error


def _load_tokenizer(name: str, vocabulary: int) -> BertTokenizer:
    from transformers import BertTokenizer

    try:
        tokenizer = BertTokenizer.from_pretrained(str(Path(name).expanduser()))
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of no files at all
            raise FileNotFoundError("no vocabulary found")
    except OSError as error:
        raise ValueError(
            f"ImageReward's tokenizer {name!r} can be had neither from the hub nor as a folder of bert-base-uncased's "
            f"tokenizer (pass tokenizer=FOLDER): {str(error).strip().splitlines()[0]}"
        ) from error
    if len(tokenizer) > vocabulary:
        raise ValueError(f"{name} has a tokenizer of {len(tokenizer)} tokens, the model was made for {vocabulary}")
    return tokenizer

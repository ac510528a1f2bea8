"""MPS: a CLIP whose picture is read by the words of the prompt that a condition picks (CVPR 2024, Zhang et al.).

The multi-dimensional preference score of "Learning Multi-dimensional Human Preference for Text-to-Image Generation".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, Reward, simple_scores
from rewards.clip import load_tokenizer, local_name, preprocessing, preprocessor_config, unavailable
from rewards.mps_tower import Texts, load_tower, read_module
from rewards.pixels import pictures
from rewards.towers import Dtype, Network, frozen, weights_file

if TYPE_CHECKING:
    from transformers import CLIPConfig

FILE = "model.safetensors"
OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
THRESHOLD = 0.3  # of the authors' two evaluation scripts, which made their tables


class MPS(Reward):
    """exp(logit_scale) * cos(prompt's end token, fused picture token) in float32, about 5 to 15; differentiable.

        keep_j = [max_i <t_j, c_i> / max_j,i <t_j, c_i> > threshold],   t, c tokens of the prompt and of the condition
        fused  = class token of the picture after 4 layers of attention to kept t_j and to the picture's own tokens

    The authors take the second maximum over a whole batch, so that a score depends on what else is scored; here it is
    over the prompt itself, which is theirs with one prompt in the batch, as in their evaluation. Every prompt is padded
    to the tokenizer's full length, and padding is among the tokens that may be kept, as there.

    Their network runs in float16; this one in `dtype`, but for the angles of the rotary embedding, which have the
    precision of the weights' file as theirs do. The published weights were not run here: tested are the arithmetic
    against the authors' code at a tiny size, and the names and shapes of all weights at full size. The usual range is
    from the mean of about 9 that github.com/RE-N-Y/imscore reports.

    Args:
        model: the weights: a .safetensors file, the authors' MPS_overall_checkpoint.pth, or a folder or hub id with
            model.safetensors. Of the authors' file, a pickled module, only tensors are read, and no code of it is run.
            Their repository is under the MIT licence and names no other for the weights.
        processor: a folder or hub id of the CLIP that the weights were tuned from: config.json, tokenizer, and
            preprocessor_config.json.
        condition: what is looked at. The published weights are for the overall preference; those for the paper's three
            other conditions are not published.
        threshold: in [0, 1), see above. The authors evaluate with 0.3; their README's example has 0.01.
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures that pass through the model at once.
        dtype: of the model; the rest is float32. See `rewards.towers.frozen`.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError where weights, config or tokenizer are not there, or are not MPS's.
    """

    name = "mps"
    differentiable = True
    card = Card(f"RE-N-Y/mpsv1: {FILE}", "MIT (of the repository)", (5.0, 15.0))

    def __init__(
        self,
        model: str = "RE-N-Y/mpsv1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        condition: str = OVERALL,
        threshold: float = THRESHOLD,
        device: str | None = None,
        batch_size: int = 32,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be at least 0 and below 1, got {threshold}")
        folder, path = local_name(processor), weights_file(model, FILE)
        self.tokenizer = load_tokenizer(folder, processor)
        config = clip_config(folder, processor)
        self.prepare = preprocessing(processor, preprocessor_config(folder), int(config.vision_config.image_size))
        self.tower = load_tower(read_module(path), config, str(path))
        frozen(self.tower, dtype)
        self.network = Network(self.tower, offload)
        self.condition, self.threshold, self.device, self.batch_size = condition, threshold, device, batch_size

    def score(self, media: Media, prompts: Prompts) -> Scores:
        pixels = pictures(media, "MPS")
        device = torch.device(self.device or pixels.device)

        def rate() -> Float[Tensor, " b"]:
            parts = zip(pixels.to(device).split(self.batch_size), _split(prompts.text, self.batch_size), strict=True)
            return torch.cat([self.tower(self.prepare(few), self.read(texts, device)) for few, texts in parts])

        return simple_scores(self.name, self.network.run(device, rate).to(pixels.device))

    @torch.no_grad()
    def read(self, texts: Sequence[str], device: torch.device) -> Texts:
        """Tokens of texts, each distinct one and the condition read once; `device` is the model's."""
        distinct = [*dict.fromkeys(texts)]
        places = int(self.tower.clip.config.text_config.max_position_embeddings)
        length = min(int(self.tokenizer.model_max_length), places)
        ids = self.tokenizer(
            [self.condition, *distinct], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        states, ends = self.tower.text_states(ids.to(device))
        rows = torch.tensor([distinct.index(text) + 1 for text in texts], device=device)
        return Texts(states[rows], ends[rows].float(), kept(states[rows].float(), states[0].float(), self.threshold))


def kept(states: Float[Tensor, "b n d"], condition: Float[Tensor, "m d"], threshold: float) -> Bool[Tensor, "b n"]:
    """Which tokens are near enough to the condition's, by dot products relative to the text's largest."""
    near = (states @ condition.T).amax(2)
    return near / near.amax(1, keepdim=True) > threshold


def _split(texts: Sequence[str], size: int) -> list[Sequence[str]]:
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def clip_config(folder: str, name: str) -> CLIPConfig:
    """The sizes of a CLIP in a folder or on the hub; `name` is what the user calls it.

    Raises: ValueError where there is none.
    """
    from transformers import CLIPConfig

    try:
        found = CLIPConfig.get_config_dict(folder)[0]
    except OSError as error:
        raise ValueError(unavailable("CLIP", name, error)) from error
    if found.get("model_type") != "clip":
        raise ValueError(f"{name} has a config.json of type {found.get('model_type')!r}, MPS needs that of a CLIP")
    return CLIPConfig.from_dict(found)

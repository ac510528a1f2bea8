"""PickScore: a CLIP tuned on which of two pictures people picked for a prompt (arXiv:2305.01569, Kirstain et al.)."""

from __future__ import annotations

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, simple_scores
from rewards.clip import CLIPScore
from rewards.towers import Dtype


class PickScore(CLIPScore):
    """exp(logit_scale) * cos(picture, prompt), in float32, about 17 to 24; differentiable to the pixels.

    A difference of one is odds of e to one that people pick that picture. Flow-GRPO divides by 26, in a config:
    `reward: pickscore / 26`.

    The published weights were not run here: what is tested is the arithmetic, on a CLIPModel with random weights.

    Args:
        model: a folder or hub id of a transformers CLIPModel. The published one is a tuned ViT-H/14; its authors' code
            is under the MIT licence, and its model card names no licence of the weights.
        processor: a folder or hub id of the tokenizer and the preprocessing, by default those that the authors use.
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures, or prompts, that pass through the model at once.
        dtype: of the model; the rest is float32. See `rewards.towers.frozen`.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError as `CLIPScore` does.
    """

    name = "pickscore"
    card = Card("yuvalkirstain/PickScore_v1", "none named (code: MIT)", (17.0, 24.0))

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str | None = None,
        batch_size: int = 32,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        super().__init__(model, "", device, batch_size, processor, dtype, offload)

    def score(self, media: Media, prompts: Prompts) -> Scores:
        cosine = super().score(media, prompts).total
        return simple_scores(self.name, cosine * self.model.logit_scale.exp().to(cosine.device))

"""How far a picture is on the way from one text to another (VLM-RM, arXiv:2310.12921, Rocamonde et al.)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.records import Media, Prompts, Scores
from rewards.base import simple_scores
from rewards.clip import CLIPScore
from rewards.towers import Dtype


class GoalBaselineCLIP(CLIPScore):
    """1 - |alpha proj(s) + (1 - alpha) s - g|^2 / 2 with the picture's, goal's and baseline's unit embeddings s, g, b.

    proj is the projection onto the line through b and g: what the picture shows beyond their difference counts less,
    and with alpha = 1 not at all. With alpha = 0 it is the cosine of s and g. At most 1; differentiable to the pixels.
    The goal is the prompt, the baseline what can be seen anyway, such as "a photo"; a prompt whose metadata have a
    "baseline" is given that one. A prompt with the embedding of its baseline makes no line, and its score is not valid.

    Args:
        baseline: what is there before the goal is reached.
        alpha: how much is projected, in [0, 1].
        model: as in `CLIPScore`; the authors see rewards get better with larger models.
        prefix: put before every prompt and baseline.
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures, or texts, that pass through the model at once.
        processor: as in `CLIPScore`.
        dtype: of the model; the rest is float32. See `rewards.towers.frozen`.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError as `CLIPScore` does, for alpha outside [0, 1], and for a "baseline" that is no text.
    """

    name = "goal_baseline_clip"

    def __init__(
        self,
        baseline: str = "a photo",
        alpha: float = 0.5,
        model: str = "openai/clip-vit-large-patch14",
        prefix: str = "",
        device: str | None = None,
        batch_size: int = 32,
        processor: str | None = None,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        super().__init__(model, prefix, device, batch_size, processor, dtype, offload)
        self.baseline, self.alpha = baseline, float(alpha)

    def score(self, media: Media, prompts: Prompts) -> Scores:
        baselines = [metadata.get("baseline", self.baseline) for metadata in prompts.metadata]
        wrong = [baseline for baseline in baselines if not isinstance(baseline, str)]
        if wrong:
            raise ValueError(f"a prompt's 'baseline' must be a text, got {wrong[0]!r}")
        device = self.place(media)

        def rate() -> Float[Tensor, " b"]:
            goals, starts = (
                self.embed_texts([self.prefix + text for text in texts], device) for texts in (prompts.text, baselines)
            )
            return goal_baseline(self.embed_media(media), goals, starts, self.alpha)

        return simple_scores(self.name, self.network.run(device, rate).to(media.pixels.device))


def goal_baseline(
    state: Float[Tensor, "b d"], goal: Float[Tensor, "b d"], baseline: Float[Tensor, "b d"], alpha: float
) -> Float[Tensor, " b"]:
    """1 - |alpha proj(state) + (1 - alpha) state - goal|^2 / 2 (definition 1 of the paper); nan where goal is baseline.

    The goal is on the line, so with the line's unit vector l and x = state - goal it is
    1 - |alpha (x . l) l + (1 - alpha) x|^2 / 2. Two embeddings less than 1e-3 apart are taken for the same.
    """
    line, away = goal - baseline, state - goal
    length = line.norm(dim=1, keepdim=True)
    unit = torch.where(length > 1e-3, line / length, torch.nan)
    left = alpha * (away * unit).sum(1, keepdim=True) * unit + (1 - alpha) * away
    return 1 - left.square().sum(1) / 2

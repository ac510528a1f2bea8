"""InstructVideo: reward tuning as editing, along a part of the chain from real media (arXiv:2312.12490, Yuan et al.).

    x_t0 = (1 - t0) x_0 + t0 e,   x_0 a real video of the prompt;   steps from t0 = .6 down, gradient in the last one
    L    = -r(x_0', c)  [+ beta KL],   r: segmental frames, weights falling away from the middle (`rewards.OnFrames`)

The real video gives the structure, so that only the end of the chain is sampled: 12 of the authors' 20 steps. Their
code's noise has a part that all frames share (.1); ours is plain. What OnFrames weighs has sum 1, where their weights
exp(-lambda |i - N/2|) have a scale of the frames drawn; a `WeightedSum` gives the reward any scale. Loss and KL, which
the paper does without, are DRaFT's: real structure alone does not keep a policy from exploiting a weak reward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from diffusers import DiffusionPipeline

from flowalign.differentiate import Drawn, differentiable_rollout
from flowalign.gradient_plans import LastSteps
from flowalign.media import real_media
from flowalign.models.base import Model
from flowalign.models.editing import EditingModel
from flowalign.prompts import PromptData
from flowalign.records import Size
from flowalign.tracking import TrackerName
from flowalign.transitions import velocity_mse_kl
from rewards.base import Reward
from trainers.batch import Sampling
from trainers.collection import Draw, Epoch
from trainers.draft import DRaFT
from trainers.evaluation import Evaluation
from trainers.flow_grpo import KL
from trainers.keeper import Checkpoints
from trainers.optim import Optimizer


class InstructVideo(DRaFT):
    """InstructVideo with a LoRA policy, for videos or pictures.

    Args:
        prompts: each names a real video or picture of it, with the key "media" in its record.
        sampling: `steps` counts all steps of the grid, of which those from `start` on are made; its plan says which of
            these have gradient.
        start: t0; the chain starts at the first point of the grid that is not above it.
        Others: as of `trainers.DRaFT`.
    """

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        sampling: Sampling = Sampling(LastSteps(1), group_size=1, batch_size=1, steps=20),
        optimizer: Optimizer = Optimizer(1e-5),
        evaluation: Evaluation = Evaluation(),
        checkpoints: Checkpoints = Checkpoints(),
        epochs: int = 100,
        updates_per_epoch: int = 1,
        start: float = 0.6,
        kl_coef: float = 0.0,
        kl: KL = velocity_mse_kl,
        unconditional_grad: bool = True,
        recompute: bool = True,
        folder: str = "runs/instruct_video",
        seed: int = 0,
        on_invalid: Literal["stop", "drop"] = "stop",
        log_with: tuple[TrackerName, ...] = (),
    ) -> None:
        if not 0 < start <= 1:
            raise ValueError(f"start must lie in (0, 1], got {start}")
        self.start = start
        super().__init__(
            model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch, kl_coef,
            kl, 0, unconditional_grad, recompute, folder, seed, on_invalid, log_with,
        )  # fmt: skip

    def first_step(self) -> int:
        return first_below(self.sigmas, self.start)

    def needs_media(self) -> bool:
        return True

    def rollout(self, epoch: Epoch, draw: Draw, sigmas: list[float]) -> Drawn:
        first, path = first_below(sigmas, self.start), epoch.path
        clean = self.model.encode_media(real_media(draw.told, self._size()))
        noised = (1 - sigmas[first]) * clean + sigmas[first] * draw.start
        return differentiable_rollout(
            self.model, draw.condition, noised, sigmas, path, self.policy, draw.step_noise, self.recompute, first
        )

    def _size(self) -> Size:
        """Of the media that the model makes at present."""
        return self.model.media_size(Size())

    def _check(self) -> None:
        super()._check()
        if isinstance(self.model, EditingModel) and self.model.strength is not None:
            raise ValueError(
                f"{type(self).__name__} starts from real media by itself, from sigma `start` on: leave "
                f"model.strength {self.model.strength:g} out"
            )
        first, path = self.first_step(), self.collection.epoch(0).path
        if path.cut is not None or path.gradient_from < first:
            raise ValueError(
                f"{type(self).__name__} makes the steps from {first} on, and the plan has gradient from step "
                f"{path.gradient_from}{'' if path.cut is None else ' in one jump'}: choose LastSteps with fewer steps"
            )


def first_below(sigmas: list[float], start: float) -> int:
    """The first step of a grid that starts at `start` or below it, and before the grid's end."""
    return next((i for i, sigma in enumerate(sigmas[:-1]) if sigma <= start + 1e-6), len(sigmas) - 2)

"""IPRO: videos that keep a face, by the gradient of face similarity through the last steps (arXiv:2510.14255).

    L = lambda_R (-R) + lambda_KL sum_t w_t ||v(x_t, t) - v_ref(x_t, t)||^2,   t over the last K = 4 steps
    R = the mean similarity of the generated faces to a pool of pictures of the person   (`rewards.FaceIdentity`)

DRaFT-K with a KL of velocities. lambda_R .1, lambda_KL 1, K and the learning rate are the paper's; there is no code of
its authors', and what its weights w_t are was not found: `velocity_mse_kl` takes 1, `weighted_velocity_kl` |dt|.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from flowalign.gradient_plans import LastSteps
from flowalign.models.base import Model
from flowalign.prompts import PromptData
from flowalign.records import Interval
from flowalign.tracking import TrackerName
from flowalign.transitions import Reduce, velocity_mse_kl
from rewards.base import Reward
from trainers.batch import Sampling
from trainers.draft import DRaFT, path_kl
from trainers.evaluation import Evaluation
from trainers.flow_grpo import KL
from trainers.keeper import Checkpoints
from trainers.optim import Optimizer
from trainers.path_steps import Scored


def weighted_velocity_kl(
    mean: Tensor,
    ref_mean: Tensor,
    velocity: Tensor,
    ref_velocity: Tensor,
    std: float,
    interval: Interval,
    reduce: Reduce,
) -> Float[Tensor, " b"]:
    """|dt| (v - v_ref)^2: a sum over steps is an integral over time, so that it does not depend on their number."""
    return -interval.dt * velocity_mse_kl(mean, ref_mean, velocity, ref_velocity, std, interval, reduce)


class IPRO(DRaFT):
    """IPRO with a LoRA policy.

    Args:
        reward_coef: lambda_R. kl_coef: lambda_KL. kl: which KL that is, with its weight of a step.
        Others: as of `trainers.DRaFT`.
    """

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        sampling: Sampling = Sampling(LastSteps(4), group_size=1, batch_size=1),
        optimizer: Optimizer = Optimizer(2e-5),
        evaluation: Evaluation = Evaluation(),
        checkpoints: Checkpoints = Checkpoints(),
        epochs: int = 100,
        updates_per_epoch: int = 1,
        reward_coef: float = 0.1,
        kl_coef: float = 1.0,
        kl: KL = velocity_mse_kl,
        unconditional_grad: bool = True,
        recompute: bool = True,
        folder: str = "runs/ipro",
        seed: int = 0,
        on_invalid: Literal["stop", "drop"] = "stop",
        log_with: tuple[TrackerName, ...] = (),
    ) -> None:
        if not reward_coef > 0:
            raise ValueError(f"reward_coef must be positive, got {reward_coef}")
        self.reward_coef = reward_coef
        super().__init__(
            model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch, kl_coef,
            kl, 0, unconditional_grad, recompute, folder, seed, on_invalid, log_with,
        )  # fmt: skip

    def loss(self, scored: Scored) -> Float[Tensor, " b"]:
        """lambda_R (-R) + lambda_KL sum_t w_t ||v - v_ref||^2."""
        loss = -self.reward_coef * scored.rewards
        return loss + self.kl_coef * path_kl(self.kl, scored, self.policy) if scored.references else loss

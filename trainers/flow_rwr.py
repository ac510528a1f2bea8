"""Flow-RWR: reward-weighted regression of flow models, on samples of their own (arXiv:2501.13918, Liu et al.).

    L = E_{x_0 ~ p}[ exp(r(x_0, c) / tau) ||v* - v(x_t, t)||^2 ],   x_t = (1 - t) x_0 + t e,   v* = e - x_0

Its optimum is p exp(r / tau) / Z, which maximises E[r] - tau KL(. || p): for N(0, s^2) and r = lambda x it is
N(lambda s^2 / tau, s^2). It takes one round of samples of p, the policy that the run starts from (`refresh` 0). Drawn
by the policy as it is (1), each round tilts the law of the one before, and the KL to the start has no bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.models.base import Model
from flowalign.prompts import PromptData
from flowalign.records import Scores
from flowalign.tracking import TrackerName
from rewards.base import Reward
from trainers.batch import OnInvalid, Sampling
from trainers.evaluation import Evaluation
from trainers.forward_steps import Units
from trainers.forward_times import LogitNormalTimes, Times
from trainers.keeper import Checkpoints
from trainers.optim import Optimizer
from trainers.regression import FEW, RegressionTrainer

PerSample = Float[Tensor, " b"]
GroupIds = Int[Tensor, " b"]
Weights = Callable[[Tensor, Tensor], Tensor]  # rewards over the temperature, and group ids, to weights


def exponential_over_group(rewards: PerSample, group_ids: GroupIds) -> PerSample:
    """exp(r) over its mean in the sample's group: every prompt counts alike, and so do a constant added to its rewards.

    Z of a prompt is estimated from its group alone. In small groups that pulls towards p: no weight exceeds the number
    of its group's samples.
    """
    return _over_mean(rewards, group_ids.unique(return_inverse=True)[1])


def exponential_over_epoch(rewards: PerSample, group_ids: GroupIds) -> PerSample:
    """exp(r) over its mean in the epoch: prompts with higher rewards count more; the optimum of each is the same."""
    return _over_mean(rewards, torch.zeros_like(group_ids))


def raw_rewards(rewards: PerSample, group_ids: GroupIds) -> PerSample:
    """r itself, flow_grpo's "rwr" labels, which has another optimum: p r / E[r].

    That is no tilt. A constant added to the reward changes it, and from there on each round has less of an effect.
    Raises: ValueError for a reward below 0, which would push a sample away without bound.
    """
    if (rewards < 0).any():
        raise ValueError(
            f"raw_rewards takes rewards as weights, and the lowest is {rewards.min():.4g} (over the temperature): "
            "weights are at least 0. Add a constant to the reward, or take exponential_over_group"
        )
    return rewards


def _over_mean(rewards: Tensor, groups: Tensor) -> Tensor:
    """exp(rewards) over its mean in each group, in double precision, the largest of a group taken out before."""
    values, counts = rewards.double(), groups.bincount()
    largest = values.new_zeros(len(counts)).scatter_reduce(0, groups, values, "amax", include_self=False)
    powers = (values - largest[groups]).exp()
    means = values.new_zeros(len(counts)).index_add(0, groups, powers) / counts
    return (powers / means[groups]).to(rewards.dtype)


class FlowRWR(RegressionTrainer):
    """Flow-RWR with a LoRA policy.

    Args:
        model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, folder, seed, log_with: as of
            `trainers.FlowGRPO`; `batch_size` is of calls with gradient, whatever the plan.
        updates_per_epoch: optimizer steps made of an epoch's samples.
        temperature: tau. The lower it is, the fewer samples count; `ess` in the metrics says what share does.
        weights: `exponential_over_group`, `exponential_over_epoch`, or flow_grpo's `raw_rewards`.
        passes: how often an epoch's samples are taken in its optimizer steps, with new noise and sigma each time.
        refresh: epochs after which samples are drawn by the policy as it is then; 1 for the present one, 0 for the
            policy that the run starts from, for good.
        times: the law of t, and how many t and e a sample gets in an optimizer step.
        guidance_scale: of the velocity that is trained, 1 for none. Samples have `sampling`'s: where that is above 1,
            the policy learns to do without.
        on_invalid: what to do about samples whose score is not valid: stop, or give them, or their whole groups, weight
            0 and count them.
    """

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        sampling: Sampling = Sampling(),
        optimizer: Optimizer = Optimizer(),
        evaluation: Evaluation = Evaluation(),
        checkpoints: Checkpoints = Checkpoints(),
        epochs: int = 100,
        updates_per_epoch: int = 1,
        temperature: float = 1.0,
        weights: Weights = exponential_over_group,
        passes: int = 1,
        refresh: int = 1,
        times: Times = LogitNormalTimes(),
        guidance_scale: float = 1.0,
        folder: str = "runs/flow_rwr",
        seed: int = 0,
        on_invalid: OnInvalid = "stop",
        log_with: tuple[TrackerName, ...] = (),
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if sampling.group_size < 2 and weights is exponential_over_group:
            raise ValueError(
                "sampling.group_size must be at least 2: alone in its group every sample has weight 1, whatever its "
                "reward. Take more samples of a prompt, or weights: trainers.flow_rwr.exponential_over_epoch"
            )
        self.temperature, self.weights = temperature, weights
        super().__init__(
            model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch, passes,
            refresh, times, guidance_scale, folder, seed, on_invalid, log_with,
        )  # fmt: skip

    def credit(self, scores: Scores, group_ids: GroupIds) -> PerSample:
        """w of each sample."""
        return self.weights(scores.total / self.temperature, group_ids)

    def doubt(self, units: Units, scores: Scores) -> str | None:
        share, count = self.effective_share(units, scores), int(scores.valid.sum())
        if share >= FEW:
            return None
        return (
            f"the weights of {count} samples tell as much as {share * count:.3g} samples of equal weight would: a few "
            f"of them decide what is learned. Raise temperature (now {self.temperature:g}), or take trainers.RAFT, "
            "which means to learn from the best alone"
        )

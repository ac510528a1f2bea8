"""RAFT: reward-ranked fine-tuning on the best of several samples, in rounds (arXiv:2304.06767, Dong et al.).

    b = argmax_{k <= K} r(x^k, c),  x^k ~ policy of the round;   L = E_c ||v* - v(x_t^b, t)||^2,   v* = e - x_0

A round is an epoch, or `refresh` of them: its samples are drawn by the policy that it begins with, and the best of
each prompt are taken `passes` times. Once it has converged the policy's law is that of the best of K. The authors'
notebook for Stable Diffusion keeps of all prompts' best ones those with the highest rewards (`top_share`), which
prefers easy prompts. What few steps or guidance do to samples adds up over rounds: then make few, or one.
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
from trainers.regression import RegressionTrainer

PerSample = Float[Tensor, " b"]
GroupIds = Int[Tensor, " b"]
Choice = Callable[[Tensor, Tensor], Tensor]  # rewards and group ids to labels: 1 for what is trained on, else 0


def best_of_each(rewards: PerSample, group_ids: GroupIds) -> PerSample:
    """1 for the sample of each group with the highest reward, else 0; of equals the first alone."""
    labels = torch.zeros_like(rewards)
    for group in group_ids.unique():
        members = (group_ids == group).nonzero().flatten()
        labels[members[rewards[members].argmax()]] = 1
    return labels


def best_unless_equal(rewards: PerSample, group_ids: GroupIds) -> PerSample:
    """`best_of_each`, but nothing of a group of equals, whose best is no better than the others."""
    labels = best_of_each(rewards, group_ids)
    for group in group_ids.unique():
        members = group_ids == group
        if rewards[members].amax() == rewards[members].amin():
            labels[members] = 0
    return labels


def highest(rewards: PerSample, labels: PerSample, share: float) -> PerSample:
    """Of the samples with label 1 a share, at least one: those with the highest rewards, of equals the first.

    Args:
        share: in (0, 1]; rounded to whole samples.
    """
    chosen = labels.nonzero().flatten()
    kept = chosen[rewards[chosen].argsort(descending=True, stable=True)[: count_of(share, len(chosen))]]
    return torch.zeros_like(labels).index_fill(0, kept, 1.0)


def count_of(share: float, total: int) -> int:
    """How many a share is, at least one."""
    return max(1, round(share * total))


class RAFT(RegressionTrainer):
    """RAFT with a LoRA policy.

    Args:
        model, reward, prompts, sampling, optimizer, evaluation, checkpoints, folder, seed, log_with: as of
            `trainers.FlowGRPO`; K is `sampling.group_size`, and `batch_size` is of calls with gradient.
        epochs: how often samples are drawn.
        refresh: epochs of a round, whose samples are all drawn by the policy that it begins with; 0 for one round.
        updates_per_epoch: optimizer steps made of a round's chosen samples.
        passes: how often each of them is taken in these steps, with new noise and sigma each time.
        choice: which samples of a group are trained on: its best one (`best_of_each`), none of a group of equals
            (`best_unless_equal`), or all as good as its best (`flowalign.advantages.best_in_group`, flow_grpo's
            "sft" labels).
        top_share: of those chosen in a round, the share with the highest rewards that is kept.
        times, guidance_scale, on_invalid: as of `trainers.FlowRWR`.
    """

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        sampling: Sampling = Sampling(group_size=10),
        optimizer: Optimizer = Optimizer(),
        evaluation: Evaluation = Evaluation(),
        checkpoints: Checkpoints = Checkpoints(),
        epochs: int = 10,
        updates_per_epoch: int = 8,
        passes: int = 8,
        choice: Choice = best_of_each,
        top_share: float = 1.0,
        refresh: int = 1,
        times: Times = LogitNormalTimes(),
        guidance_scale: float = 1.0,
        folder: str = "runs/raft",
        seed: int = 0,
        on_invalid: OnInvalid = "stop",
        log_with: tuple[TrackerName, ...] = (),
    ) -> None:
        if not 0 < top_share <= 1:
            raise ValueError(f"top_share must lie in (0, 1], got {top_share}")
        if sampling.group_size < 2 and top_share == 1:
            raise ValueError(
                "sampling.group_size must be at least 2: of one sample there is no best. Take more samples of a "
                "prompt, or keep the highest rewards of a round with a top_share below 1"
            )
        self.choice, self.top_share = choice, top_share
        super().__init__(
            model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch, passes,
            refresh, times, guidance_scale, folder, seed, on_invalid, log_with,
        )  # fmt: skip

    def credit(self, scores: Scores, group_ids: GroupIds) -> PerSample:
        """1 for what is trained on, else 0."""
        labels = self.choice(scores.total, group_ids)
        return highest(scores.total, labels, self.top_share) if labels.any() else labels

    def units_per_epoch(self) -> int:
        return self.passes * count_of(self.top_share, self.sampling.groups)

    def told(self, units: Units, scores: Scores) -> dict[str, float]:
        return {"chosen": len(units) / self.passes} | super().told(units, scores)

    def headline(self) -> tuple[str, ...]:
        return ("reward", "reward_aimed_at")

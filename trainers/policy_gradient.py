"""Trainers by policy gradient: collect an epoch's rollouts, score them, give credit, update the policy by replay.

A method overrides `loss` and `credit`, and perhaps what is watched.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.records import Interval, Scores
from flowalign.rollout import Replay
from flowalign.schedules import GradientPlan, Path
from trainers.base import Trainer, Worked
from trainers.batch import Batch, Sampling, summary, valid_rows
from trainers.collection import Epoch, gather_scores, join_steps_of
from trainers.keeper import Keeper
from trainers.state import Collected
from trainers.update import Update
from trainers.watch import histogram

if TYPE_CHECKING:
    from trainers.preflight.family import Family


class PolicyTrainer(Trainer):
    """A trainer whose loss reads the density of stored steps; see the subclasses."""

    @abstractmethod
    def loss(
        self,
        new: Replay,
        old_log_probs: Float[Tensor, " b"],
        advantages: Float[Tensor, " b"],
        reference: Replay | None,
        interval: Interval,
    ) -> Float[Tensor, " b"]:
        """The objective of each sample at one step, not yet averaged."""

    @abstractmethod
    def credit(self, scores: Scores, group_ids: Int[Tensor, " b"]) -> Float[Tensor, b * t]:
        """Advantages of an epoch's valid samples."""

    def trained_steps(self, path: Path) -> tuple[int, ...]:
        """The steps whose log-probs the loss reads, by default all stochastic ones."""
        return path.stochastic

    def watch(
        self, new: Replay, old_log_probs: Tensor, reference: Replay | None, interval: Interval
    ) -> dict[str, Float[Tensor, " b"]]:
        """What is `watched`, of each sample; `log_ratio` also gives a largest ratio and a histogram."""
        return {}

    def ratio_limit(self) -> float:
        """The largest log-ratio that its histogram shows."""
        return 1.0

    def preflight(self) -> Family:
        from trainers.preflight.policy import PolicyFamily

        return PolicyFamily(self)

    def needed(self, epoch: Epoch) -> Rows:
        made = self.collection.needed(epoch, self.trained_steps(epoch.path), self.needs_reference())
        return made + self.collection.scoring_rows(epoch)

    def check_sampling(self, sampling: Sampling) -> None:
        if sampling.group_size < 2:
            raise ValueError("sampling.group_size must be at least 2: an advantage compares the samples of a group")
        if isinstance(sampling.plan, GradientPlan):
            raise ValueError(
                f"sampling.plan is {type(sampling.plan).__name__}, which says where a reward's gradient flows; "
                f"{type(self).__name__} takes ratios of densities: choose AllSteps, Window, ChosenSteps, RandomSteps "
                "or FanOut"
            )

    def _check(self) -> None:
        epoch = self.collection.epoch(0)
        if not self.trained_steps(epoch.path):
            raise ValueError("the plan has no stochastic step to train on: a ratio of densities needs one")
        super()._check()
        whole = self.sampling.batch_size % (self.sampling.group_size // epoch.members) == 0
        if self.reward.card.scope == "group" and not whole:
            raise ValueError(
                f"the reward compares the samples of a group, so that sampling.batch_size has to be a multiple of "
                f"group_size {self.sampling.group_size}, not {self.sampling.batch_size}"
            )

    def work(self, keeper: Keeper) -> Worked:
        batch = self.collect(self.state.epoch, keeper)
        metrics = summary(batch) | self.update(batch, keeper=keeper)
        return Worked(metrics, batch.scores, self._histograms(batch))

    def _histograms(self, batch: Batch) -> dict[str, tuple[float, list[int]]]:
        known = batch.advantages[batch.weights > 0].flatten()
        limit = max(float(known.abs().max()), 1e-6)
        found = {"advantages": (limit, [int(count) for count in histogram(known, limit)])}
        if "log_ratio" in self.watched():
            counts: Any = torch.tensor([row["counts"] for row in self.state.seen]).sum(0)
            found["log_ratio"] = (self.ratio_limit(), counts.tolist())
        return found

    def collect(self, number: int, keeper: Keeper | None = None) -> Batch:
        """Rollouts, scores and advantages of one epoch; a function of policy, seed and epoch."""
        epoch = self.collection.epoch(number)
        if keeper is None:
            self.state.buffer = {}
        return self._batch(epoch, self.fill(epoch, keeper))

    def _batch(self, epoch: Epoch, parts: list[Collected]) -> Batch:
        rows = self.collection.rows_of(epoch, self.mine(epoch))
        samples = range(rows.start * epoch.members, rows.stop * epoch.members)
        group_ids = torch.arange(self.sampling.groups).repeat_interleave(self.sampling.group_size)
        scores = gather_scores([part.scores for part in parts], samples, len(group_ids))
        advantages, weights = self._valid_credit(scores, group_ids, epoch.number)
        told = self.collection.told_rows(epoch, range(len(epoch.rows)))
        return Batch(
            epoch.path, torch.tensor([*rows], dtype=torch.int64), told.text, join_steps_of(parts), scores, group_ids,
            advantages, weights, told.negatives(), epoch.buckets, self.model.images(told),
        )  # fmt: skip

    def _valid_credit(self, scores: Scores, group_ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        self.check_valid(scores, epoch)
        known = scores.valid
        credited = self.credit(valid_rows(scores), group_ids[known])
        advantages = credited.new_zeros(len(scores), *credited.shape[1:])
        advantages[known] = credited
        return advantages, known.float()

    def update(
        self, batch: Batch, order: Int[Tensor, " p"] | None = None, keeper: Keeper | None = None
    ) -> dict[str, float]:
        """One pass over the batch in `updates_per_epoch` optimizer steps; see `trainers.update.Update`."""
        if keeper is None:
            self.state.part, self.state.seen = 0, []
        return Update(self, batch, keeper).run(order)

"""Trainers by policy gradient: collect an epoch's rollouts, score them, give credit, update the policy by replay.

A method overrides `loss` and `credit`, and perhaps what is watched.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.gradient_plans import GradientPlan
from flowalign.records import Interval, Scores, expand_rows
from flowalign.rollout import Replay
from flowalign.schedules import Path
from flowalign.step_weights import StepWeights
from rewards.base import Reward
from trainers.base import Trainer, Worked
from trainers.batch import Batch, Sampling, join_steps_of, no_steps, summary_of, valid_rows
from trainers.collection import Collection, Epoch
from trainers.gathering import gather_scores
from trainers.keeper import Keeper
from trainers.ratio_guard import RatioGuard
from trainers.regularisers import older_policy
from trainers.resampling import EverySample, Selection, learnt_of
from trainers.state import Collected
from trainers.supervised import Supervised
from trainers.update import Update
from trainers.watch import histogram

if TYPE_CHECKING:
    from trainers.preflight.family import Family


class PolicyTrainer(Trainer):
    """A trainer whose loss reads the density of stored steps; see the subclasses.

    step_weights: multiply the advantages of each trained step; None for 1.
    selection: which of an epoch's samples the update takes, and which groups are sampled again before it.
    supervised: a branch that imitates the best samples beside the loss, if any.
    ratio_guard: looks at the ratios of an epoch's first optimizer step, if any.
    """

    step_weights: StepWeights | None = None
    selection: Selection = EverySample()
    supervised: Supervised | None = None
    ratio_guard: RatioGuard | None = None

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

    def credited(self, scores: Scores, group_ids: Int[Tensor, " b"], path: Path) -> Float[Tensor, b * t]:
        """Advantages of whole groups, 0 for samples without a valid score.

        Args:
            path: of their rollouts.
        """
        known = scores.valid
        credited = self.credit(valid_rows(scores), group_ids[known])
        advantages = credited.new_zeros(len(scores), *credited.shape[1:])
        advantages[known] = credited
        return advantages

    def trained_steps(self, path: Path) -> tuple[int, ...]:
        """The steps whose log-probs the loss reads, by default all stochastic ones."""
        return path.stochastic

    def needs_old_mean(self) -> bool:
        """Whether the loss reads the mean of a step under the policy that drew it."""
        return False

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
        needed, taken = self.collection.needed, learnt_of(epoch, self.selection, self.sampling)
        both, sampled = needed(taken, self.trained_steps, self.needs_reference()), needed(taken, no_steps, False)
        update = Rows(both.forward - sampled.forward, both.gradient - sampled.gradient)
        beside = self.supervised_rows(self.sampling.groups) + self.collection.scoring_rows(epoch)
        return needed(epoch, no_steps, False) + update + beside

    def most_updates(self) -> int:
        taken = learnt_of(self.collection.epoch(0), self.selection, self.sampling)
        return sum(rows for _, rows in taken.paths)

    def supervised_rows(self, samples: int) -> Rows:
        """Network rows of imitating so many samples, about one of each group."""
        return Rows() if self.supervised is None else Rows(0, samples * self.supervised.times.draws)

    def collector(self, reward: Reward) -> Collection:
        made = super().collector(reward)
        made.keep_latents = self.supervised is not None
        return made

    def as_reference(self) -> AbstractContextManager[None]:
        """While entered, the network is the reference."""
        return older_policy(self)

    def check_sampling(self, sampling: Sampling) -> None:
        self.selection.check(sampling)
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
        if self.supervised is not None and self.updates_per_epoch > self.sampling.groups:
            raise ValueError(
                f"supervised takes the best of each group, and an epoch's {self.sampling.groups} groups are fewer than "
                f"its {self.updates_per_epoch} optimizer steps: take more groups, or fewer updates_per_epoch"
            )
        whole = self.sampling.batch_size % (self.sampling.group_size // epoch.members) == 0
        if self.reward.card.scope == "group" and not whole:
            raise ValueError(
                f"the reward compares the samples of a group, so that sampling.batch_size has to be a multiple of "
                f"group_size {self.sampling.group_size}, not {self.sampling.batch_size}"
            )

    def work(self, keeper: Keeper) -> Worked:
        batch = self.collect(self.state.epoch, keeper)
        drawn, told = self._first_round(batch), self._selected(batch)
        metrics = summary_of(drawn, self.sampling.groups) | told | self.update(batch, keeper=keeper)
        return Worked(metrics | self.learnt(metrics), drawn, self._histograms(batch))

    def learnt(self, metrics: dict[str, float]) -> dict[str, float]:
        """Called once all of an epoch's optimizer steps are made, with what is logged of them; returns what else is."""
        return {}

    def _first_round(self, batch: Batch) -> Scores:
        """The scores of prompts as they come: later rounds are of those alone that are sampled again."""
        first = self.sampling.groups * self.sampling.group_size
        return batch.scores if len(batch.scores) == first else batch.scores.rows(range(first))

    def _selected(self, batch: Batch) -> dict[str, float]:
        """Groups of which nothing is taken, and samples drawn in further rounds."""
        if isinstance(self.selection, EverySample):
            return {}
        groups = len(batch.group_ids[batch.weights > 0].unique())
        more = len(batch.scores) - self.sampling.groups * self.sampling.group_size
        return {"left_out": float(self.sampling.groups - groups), "sampled_again": float(more)}

    def _histograms(self, batch: Batch) -> dict[str, tuple[float, list[int]]]:
        known = batch.advantages[batch.weights > 0].flatten()
        limit = max(float(known.abs().max()) if len(known) else 0.0, 1e-6)
        found = {"advantages": (limit, [int(count) for count in histogram(known, limit)])}
        if "log_ratio" in self.watched():
            counts: Any = torch.tensor([row["counts"] for row in self.state.seen]).sum(0)
            found["log_ratio"] = (self.ratio_limit(), counts.tolist())
        return found

    def collect(self, number: int, keeper: Keeper | None = None) -> Batch:
        """Rollouts, scores and advantages of one epoch; a function of policy, seed and epoch."""
        if keeper is None:
            self.state.buffer, self.state.rounds = {}, []
        while True:
            epoch = self.epoch_of(number, self.state.rounds)
            parts = self.fill(epoch, keeper)
            rows = self._rows(epoch)
            scores = gather_scores(
                [part.scores for part in parts], expand_rows(rows, epoch.members).tolist(), len(epoch.group_ids)
            )
            scores = self.usable(scores, number, epoch.group_ids)
            known = scores.valid
            total, groups = scores.total[known], epoch.group_ids[known]
            again = self.selection.again(total, groups, self.sampling, len(epoch.rounds))
            if not again:
                return self._batch(epoch, rows, parts, scores)
            self.state.rounds = [*self.state.rounds, again]

    def _rows(self, epoch: Epoch) -> Int[Tensor, " r"]:
        """Those that this process holds."""
        held = [self.collection.rows_of(epoch, part) for part in self.collection.shares(epoch)]
        return torch.tensor([row for part in held for row in part], dtype=torch.int64)

    def _batch(self, epoch: Epoch, rows: Int[Tensor, " r"], parts: list[Collected], scores: Scores) -> Batch:
        advantages = self.credited(scores, epoch.group_ids, epoch.path)
        told = self.collection.told_rows(epoch, range(len(epoch.rows)))
        alike = self._by_bucket(epoch, parts)
        ends = [[part.latents for part in one if part.latents is not None] for one in alike]
        return Batch(
            epoch.path, rows, told.text, tuple(step for one in alike for step in join_steps_of(one)), scores,
            epoch.group_ids, advantages, self._weights(scores, advantages, epoch.group_ids), told.negatives(),
            epoch.buckets, self.model.images(told), tuple(torch.cat(one) for one in ends if one),
        )  # fmt: skip

    def _by_bucket(self, epoch: Epoch, parts: list[Collected]) -> list[list[Collected]]:
        """This process's micro-batches, those of one bucket together."""
        cuts, found = epoch.cuts(self.sampling.batch_size), dict[int, list[Collected]]()
        for index, part in zip(self.mine(epoch), parts, strict=True):
            found.setdefault(epoch.bucket_of(cuts[index]).rows.start, []).append(part)
        return [*found.values()]

    def _weights(self, scores: Scores, advantages: Tensor, group_ids: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """1 for the samples that the update takes, else 0."""
        weights, known = torch.zeros(len(scores)), scores.valid
        size = self.sampling.group_size
        weights[known] = self.selection.weights(scores.total[known], advantages[known], group_ids[known], size)
        return weights

    def update(
        self, batch: Batch, order: Int[Tensor, " p"] | None = None, keeper: Keeper | None = None
    ) -> dict[str, float]:
        """One pass over the batch in `updates_per_epoch` optimizer steps; see `trainers.update.Update`."""
        if keeper is None:
            self.state.part, self.state.seen = 0, []
        return Update(self, batch, keeper).run(order)

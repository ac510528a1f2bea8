"""The loop that all trainers share: collect an epoch's rollouts, score them, give credit, update the policy.

A method overrides `loss`, and perhaps `credit`; the order of things stands here alone.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.distributed import check_started, on_main, world_size
from flowalign.interrupt import StopRequest
from flowalign.models import as_model
from flowalign.models.base import Model
from flowalign.prompts import PromptData, as_prompts
from flowalign.records import Interval, Scores
from flowalign.rollout import Policy, Replay
from flowalign.schedules import Path
from flowalign.tracking import Run, TrackerName
from rewards.algebra import running_normalisers
from rewards.base import Reward, as_reward
from trainers.batch import Batch, Sampling, summary, valid_rows
from trainers.collection import Collection, Epoch, gather_scores, join_steps_of
from trainers.evaluation import Evaluation, Evaluator
from trainers.keeper import Checkpoints, Keeper
from trainers.optim import Optimizer, PolicyOptimizer
from trainers.state import State
from trainers.update import Update
from trainers.watch import histogram


class Trainer(ABC):
    """See the subclasses; `train()` runs all epochs and leaves a run folder."""

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        sampling: Sampling,
        policy: Policy,
        optimizer: Optimizer,
        evaluation: Evaluation,
        checkpoints: Checkpoints,
        epochs: int,
        updates_per_epoch: int,
        folder: str,
        seed: int,
        on_invalid: Literal["stop", "drop"],
        log_with: Sequence[TrackerName],
    ) -> None:
        check_started()
        self.model, self.reward, self.prompts = as_model(model), as_reward(reward), as_prompts(prompts)
        self.sampling, self.policy, self.evaluation, self.checkpoints = sampling, policy, evaluation, checkpoints
        self.epochs, self.updates_per_epoch, self.seed = epochs, updates_per_epoch, seed
        self.folder, self.on_invalid, self.log_with = FilePath(folder), on_invalid, tuple(log_with)
        self.collection = Collection(self.model, self.reward, self.prompts, sampling, policy, seed)
        self.evaluator = Evaluator(self.model, self.reward, evaluation, sampling, seed)
        self.optimizer = PolicyOptimizer(self.model.trainable(), optimizer, self.model.scale_loss)
        self.normalisers = running_normalisers(self.reward)
        self.state = State()
        self.stop = StopRequest()
        self._check()

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

    def needs_reference(self) -> bool:
        """Whether the loss reads the reference model; its pass is left out otherwise."""
        return False

    def watch(
        self, new: Replay, old_log_probs: Tensor, reference: Replay | None, interval: Interval
    ) -> dict[str, Float[Tensor, " b"]]:
        """Numbers of each sample to log the mean of; `log_ratio` also gives a largest ratio and a histogram."""
        return {}

    def watched(self) -> tuple[str, ...]:
        """The names of what `watch` returns."""
        return ()

    def ratio_limit(self) -> float:
        """The largest log-ratio that its histogram shows."""
        return 1.0

    def _check(self) -> None:
        epoch = self.collection.epoch(0)
        if not self.trained_steps(epoch.path):
            raise ValueError("the plan has no stochastic step to train on: a ratio of densities needs one")
        if not 1 <= self.updates_per_epoch <= len(epoch.rows):
            raise ValueError(
                f"updates_per_epoch must lie in 1 ... {len(epoch.rows)} (the rows of an epoch), "
                f"not {self.updates_per_epoch}"
            )
        whole = self.sampling.batch_size % (self.sampling.group_size // epoch.members) == 0
        if self.reward.card.scope == "group" and not whole:
            raise ValueError(
                f"the reward compares the samples of a group, so that sampling.batch_size has to be a multiple of "
                f"group_size {self.sampling.group_size}, not {self.sampling.batch_size}"
            )
        if self.reward.card.scope == "set":
            raise ValueError("the reward scores a whole set of samples at once: it is for evaluation, not for training")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")

    @property
    def sigmas(self) -> list[float]:
        """The grid of the rollouts."""
        return self.collection.sigmas

    def train(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        resume: bool = False,
        allow_change: Sequence[str] = (),
        report: bool = True,
    ) -> FilePath:
        """Run all epochs; returns the run folder. The best policy's weights are left in its `lora/`.

        Args:
            config: the resolved config, plain data, for the run folder.
            resume: go on where a run in the same folder has stopped; without one, start.
            allow_change: config keys that may differ from those of the run that is gone on with.
            report: write `report.html` in the end.

        Raises: Stopped where a signal asked for it, all being saved; ValueError for a folder of another run.
        """
        with self.stop, Run(self.folder, resume=resume, log_with=self.log_with) as run:
            keeper = Keeper(self, run, config, self.checkpoints)
            keeper.resume(allow_change)
            run.note("start", f"epoch {self.state.epoch} of {self.epochs} on {world_size()} processes")
            self.evaluator.encode()
            while True:
                self._evaluate(run, keeper)
                if self.state.epoch >= self.epochs and not self.state.part:
                    break
                metrics = self._run_epoch(run, keeper)
                shown = {"reward": metrics["reward"], "held-out": self._last("held-out"), "best": self.state.best}
                keeper.progress.update(self.sampling.groups * self.sampling.group_size, shown)
            keeper.progress.close()
            keeper.finish()
        if report:
            on_main(self._report)
        return self.folder

    def _report(self) -> None:
        """Write the run's report; a run that has been made is not lost for a page that cannot be."""
        from flowalign.report import write_report

        try:
            write_report(self.folder)
        except (ValueError, OSError) as error:
            print(f"flowalign: no report: {error}; try flowalign report {self.folder}", file=sys.stderr)

    def _last(self, name: str) -> float | None:
        return self.state.history[-1][name] if self.state.history else None

    def _run_epoch(self, run: Run, keeper: Keeper) -> dict[str, float]:
        batch = self.collect(self.state.epoch, keeper)
        metrics = summary(batch) | self.update(batch, keeper=keeper)
        for normaliser in self.normalisers.values():
            normaliser.update(batch.scores)
        epoch = self.collection.epoch(self.state.epoch)
        needed = self.collection.needed(epoch, self.trained_steps(epoch.path), self.needs_reference())
        metrics |= keeper.costs(needed)
        self.state.epoch, seen = self.state.epoch + 1, self.state.seen
        self.state.part, self.state.buffer, self.state.seen = 0, {}, []
        self.state.rows, self.state.seconds = Rows(), {}
        run.log(self.state.epoch, metrics)
        self._log_histograms(run, batch, seen)
        if not self._evaluation_due():
            keeper.poll()
        return metrics

    def _log_histograms(self, run: Run, batch: Batch, seen: list[dict[str, Any]]) -> None:
        known = batch.advantages[batch.weights > 0]
        limit = max(float(known.abs().max()), 1e-6)
        counts = histogram(known, limit)
        run.log_histogram(self.state.epoch, "advantages", -limit, limit, [int(count) for count in counts])
        if "log_ratio" in self.watched():
            limit, counts = self.ratio_limit(), torch.tensor([row["counts"] for row in seen]).sum(0)
            run.log_histogram(self.state.epoch, "log_ratio", -limit, limit, counts.tolist())

    def _evaluation_due(self) -> bool:
        epoch, history = self.state.epoch, self.state.history
        due = epoch % self.evaluation.every == 0 or epoch == self.epochs
        new = not self.state.part and (not history or history[-1]["epoch"] < epoch)
        return self.evaluator.prompts is not None and due and new

    def _evaluate(self, run: Run, keeper: Keeper) -> None:
        if not self._evaluation_due():
            return
        with self.optimizer.averaged():
            metrics = self.evaluator.run(run, self.state.epoch, partial(keeper.asked, "evaluation"))
        if metrics is None:
            keeper.stop()
            return
        self.model.meter.take()
        score = metrics["held-out"]
        self.state.history.append({"epoch": self.state.epoch, **metrics})
        if self.state.best is None or score > self.state.best:
            self.state.best, self.state.best_epoch = score, self.state.epoch
            self.state.best_checkpoint = keeper.name()
        self.evaluator.retire(run, self.state.epoch, self.state.best_epoch)
        keeper.save()
        keeper.poll()

    def collect(self, number: int, keeper: Keeper | None = None) -> Batch:
        """Rollouts, scores and advantages of one epoch; a function of policy, seed and epoch."""
        epoch = self.collection.epoch(number)
        if keeper is None:
            self.state.buffer = {}
        mine, buffer = self.collection.mine(epoch), self.state.buffer
        turns = -(-self.collection.micro_batches(epoch) // world_size())
        for turn in range(turns):
            if keeper is not None and not self.state.part:
                keeper.poll("rollout", turn, turns)
            if turn < len(mine) and mine[turn] not in buffer:
                buffer[mine[turn]] = self.collection.collect(epoch, mine[turn])
                self.state.spend(self.model.meter)
        return self._batch(epoch, mine)

    def _batch(self, epoch: Epoch, mine: range) -> Batch:
        rows, parts = self.collection.rows_of(epoch, mine), [self.state.buffer[index] for index in mine]
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
        invalid = int((~scores.valid).sum())
        if invalid and (self.on_invalid == "stop" or invalid == len(scores)):
            raise ValueError(
                f"{invalid} of {len(scores)} scores of epoch {epoch} are not valid; "
                "mend the reward, or set on_invalid: drop"
            )
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

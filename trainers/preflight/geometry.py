"""How an epoch is cut up into calls, over any number of processes, and what its plan does at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from flowalign.accounting import Rows
from flowalign.distributed import share
from flowalign.records import Interval, intervals
from flowalign.transitions import ODE, Transition
from trainers.collection import Epoch

if TYPE_CHECKING:
    from trainers.base import Trainer

GLANCED_AT = 10_000  # prompts of a large set whose text is looked at
LOOKED_AT = 100  # epochs: a plan may draw other steps in each, and their mean has settled by then


@dataclass(frozen=True)
class Geometry:
    """How an epoch's rows are shared out.

    rows: of trained network calls, each with `members` samples. shares: micro-batches of each process's rollouts.
    update_shares: those of its update, all optimizer steps together.
    """

    groups: int
    group_size: int
    members: int
    rows: int
    batch_size: int
    updates: int
    shares: tuple[int, ...]
    update_shares: tuple[int, ...]

    @property
    def samples(self) -> int:
        """Of an epoch."""
        return self.rows * self.members

    @property
    def rollout_padding(self) -> float:
        """Rows of the rollouts' calls that are padding, as a share of the rows that are not."""
        return sum(self.shares) * self.batch_size / self.rows - 1

    @property
    def update_padding(self) -> float:
        """The same of the update's calls, which are cut once more into optimizer steps."""
        return sum(self.update_shares) * self.batch_size / self.rows - 1


def geometry(trainer: Trainer, processes: int = 1, batch_size: int | None = None) -> Geometry:
    """The trainer's, or what it would be with another number of processes or another batch size."""
    sampling, epoch = trainer.sampling, trainer.collection.epoch(0)
    size, rows = batch_size or sampling.batch_size, len(epoch.rows)
    cuts = epoch.cuts(size)
    parts = [share(len(cuts) - 1, process, processes) for process in range(processes)]
    shares = [range(cuts[part.start], cuts[part.stop]) for part in parts]
    held = [[len(bucket.among(rows_held)) for bucket in epoch.buckets] for rows_held in shares]
    each = trainer.updates_per_epoch
    updates = tuple(sum(_update_calls(count, each, size) for count in counts) for counts in held)
    return Geometry(
        sampling.groups, sampling.group_size, epoch.members, rows, size, trainer.updates_per_epoch,
        tuple(len(part) for part in parts), updates,
    )  # fmt: skip


def _update_calls(rows: int, updates: int, size: int) -> int:
    """Micro-batches of so many rows in so many optimizer steps, each of which has as many rows or one more."""
    each, more = divmod(rows, updates)
    return more * -(-(each + 1) // size) + (updates - more) * -(-each // size)


def better_batch_size(trainer: Trainer, processes: int) -> Geometry:
    """Of the batch sizes from a half of the present one up to it, that with the least padding."""
    size = trainer.sampling.batch_size
    tried = [geometry(trainer, processes, one) for one in range(size, (size - 1) // 2, -1)]
    return min(tried, key=lambda one: one.rollout_padding + one.update_padding)


def looked_at(trainer: Trainer) -> tuple[Epoch, ...]:
    """The run's first epochs."""
    return tuple(trainer.collection.epoch(number) for number in range(min(trainer.epochs, LOOKED_AT)))


def floor_rows(trainer: Trainer, epoch: Epoch) -> Rows:
    """The fewest network rows that an epoch can do with."""
    return trainer.collection.needed(epoch, trainer.trained_steps(epoch.path), trainer.needs_reference())


def spent_rows(trainer: Trainer, epoch: Epoch, cut: Geometry) -> Rows:
    """The network rows that an epoch takes, padding included.

    The update takes fewer where all samples of a micro-batch have advantage 0: it is left out.
    """
    trained, reference = trainer.trained_steps(epoch.path), trainer.needs_reference()
    rolled = _padded(epoch, sum(cut.shares) * cut.batch_size)
    updated = _padded(epoch, sum(cut.update_shares) * cut.batch_size)
    needed = trainer.collection.needed
    both, rollouts = needed(updated, trained, reference), needed(updated, (), False)
    update = Rows(both.forward - rollouts.forward, both.gradient)
    return needed(rolled, (), False) + update


def _padded(epoch: Epoch, rows: int) -> Epoch:
    return replace(epoch, rows=epoch.rows[:1] * rows)


@dataclass(frozen=True)
class PlannedStep:
    """One step of the grid over the run's first epochs.

    stochastic, trained: the share of epochs in which it is so. std: of its noise where it is stochastic, else 0.
    leverage: by how many stds the mean moves where the velocity moves by 1; the log-ratio's spread goes with it.
    """

    interval: Interval
    std: float
    leverage: float
    stochastic: float
    trained: float


def planned_steps(trainer: Trainer, epochs: tuple[Epoch, ...]) -> tuple[PlannedStep, ...]:
    """All steps of the grid. Raises: ValueError where a transition is not defined for its step."""
    found = []
    for interval in intervals(trainer.sigmas):
        at = interval.index
        kinds = [epoch.path.transitions[at] for epoch in epochs]
        noisy = [kind for kind in kinds if not isinstance(kind, ODE)]
        std, leverage = _spread(noisy[0], interval) if noisy else (0.0, 0.0)
        trained = sum(at in trainer.trained_steps(epoch.path) for epoch in epochs)
        found.append(PlannedStep(interval, std, leverage, len(noisy) / len(epochs), trained / len(epochs)))
    return tuple(found)


def _spread(transition: Transition, interval: Interval) -> tuple[float, float]:
    mean, std = transition(torch.zeros(1, 1), torch.ones(1, 1), interval)
    return std, abs(float(mean)) / std if std > 0 else math.inf

"""How an epoch is cut up into calls, over any number of processes, and what its plan does at each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flowalign.accounting import Rows
from flowalign.models import PipelineModel
from flowalign.records import Interval, intervals
from flowalign.schedules import Path
from flowalign.step_weights import spread_of
from flowalign.transitions import ODE
from trainers.collection import Epoch

if TYPE_CHECKING:
    from trainers.base import Trainer

LOOKED_AT = 100  # epochs: a plan may draw other steps in each, and their mean has settled by then


@dataclass(frozen=True)
class Geometry:
    """How an epoch's rows are shared out.

    rows: of trained network calls, each with `members` samples. shares: micro-batches of each process's rollouts.
    update_shares: those of its update, all optimizer steps together. taken: samples that the update takes, 0 for all.
    drawn: whether the samples are rollouts, or stored. callers: processes that make each call together, and have one of
    the shares (`flowalign.context_parallel`).
    """

    groups: int
    group_size: int
    members: int
    rows: int
    batch_size: int
    updates: int
    shares: tuple[int, ...]
    update_shares: tuple[int, ...]
    taken: int = 0
    drawn: bool = True
    callers: int = 1

    @property
    def processes(self) -> int:
        """Of the run."""
        return len(self.shares) * self.callers

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
        return sum(self.update_shares) * self.batch_size / (self.taken or self.rows) - 1

    @property
    def learnt(self) -> int:
        """Samples that the update takes."""
        return self.taken or self.samples


def geometry(trainer: Trainer, processes: int = 1, batch_size: int | None = None) -> Geometry:
    """The trainer's, or what it would be with another number of processes or another batch size.

    Raises: ValueError where processes that make calls together do not come out even.
    """
    callers = callers_of(trainer, processes)
    if processes % callers:
        raise ValueError(
            f"memory.context_parallel: {callers} processes make each call together, which does not divide {processes}; "
            f"take a multiple of {callers} processes"
        )
    cut = trainer.preflight().geometry(processes // callers, batch_size or trainer.sampling.batch_size)
    return replace(cut, callers=callers)


def callers_of(trainer: Trainer, processes: int) -> int:
    """How many of so many processes make each call together; one process makes all alone."""
    model = trainer.model
    together = model.memory.context_parallel if isinstance(model, PipelineModel) and processes > 1 else None
    return 1 if together is None else together.size


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
    return trainer.needed(epoch)


def spent_rows(trainer: Trainer, epoch: Epoch, cut: Geometry) -> Rows:
    """The network rows that an epoch takes, padding included."""
    return trainer.preflight().spent_rows(epoch, cut)


def padded(epoch: Epoch, rows: int) -> Epoch:
    """An epoch of so many rows."""
    total = len(epoch.rows)
    buckets = [
        replace(one, rows=range(one.rows.start * rows // total, one.rows.stop * rows // total)) for one in epoch.buckets
    ]
    return replace(epoch, rows=epoch.rows[:1] * rows, buckets=tuple(buckets))


@dataclass(frozen=True)
class PlannedStep:
    """One step of the grid over the run's first epochs.

    stochastic, trained: the share of epochs in which it is so. std: of its noise where it is stochastic, else 0.
    leverage: of a step with a density by how many stds its mean moves where the velocity moves by 1, which is how far
    log-ratios spread; of one with gradient by how much the latents move, which scales the gradient.
    """

    interval: Interval
    std: float
    leverage: float
    stochastic: float
    trained: float


def steps_of_paths(
    epochs: Sequence[Epoch], sigmas: list[float], trained: Callable[[Path], Sequence[int]]
) -> tuple[PlannedStep, ...]:
    """All steps that the paths of these epochs make, of which some may be shorter than others."""
    paths = [(path, rows, intervals(path.grid(sigmas))) for epoch in epochs for path, rows in epoch.paths]
    found, total = list[PlannedStep](), sum(rows for _, rows, _ in paths)
    for at in range(max(len(grid) for _, _, grid in paths)):
        made = [one for one in paths if at < len(one[2])]
        noisy = [one for one in made if not isinstance(one[0].transitions[at], ODE)]
        path, _, grid = (noisy or made)[0]
        std, leverage = spread_of(path.transitions[at], grid[at]) if noisy else (0.0, 0.0)
        stochastic = sum(rows for _, rows, _ in noisy)
        learnt = sum(rows for path, rows, _ in made if at in trained(path))
        found.append(PlannedStep(grid[at], std, leverage, stochastic / total, learnt / total))
    return tuple(found)


def planned_steps(trainer: Trainer, epochs: tuple[Epoch, ...]) -> tuple[PlannedStep, ...]:
    """All steps of the grid. Raises: ValueError where a transition is not defined for its step."""
    return trainer.preflight().planned_steps(epochs)

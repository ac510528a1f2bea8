"""An epoch's optimizer steps: gradients are added up, summed over processes, and one step is made of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from flowalign.distributed import rank, together
from trainers.watch import Watch

if TYPE_CHECKING:
    from trainers.base import Trainer
    from trainers.keeper import Keeper


class OptimizerSteps(ABC):
    """The optimizer steps of an epoch, those before the record's `part` left out.

    A step's loss is divided once, by its weighted number of terms over all processes.
    """

    def __init__(self, trainer: Trainer, keeper: Keeper | None) -> None:
        self.trainer, self.keeper = trainer, keeper

    @abstractmethod
    def _watch(self) -> Watch:
        """For the numbers of one optimizer step."""

    @abstractmethod
    def _accumulate(self, rows: Int[Tensor, " p"], watch: Watch) -> dict[str, Any]:
        """Add up the gradient of an optimizer step's rows; returns what else is to be kept of it."""

    @abstractmethod
    def _save_bad(self, folder: Path, name: str, watch: Watch) -> None:
        """Write down the samples of a step whose loss or gradient is not finite."""

    def _run(self, parts: Sequence[Tensor]) -> dict[str, float]:
        """A step for each of the parts; returns the means of what was seen."""
        trainer, state = self.trainer, self.trainer.state
        for rows in parts[state.part :]:
            watch = self._watch()
            with trainer.model.meter.phase("update"):
                kept = self._accumulate(rows, watch)
                norm = trainer.optimizer.step(watch.sums())
            state.seen.append(watch.means() | {"grad_norm": norm, "counts": watch.counts()} | kept)
            state.spend(trainer.model.meter)
            self._count_skipped(norm, watch)
            state.part += 1
            if self.keeper is not None and state.part < len(parts):
                self.keeper.poll()
        return self._means()

    def _means(self) -> dict[str, float]:
        """Over the epoch's optimizer steps that were made, but for those that had nothing to take a mean of."""
        seen = self.trainer.state.seen
        made = [row for row in seen if math.isfinite(row["grad_norm"])]
        names = [name for name, value in (made[0] if made else {}).items() if isinstance(value, float)]
        held = {name: [row[name] for row in made if not math.isnan(row[name])] for name in names}
        means = {name: sum(values) / len(values) if values else math.nan for name, values in held.items()}
        return means | {"skipped": float(len(seen) - len(made)), "lr": self.trainer.optimizer.learning_rate}

    def _count_skipped(self, norm: float, watch: Watch) -> None:
        """The decision is the same on every process: it is made of numbers that have been summed over them."""
        state, optimizer = self.trainer.state, self.trainer.optimizer
        if math.isfinite(norm):
            state.skipped = 0
            return
        if not watch.any_bad() and optimizer.scaling_down():
            return
        state.skipped += 1
        folder = self.trainer.folder / "non_finite"
        name = f"epoch-{state.epoch:06d}-step-{state.part}-process-{rank()}"
        together(lambda: self._save_bad(folder, name, watch))
        if state.skipped > optimizer.settings.max_skipped:
            raise ValueError(
                f"{state.skipped} optimizer steps in a row had a loss or gradient that is not finite, last in epoch "
                f"{state.epoch}; their samples are in {folder}: look at the reward, lower the learning rate, or train "
                "in higher precision"
            )

    def _stop_if_asked(self, turn: int, turns: int) -> None:
        """Amid a step, whose gradients are then forgotten: it is made anew when the run goes on."""
        if self.keeper is not None and self.keeper.asked("update", turn, turns):
            self.trainer.optimizer.discard()
            self.trainer.model.meter.take()
            self.keeper.stop()

"""A run's evaluations: when one is due, what it changes of the record, and when its alarms end the run."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from flowalign.tracking import Run
from trainers.alarms import GO_ON, over
from trainers.keeper import Keeper

if TYPE_CHECKING:
    from trainers.base import Trainer


def due(trainer: Trainer) -> bool:
    """Whether the record stands where an evaluation belongs that has not been made."""
    epoch, history = trainer.state.epoch, trainer.state.history
    at = epoch % trainer.evaluation.every == 0 or epoch == trainer.epochs
    new = not trainer.state.part and (not history or history[-1]["epoch"] < epoch)
    return trainer.evaluates() and at and new and not over(trainer.evaluation.watch, history)


def evaluate(trainer: Trainer, run: Run, keeper: Keeper) -> None:
    """Evaluate where it is due, keep the best, and do what an alarm asks for. Raises: Stopped where a signal asked."""
    if not due(trainer):
        return
    with trainer.optimizer.averaged():
        metrics = trainer.judge(run, partial(keeper.asked, "evaluation"))
    if metrics is None:
        keeper.stop()
        return
    trainer.model.meter.take()
    state, score = trainer.state, metrics["held-out"]
    state.history.append({"epoch": state.epoch, **metrics})
    if state.best is None or score > state.best:
        state.best, state.best_epoch = score, state.epoch
        state.best_checkpoint = keeper.name()
    trainer.evaluator.retire(run, state.epoch, state.best_epoch)
    if over(trainer.evaluation.watch, state.history):
        _end(trainer, run, keeper)
    keeper.save()
    keeper.poll()


def _end(trainer: Trainer, run: Run, keeper: Keeper) -> None:
    """Say that an alarm ends the run; with "roll_back", put the best policy back before all is saved."""
    watch, state = trainer.evaluation.watch, trainer.state
    assert watch is not None
    back = watch.on_alarm == "roll_back" and state.best_epoch != state.epoch
    if back:
        keeper.roll_back()
    told = f"ended by its watch at epoch {state.epoch} of {trainer.epochs}; the best policy is that of epoch"
    told += f" {state.best_epoch}" + (", which the run has been rolled back to" if back else "")
    keeper.tell("watch", f"{told}; {GO_ON}")

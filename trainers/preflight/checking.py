"""The preflight itself: settings, then the tiny step, then what they tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowalign.accounting import Rows
from flowalign.tracking import write_atomically
from trainers.preflight.costs import Space, Times, Trial, save_once, space, times
from trainers.preflight.findings import of_costs, of_trial
from trainers.preflight.folder import of_folder
from trainers.preflight.geometry import (
    Geometry,
    PlannedStep,
    floor_rows,
    geometry,
    looked_at,
    planned_steps,
    spent_rows,
)
from trainers.preflight.memory import Prediction, predict
from trainers.preflight.problems import Problem, error, of_settings, warning
from trainers.preflight.sheet import contact_sheet
from trainers.preflight.trial import encode_some, judge, peak_memory

if TYPE_CHECKING:
    from trainers.base import Trainer

Say = Callable[[str], None]
SHEET = "first_group.png"


@dataclass(frozen=True)
class Preflight:
    """All that a check has found. rows: spent and needed in each of the run's first epochs.

    trial, times, space and sheet are None where an error forbade the tiny step, or stopped it; memory is None where it
    was forbidden, or cannot be predicted.
    """

    trainer: Trainer
    cut: Geometry
    steps: tuple[PlannedStep, ...]
    rows: tuple[tuple[Rows, Rows], ...]
    problems: tuple[Problem, ...]
    trial: Trial | None = None
    times: Times | None = None
    space: Space | None = None
    sheet: Path | None = None
    memory: Prediction | None = None

    @property
    def errors(self) -> int:
        """How many problems would stop the run, or make it train nothing."""
        return sum(problem.kind == "error" for problem in self.problems)


def inspect(
    trainer: Trainer,
    out: Path,
    config: Mapping[str, Any] | None = None,
    processes: int = 1,
    say: Say = lambda text: None,
    allow_change: Sequence[str] = (),
) -> Preflight:
    """Check a trainer; it and its run folder are left as they are.

    Args:
        out: folder for the first group's contact sheet, made if it is not there.
        config: the resolved config, to be compared with that of a run in the trainer's folder.
        processes: how many the run will have; the check itself is one.
        say: is told what is going on.
        allow_change: keys in which the trainer may differ from a run in its folder.

    Raises: ValueError where `out` lies in the run folder.
    """
    if out.absolute().is_relative_to(trainer.folder.absolute()):
        raise ValueError(f"{out} lies in the run folder {trainer.folder}, where a check writes nothing; name another")
    cut, epochs = geometry(trainer, processes), looked_at(trainer)
    rows = tuple((spent_rows(trainer, epoch, cut), floor_rows(trainer, epoch)) for epoch in epochs)
    problems = of_folder(trainer, config, allow_change)
    try:
        steps = planned_steps(trainer, epochs)
    except ValueError as problem:
        return Preflight(trainer, cut, (), rows, (*problems, error(f"the plan: {problem}")))
    settings = of_settings(trainer, cut, steps)
    problems += settings
    static = Preflight(trainer, cut, steps, rows, tuple(problems))
    if any(problem.kind == "error" for problem in settings):
        return static
    out.mkdir(parents=True, exist_ok=True)
    say("predicting memory")
    memory, unknown = _predicted(trainer, cut)
    problems += unknown
    trial, failure = _try(trainer, out, say)
    if trial is None:
        return Preflight(trainer, cut, steps, rows, (*problems, error(failure)), memory=memory)
    taken, needs = times(trainer, cut, trial), space(trainer, cut, trial)
    problems += [*of_trial(trainer, trial), *of_costs(trainer, needs, taken)]
    write_atomically(out / SHEET, contact_sheet(trial.rollouts))
    return Preflight(trainer, cut, steps, rows, tuple(problems), trial, taken, needs, out / SHEET, memory)


def _predicted(trainer: Trainer, cut: Geometry) -> tuple[Prediction | None, list[Problem]]:
    try:
        return predict(trainer, cut), []
    except (RuntimeError, ValueError) as problem:
        return None, [warning(f"memory cannot be predicted for this model: {str(problem).splitlines()[0]}")]


def _try(trainer: Trainer, out: Path, say: Say) -> tuple[Trial | None, str]:
    """The tiny step, or why it could not be made."""
    doing = "encoding prompts"
    device, family = trainer.model.device, trainer.preflight()
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        say(doing)
        encoding = encode_some(trainer)
        say(doing := "sampling the first group, to warm up and again to be measured")
        rollouts = family.roll_out()
        say(doing := "taking a gradient, to warm up and again to be measured")
        learning = family.learn(rollouts)
        if trainer.evaluator.prompts is not None:
            say(doing := "trying a call of the evaluation")
        judging = judge(trainer)
        doing = "writing a checkpoint to measure it"
        saving = save_once(trainer, out)
    except (ValueError, OSError) as problem:
        return None, f"{doing}: {problem}"
    except torch.OutOfMemoryError as problem:
        return None, (
            f"{doing}: out of memory ({str(problem).splitlines()[0]}). Lower sampling.batch_size and "
            "sampling.rows_per_call, turn on model.gradient_checkpointing, or set mixed_precision to bf16"
        )
    return Trial(rollouts, learning, judging, encoding, saving, peak_memory(device)), ""

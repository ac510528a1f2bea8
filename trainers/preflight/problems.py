"""What would stop a run or spoil it, told by its settings alone. Each check answers None where all is well.

A text says what is wrong, why that matters and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flowalign.models import PipelineModel
from flowalign.report.formats import percent
from trainers.long_prompts import GLANCED_AT, glance, long_prompts
from trainers.preflight.geometry import Geometry, PlannedStep, better_batch_size

if TYPE_CHECKING:
    from trainers.base import Trainer

FEW_PROMPTS = 30  # held out: fewer give no interval to speak of (the report says the same)
PADDING = 0.1  # of a call's rows


@dataclass(frozen=True)
class Problem:
    """error: the run would stop, or train nothing. warning: it would run, and perhaps not as was meant."""

    kind: Literal["error", "warning"]
    text: str


Found = Problem | None


def warning(text: str) -> Problem:
    """A problem that does not stop a run."""
    return Problem("warning", text)


def error(text: str) -> Problem:
    """A problem that does."""
    return Problem("error", text)


def of_settings(trainer: Trainer, cut: Geometry, steps: tuple[PlannedStep, ...]) -> list[Problem]:
    """All that the settings tell."""
    found = [
        *trainer.preflight().of_settings(cut, steps),
        _sampler(trainer),
        _few_training_prompts(trainer, cut),
        _truncated(trainer),
        _padding(trainer, cut),
        _idle(cut),
        _small_calls(trainer),
        _learning_rate(trainer),
        _average(trainer),
        _seldom_evaluated(trainer),
        _held_out(trainer),
        _trained_on(trainer),
        _half_precision(trainer),
    ]
    return [problem for problem in found if problem is not None]


def _sampler(trainer: Trainer) -> Found:
    note = trainer.model.scheduler_note() if isinstance(trainer.model, PipelineModel) else None
    return None if note is None else warning(note)


def _few_training_prompts(trainer: Trainer, cut: Geometry) -> Found:
    count, groups = len(trainer.prompts), trainer.sampling.groups
    if count >= groups:
        return None
    return warning(
        f"{count} prompts for {groups} groups: prompts come more than once in an epoch, and a small set is soon "
        f"overfitted. Add prompts, or set sampling.groups to {count}{' with a larger group_size' if cut.drawn else ''}"
    )


def _truncated(trainer: Trainer) -> Found:
    text = long_prompts(trainer)
    return None if text is None else warning(text)


def _padding(trainer: Trainer, cut: Geometry) -> Found:
    worst = max(cut.rollout_padding, cut.update_padding)
    if worst <= PADDING:
        return None
    where = "rollouts" if cut.rollout_padding == worst else "update"
    better = better_batch_size(trainer, cut.processes)
    text = (
        f"{percent(worst)} of rows on top are padding in the {where}: calls of sampling.batch_size {cut.batch_size} do "
        f"not divide an epoch of {cut.rows} rows in {cut.updates} optimizer steps"
    )
    least = max(better.rollout_padding, better.update_padding)
    return warning(text + (f". With {better.batch_size} it is {percent(least)}" if least < worst else ""))


def _idle(cut: Geometry) -> Found:
    idle = sum(count == 0 for count in cut.shares)
    if not idle:
        return None
    groups = "processes" if cut.callers == 1 else f"groups of {cut.callers} processes"
    return warning(
        f"{idle} of {len(cut.shares)} {groups} have nothing to do: an epoch has {sum(cut.shares)} micro-batches. "
        f"Lower sampling.batch_size to {max(1, cut.rows // len(cut.shares))}, or sample more groups"
    )


def _small_calls(trainer: Trainer) -> Found:
    rows, size = trainer.sampling.rows_per_call, trainer.sampling.batch_size
    if rows >= size:
        return None
    return warning(
        f"sampling.rows_per_call {rows} is less than sampling.batch_size {size}: calls without gradient, which need "
        "less memory, are smaller than those with one. Raise it, unless decoding needs it so"
    )


def _learning_rate(trainer: Trainer) -> Found:
    settings, total = trainer.optimizer.settings, trainer.epochs * trainer.updates_per_epoch
    warmup, decay = settings.warmup, settings.decay
    if warmup >= total:
        return warning(
            f"optimizer.warmup {warmup} is not over when the run's {total} optimizer steps are: the learning rate "
            f"gets to {settings.learning_rate * total / warmup:.2g} of {settings.learning_rate:g}"
        )
    if decay and warmup + decay < total:
        return warning(
            f"the learning rate is 0 from optimizer step {warmup + decay} on, and the run has {total}: the rest "
            f"changes nothing. Set optimizer.decay to {total - warmup}"
        )
    if decay and warmup + decay > total:
        return warning(
            f"optimizer.decay {decay} is not over when the run's {total} optimizer steps are: the learning rate ends "
            f"at {percent(1 - (total - warmup) / decay)} of its height, not at 0. Set it to {total - warmup}"
        )
    return None


def _average(trainer: Trainer) -> Found:
    settings, total = trainer.optimizer.settings, trainer.epochs * trainer.updates_per_epoch
    if not settings.ema_decay or total >= settings.ema_every:
        return None
    return warning(
        f"the average of the weights moves every {settings.ema_every} optimizer steps and the run has {total}: "
        "evaluations and lora/ would be the model before training. Lower optimizer.ema_every, or set ema_decay to 0"
    )


def _seldom_evaluated(trainer: Trainer) -> Found:
    if trainer.evaluator.prompts is None or trainer.evaluation.every <= trainer.epochs:
        return None
    return warning(
        f"evaluation.every {trainer.evaluation.every} is more than the run's {trainer.epochs} epochs: it is evaluated "
        "before and after only, and the best policy is one of those two"
    )


def _held_out(trainer: Trainer) -> Found:
    prompts = trainer.evaluator.prompts
    if prompts is None and trainer.evaluates():
        return None
    if prompts is None:
        return warning(
            "there is no evaluation.prompts: nothing will tell whether the policy got better on prompts that it is "
            "not trained on, and the newest policy is kept, not the best"
        )
    if len(prompts) < FEW_PROMPTS:
        return warning(
            f"{len(prompts)} held-out prompts tell little: the interval of their mean is wide, and so the best policy "
            "is partly chosen by chance. Take 100 or more"
        )
    return None


def _trained_on(trainer: Trainer) -> Found:
    prompts = trainer.evaluator.prompts
    known = set(trainer.prompts.some(GLANCED_AT).text)
    both = sum(text in known for text in prompts.text) if prompts is not None else 0
    if prompts is None or not both:
        return None
    return warning(
        f"{both} of {len(prompts)} held-out prompts are trained on too{glance(trainer)}: their scores do not show "
        "what is learned in general. Take them out of one of the two sets"
    )


def _half_precision(trainer: Trainer) -> Found:
    if not trainer.model.scale_loss or trainer.model.device.type != "cpu":
        return None
    return warning(
        "mixed_precision fp16 on a CPU is slow, and some operations do not exist there. Set it to bf16, or run where "
        "there is a GPU"
    )

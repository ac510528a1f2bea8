"""What the tiny step has shown that would stop a run or spoil it. Each check answers None where all is well."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from flowalign.report.formats import duration, number
from trainers.preflight.costs import Space, Times, Trial
from trainers.preflight.problems import Found, Problem, error, warning
from trainers.preflight.trial import Learning, Rollouts

if TYPE_CHECKING:
    from trainers.base import Trainer

FEW_SAMPLES = 30  # and one group: in so few a part, a verdict on one prompt perhaps, may well not differ
SHORT = 600.0  # seconds that a kill may cost: the default of checkpoints.minutes


def of_trial(trainer: Trainer, trial: Trial) -> list[Problem]:
    """All that the rollouts, the gradient and the evaluation's call tell."""
    rollouts, learning = trial.rollouts, trial.learning
    found = [
        _invalid(trainer, rollouts),
        _constant_part(rollouts),
        _not_repeatable(rollouts),
        _metric(trainer, trial),
        _not_finite(trainer, learning),
        *trainer.preflight().of_trial(trial),
    ]
    return [problem for problem in found if problem is not None]


def of_costs(trainer: Trainer, needs: Space, times: Times) -> list[Problem]:
    """All that time and space tell."""
    found = [_memory(needs), _disk(trainer, needs), _stored(trainer, needs), _unsaved(trainer, times)]
    return [problem for problem in found if problem is not None]


def _invalid(trainer: Trainer, rollouts: Rollouts) -> Found:
    valid, count = rollouts.scores.valid, len(rollouts.scores)
    bad = int((~valid).sum())
    if not bad:
        return None
    said = f"{bad} of the first {count} samples have no valid score"
    if bad == count:
        return error(f"{said}: there is nothing to learn from. Mend the reward")
    if trainer.on_invalid == "stop":
        return error(f"{said}, and on_invalid: stop ends the run at the first one. Mend the reward, or set it to drop")
    if trainer.on_invalid == "drop_group":
        return warning(f"{said}; their whole groups are left out, as on_invalid: drop_group says")
    return warning(f"{said}; they are left out, as on_invalid: drop says. Their groups are smaller and noisier")


def _constant_part(rollouts: Rollouts) -> Found:
    scores = rollouts.scores
    known = scores.total[scores.valid]
    if len(known) < FEW_SAMPLES or not rollouts.group_ids[-1] or known.amax() == known.amin():
        return None
    found = []
    for name, column in scores.parts.items():
        values = column[scores.valid & column.isfinite()]
        if len(values) > 1 and values.amax() == values.amin():
            found.append(f"{name} ({number(float(values[0]))})")
    if not found:
        return None
    return warning(
        f"of the reward's parts {', '.join(found)} did not differ over the first {len(scores)} samples, and what does "
        "not differ teaches nothing. See whether it works"
    )


def _not_repeatable(rollouts: Rollouts) -> Found:
    if rollouts.repeatable:
        return None
    return warning(
        "the same samples got other scores the second time: the reward is not a function of pictures and prompts, or "
        "the device's arithmetic varies. A repeated or resumed run will not be the same to the last bit"
    )


def _metric(trainer: Trainer, trial: Trial) -> Found:
    name = trainer.evaluation.metric
    if trial.judging is None or name in (None, "total", *trial.judging.parts):
        return None
    return error(
        f"evaluation.metric {name!r} is no part of the evaluation's reward, which has "
        f"{', '.join(sorted(trial.judging.parts))}. The run would stop at its first evaluation"
    )


def _not_finite(trainer: Trainer, learning: Learning) -> Found:
    if not math.isfinite(learning.loss):
        return error("the first loss is not finite. Look at the scores, and train in higher precision")
    if not math.isfinite(learning.grad_norm) and not trainer.optimizer.scaling_down():
        return error("the first gradient is not finite. Train in higher precision (mixed_precision bf16 or no)")
    return None


def _memory(needs: Space) -> Found:
    if not needs.limit or needs.memory <= needs.limit:
        return None
    large = {
        "embeddings of all prompts": needs.embeddings,
        "an epoch's rollouts": needs.rollouts,
        "the step itself": needs.peak,
        "an evaluation's pictures": needs.pictures,
    }
    most = max(large, key=lambda name: large[name])
    return error(
        f"the run needs about {size(needs.memory)} of memory and there are {size(needs.limit)}; {most} take most, "
        f"{size(large[most])}. Lower sampling.batch_size, rows_per_call or groups, the number of prompts, or turn "
        "on model.gradient_checkpointing"
    )


def _disk(trainer: Trainer, needs: Space) -> Found:
    if needs.disk <= needs.free:
        return None
    return error(
        f"the run folder {trainer.folder} will take up to {size(needs.disk)} and {size(needs.free)} are free: "
        f"{trainer.checkpoints.keep + 2} checkpoints of up to {size(needs.checkpoint)}, and the evaluations' pictures. "
        "Make room, or lower checkpoints.keep"
    )


def _stored(trainer: Trainer, needs: Space) -> Found:
    if needs.stored <= needs.stored_free:
        return None
    return warning(
        f"the prompts' embeddings take {size(needs.stored)} in {trainer.model.embeddings_folder} where they are not "
        f"there yet, and {size(needs.stored_free)} are free. Make room, or keep none (model.embeddings, "
        "pairs.embeddings)"
    )


def _unsaved(trainer: Trainer, times: Times) -> Found:
    settings, evaluated = trainer.checkpoints, trainer.evaluator.prompts is not None
    if settings.every or settings.minutes:
        return None
    between = min(trainer.evaluation.every, trainer.epochs) if evaluated else trainer.epochs
    seconds = between * times.epoch
    if evaluated and seconds < SHORT:
        return None
    return warning(
        f"checkpoints.every and checkpoints.minutes are both 0: a kill costs all since the last evaluation, up to "
        f"{duration(seconds)}. Set minutes to 10"
        if evaluated
        else f"checkpoints.every and checkpoints.minutes are both 0, and nothing is evaluated: a kill costs the whole "
        f"run, {duration(seconds)}. Set minutes to 10"
    )


def size(count: float) -> str:
    """Bytes in the unit that fits, in thousands as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def spread(values: torch.Tensor) -> str:
    """Least, mean and most of what is finite."""
    known = values[values.isfinite()]
    if not len(known):
        return "none that applies"
    least, most = float(known.amin()), float(known.amax())
    if least == most:
        return f"{number(least)} throughout"
    return f"{number(least)} to {number(most)}, mean {number(float(known.mean()))}"

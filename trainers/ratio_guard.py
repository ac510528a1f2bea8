"""The first ratios: an epoch's first optimizer step has the policy that drew its samples, so all of them should be 1.

Where rollout and update do not compute the same numbers (kernels that choose by shape or by gradient, latents kept in
fewer bits than their log-probs were taken of, dropout), they are off 1 before anything has been learnt, and at a clip
range of 1e-4 most samples are clipped for it. Then the old log-probs are computed anew by the update's own calls, with
the policy as it still is: the first ratios are 1, and later ones are ratios of like to like. A healthy run makes no
call for this. GRPO-Guard's old mean stays that of the rollout: its share of a ratio is of second order.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from flowalign.distributed import rank
from flowalign.records import Step, expand_rows
from trainers.batch import Batch

if TYPE_CHECKING:
    from trainers.update import Update

RatioCheck = Literal["recompute", "tolerance", "exact", "off"]
TOLERANCE = 0.1  # of the clip range
CAUSES = "rollout and update do not compute the same numbers, as with a fused kernel, compile, dropout or low precision"


@dataclass
class RatioGuard:
    """What is done where a first ratio is too far from 1.

    check: "recompute" old log-probs where it is further than a tenth of the clip range; stop the run there
    ("tolerance"), or wherever it is not 1 ("exact"); "off" for nothing. told: this process has said so.
    """

    check: RatioCheck
    clip_range: float
    told: bool = False

    @property
    def limit(self) -> float:
        """The furthest from 1 that a first ratio may be."""
        known = {"off": math.inf, "exact": 0.0}
        return known.get(self.check, TOLERANCE * self.clip_range)

    def judge(self, gap: float) -> str:
        """What is said of ratios that are so far from 1. Raises: ValueError where the run is to stop for it."""
        found = f"the ratios of an epoch's first optimizer step are up to {gap:.2g} from 1, and may be {self.limit:.2g}"
        if self.check != "recompute":
            raise ValueError(
                f"{found} (ratio_check: {self.check}): {CAUSES}; find which, or set ratio_check: recompute"
            )
        return f"{found}: {CAUSES}; old log-probs are computed anew by the update's calls, a forward more for each step"


def recompute(update: Update, gap: float) -> None:
    """Give the update's batch, and the record it came from, old log-probs by the update's own calls.

    Raises: ValueError where the guard stops the run.
    """
    guard = update.trainer.ratio_guard
    assert guard is not None
    line = guard.judge(gap)
    if not guard.told and rank() == 0:
        print(f"flowalign: {line}", file=sys.stderr, flush=True)
        if update.keeper is not None:
            update.keeper.run.note("ratio", line)
    guard.told = True
    update.batch = _recomputed(update)
    if update.keeper is not None:
        _store(update)


def _recomputed(update: Update) -> Batch:
    """The batch with new log-probs of all that this process's calls of the epoch will read."""
    batch, model, policy = update.batch, update.trainer.model, update.trainer.policy
    steps = [[_copied(step) for step in part.steps] for part in batch.parts]
    starts = {part.bucket.rows.start: number for number, part in enumerate(batch.parts)}
    for one in (one for rows in update.parts for one in update.each(rows) if one is not None):
        part, micro = one
        with model.sized(part.size), model.meter.forgotten(), torch.enable_grad():
            for call in update.calls(part, micro):
                made = call.replay(model, policy).log_probs.detach()
                held = steps[starts[part.bucket.rows.start]][call.at]
                real = len(call.rows) * len(micro) // update.trainer.sampling.batch_size  # padding follows
                places = expand_rows(call.rows[:real], held.members).to(held.log_probs.device)
                held.log_probs[places] = made[: len(places)].to(held.log_probs.device)
    return replace(batch, steps=tuple(step for one in steps for step in one))


def _copied(step: Step) -> Step:
    return replace(step, log_probs=step.log_probs.clone())


def _store(update: Update) -> None:
    """The new log-probs in the trainer's record, whose micro-batches stand one after another in each part."""
    trainer, epoch = update.trainer, update.epoch()
    cuts, buffer = epoch.cuts(trainer.sampling.batch_size), trainer.state.buffer
    held = {part.bucket.rows.start: part for part in update.batch.parts}
    taken = dict[tuple[int, int], int]()
    for index in trainer.mine(epoch):
        start, steps = epoch.bucket_of(cuts[index]).rows.start, list[Step]()
        for at, step in enumerate(buffer[index].steps):
            first = taken.get((start, at), 0)
            taken[start, at] = first + len(step.log_probs)
            own = held[start].steps[at].log_probs[first : taken[start, at]].clone()
            steps.append(replace(step, log_probs=own))
        buffer[index] = replace(buffer[index], steps=tuple(steps))

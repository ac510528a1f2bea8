"""Which steps to explore, before training: those whose noise spreads rewards most; Talk2Move (arXiv:2601.02356).

    spread(k) = mean over groups of the std of rewards within a group,   noise in the steps k, k + 1 ... of the window
    k*        = the start of the largest spread

A group's advantages compare samples that differ by the window's noise alone, so that where rewards hardly differ there
is hardly anything to learn. The base model is measured as training would sample: each start of the window in turn, over
the same prompts and start noise, with the same tail. Talk2Move's authors compare such stds by hand, of windows that
begin at step 0 and have several lengths; here the length is the plan's, and the start is chosen.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from flowalign.distributed import on_main
from flowalign.randomness import key_generator
from flowalign.records import Scores
from flowalign.schedules import Path, Plan, Window
from flowalign.tracking import Run, write_atomically
from flowalign.windows import Jump, ShortTail, path_of
from trainers.batch import Sampling
from trainers.collection import Collection
from trainers.pre_pass import measured

if TYPE_CHECKING:
    from trainers.keeper import Keeper
    from trainers.talk2move import Talk2Move

FILE = "steps.json"  # in the run folder: what was measured of each start, and the one that is taken


@dataclass(frozen=True)
class ActiveSteps:
    """Where the window may start, and on how much it is measured.

    low, high: the window lies among the steps low ... high - 1; high None for the end of the grid. Talk2Move has the
    first half. groups: of the sampling's group_size, rolled out for each start.
    """

    low: int = 0
    high: int | None = None
    groups: int = 16

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"active.groups must be at least 1, got {self.groups}")

    def starts(self, sampling: Sampling) -> range:
        """All that are measured. Raises: ValueError where there are not two at least, or the plan has no window."""
        high = sampling.steps if self.high is None else self.high
        starts = range(self.low, high - window_of(sampling.plan).length + 1)
        if self.low < 0 or high > sampling.steps or len(starts) < 2:
            raise ValueError(
                f"active chooses among the starts of a window of {window_of(sampling.plan).length} steps in the steps "
                f"{self.low} to {high - 1} of a rollout of {sampling.steps} (0 to {sampling.steps - 1}): there must be "
                "two at least; change active.low and active.high, or the window's length, or set active to null"
            )
        return starts

    def remark(self, sampling: Sampling) -> str:
        """What is told of it when a run starts."""
        starts, rollouts = self.starts(sampling), self.groups * sampling.group_size
        return (
            f"the window's start is measured first: {len(starts)} of them, {rollouts} rollouts each, as many as "
            f"{len(starts) * self.groups / sampling.groups:.3g} epochs have; {FILE} in the run folder tells what comes "
            "of it, and the plan's own start is not used"
        )


def window_of(plan: Plan) -> Window:
    """The window of a plan, whose tail may be shortened. Raises: ValueError for a plan of another kind."""
    if isinstance(plan, Jump | ShortTail):
        return window_of(plan.plan)
    if not isinstance(plan, Window):
        raise ValueError(
            f"active moves the start of a flowalign.schedules.Window, by itself or in Jump or ShortTail, and "
            f"sampling.plan is {type(plan).__name__}: take a Window, or set active to null"
        )
    return plan


def started_at(plan: Plan, start: int) -> Plan:
    """The same plan with its window elsewhere."""
    if isinstance(plan, Jump | ShortTail):
        return replace(plan, plan=started_at(plan.plan, start))
    return replace(window_of(plan), start=start)


class ActiveCollection(Collection):
    """start: of the window, once it is known; it then stands in for the plan's own."""

    start: int | None = None

    def path(self, number: int, prompt: int = 0) -> Path:
        if self.start is None:
            return super().path(number, prompt)
        plan = started_at(self.sampling.plan, self.start)
        return path_of(plan, self.sampling.steps, number, self.seed, prompt)


def spread_of(scores: Scores, groups: int) -> dict[str, float]:
    """The mean std of the rewards within groups, its standard error over groups, and the mean reward.

    Raises: ValueError where no group has two valid scores.
    """
    total, valid = scores.total.view(groups, -1), scores.valid.view(groups, -1)
    known = [row[ok].double() for row, ok in zip(total, valid, strict=True) if ok.sum() > 1]
    if not known:
        raise ValueError(f"none of the {groups} groups has two valid scores: their spread is not known")
    stds = torch.stack([row.std() for row in known])
    error = float(stds.std()) / len(stds) ** 0.5 if len(stds) > 1 else 0.0
    return {"spread": float(stds.mean()), "error": error, "reward": float(torch.cat(known).mean())}


def choose_start(trainer: Talk2Move, settings: ActiveSteps, run: Run, keeper: Keeper) -> None:
    """Measure the starts that are not measured yet, and have the trainer's rollouts take the best; the first of equals.

    Nothing is measured once an epoch's update has begun. Raises: Stopped where a signal asked for it.
    """
    state, starts = trainer.state, settings.starts(trainer.sampling)
    known: list[dict[str, Any]] = state.noise.get("rounds", [])
    seed = int(key_generator(trainer.seed, "active_steps").integers(2**63))  # noise of its own
    sampling = replace(trainer.sampling, groups=settings.groups)
    collection = trainer.collector_of(sampling, seed)
    for number in range(len(starts) if state.epoch or state.part else len(known), len(starts)):
        collection.start = starts[number]
        scores = measured(trainer, collection, 0, keeper, f"rollouts from start {collection.start}")
        known = [*known, {"start": starts[number], **spread_of(scores, settings.groups)}]
        state.noise = {"rounds": known}
        keeper.poll("active steps", number + 1, len(starts))
    if not known:
        return
    best = max(known, key=lambda row: row["spread"])
    trainer.collection.start = best["start"]
    told = {"chosen": best["start"], "length": window_of(trainer.sampling.plan).length, "starts": known}
    on_main(lambda: write_atomically(run.folder / FILE, json.dumps(told, indent=1).encode()))
    _tell(run, best, known)


def _tell(run: Run, best: dict[str, Any], known: list[dict[str, Any]]) -> None:
    of_each = ", ".join(f"{row['start']}: {row['spread']:.4g} +- {row['error']:.2g}" for row in known)
    line = f"the window starts at step {best['start']}; spread of rewards by start: {of_each}"
    run.note("active steps", line)
    on_main(lambda: print(f"flowalign: {line}", file=sys.stderr, flush=True))

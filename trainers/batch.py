"""An epoch's samples: how they are drawn, and what an update needs of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.models.base import Model
from flowalign.randomness import key_generator
from flowalign.records import Condition, Scores, Size, Step, join_steps
from flowalign.schedules import Deterministic, Path, Plan
from trainers.state import Collected

OnInvalid = Literal["stop", "drop", "drop_group"]  # where a score is not valid


@dataclass(frozen=True)
class Sampling:
    """How an epoch's samples are drawn.

    groups: prompts in an epoch. group_size: samples of each.
    batch_size: rows of a network call that is trained on: samples, or whole groups where the plan fans a group out.
    rows_per_call: most rows of a call that is not trained on, and of a decode.
    steps, guidance_scale, plan: of the rollout.
    overlap: micro-batches that may wait for their scores while others are rolled out, 0 for none; None for as many as
        the reward says (`Reward.ahead`), which is none where it computes in this process. It changes no number.
    """

    plan: Plan = Deterministic()
    groups: int = 48
    group_size: int = 24
    batch_size: int = 8
    rows_per_call: int = 64
    steps: int = 10
    guidance_scale: float = 4.5
    overlap: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("groups", "group_size", "batch_size", "rows_per_call", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampling.{name} must be at least 1, got {getattr(self, name)}")
        if self.overlap is not None and self.overlap < 0:
            raise ValueError(f"sampling.overlap must be at least 0, got {self.overlap}")


@dataclass(frozen=True)
class Bucket:
    """Rows of an epoch, one after another, whose media have one size and whose rollouts have one path.

    path: None for that of the whole batch.
    """

    size: Size
    rows: range
    path: Path | None = None

    def among(self, rows: range) -> range:
        """Those of its rows that are among these."""
        start = max(rows.start, self.rows.start)
        return range(start, max(start, min(rows.stop, self.rows.stop)))


@dataclass(frozen=True)
class Part:
    """Rows of one bucket that one process holds, and their stochastic steps."""

    bucket: Bucket
    path: Path
    rows: Int[Tensor, " r"]
    steps: tuple[Step, ...]

    @property
    def size(self) -> Size:
        """Of its media."""
        return self.bucket.size


@dataclass(frozen=True)
class Batch:
    """What an epoch's update needs. A row is what one row of a trained network call holds: a sample, or a group.

    rows: the epoch's rows that this process holds, and steps: those rows of every stochastic step.
    All else is of the whole epoch, on every process. texts: the prompt of each row; negatives: what its unconditional
    call is told, if not what all are; images: the files that their media start from, if they do. Scores and advantages
    are per sample, samples contiguous by row; weights are 0 for samples without a valid score. buckets: the rows by
    size and path; by default all have the model's own size. The steps of one bucket follow those of another. latents:
    where this process's samples have ended, by bucket, for a trainer that keeps them.
    """

    path: Path
    rows: Int[Tensor, " r"]
    texts: tuple[str, ...]
    steps: tuple[Step, ...]
    scores: Scores
    group_ids: Int[Tensor, " b"]
    advantages: Float[Tensor, b * t]
    weights: Float[Tensor, " b"]
    negatives: tuple[str | None, ...] = ()
    buckets: tuple[Bucket, ...] = ()
    images: tuple[str, ...] = ()
    latents: tuple[Tensor, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """What this process holds, by bucket."""
        inside = [(self.rows >= one.rows.start) & (self.rows < one.rows.stop) for one in self.cut]
        held = [(one, self.rows[chosen]) for one, chosen in zip(self.cut, inside, strict=True) if chosen.any()]
        each = len(self.steps) // max(len(held), 1)  # the paths of an epoch have as many stochastic steps
        return tuple(
            Part(one, self.path_of(one), rows, self.steps[i * each : (i + 1) * each])
            for i, (one, rows) in enumerate(held)
        )

    @property
    def cut(self) -> tuple[Bucket, ...]:
        """All rows by bucket."""
        return self.buckets or (Bucket(Size(), range(len(self.texts))),)

    def path_of(self, bucket: Bucket) -> Path:
        """What the rollouts of a bucket did at each step."""
        return self.path if bucket.path is None else bucket.path

    def condition(self, model: Model, rows: Sequence[int]) -> Condition:
        """What the network is told of rows."""
        negatives = [self.negatives[row] for row in rows] if self.negatives else None
        told = model.encode([self.texts[row] for row in rows], negatives)
        return model.condition_on(told, [self.images[row] for row in rows]) if self.images else told

    @property
    def members(self) -> int:
        """Samples per row."""
        return len(self.group_ids) // len(self.texts)


def in_buckets(
    prompts: Sequence[int], sizes: Sequence[Size], paths: Sequence[Path], order: Sequence[Size], rows: int
) -> tuple[tuple[int, ...], tuple[Bucket, ...]]:
    """Prompts, those of one size and path together, and what that makes of rows.

    Args:
        prompts: of an epoch's groups. sizes, paths: of each of them.
        order: of the sizes; paths come in the order of their stochastic steps.
        rows: of each prompt.
    """
    distinct = list[Path]()
    for path in paths:
        if path not in distinct:
            distinct.append(path)
    distinct.sort(key=lambda path: path.stochastic)
    kinds = [(order.index(size), distinct.index(path)) for size, path in zip(sizes, paths, strict=True)]
    sorted_, buckets = list[int](), list[Bucket]()
    for one in sorted({*kinds}):
        start = len(sorted_)
        sorted_ += [prompt for prompt, kind in zip(prompts, kinds, strict=True) if kind == one]
        own = distinct[one[1]] if len(distinct) > 1 else None
        buckets.append(Bucket(order[one[0]], range(start * rows, len(sorted_) * rows), own))
    return tuple(sorted_), tuple(buckets)


def rows_of_step(step: Step, kept: int, rows: int) -> Step:
    """A step of the first `kept` of so many rows, with all that have come of them until then or will come of it."""
    return step.rows(torch.arange(kept * len(step.latents) // rows))


def no_steps(path: Path) -> tuple[int, ...]:
    """None: of a loss that reads no step's density."""
    return ()


def join_steps_of(parts: Sequence[Collected]) -> tuple[Step, ...]:
    """The steps of several micro-batches, rows in order; those of one size and path after another's."""

    def kinds(part: Collected) -> list[tuple[int, torch.Size]]:
        return [(step.interval.index, step.latents.shape[1:]) for step in part.steps]

    alike = [[*same] for _, same in groupby(parts, kinds)]
    return tuple(join_steps(same) for one in alike for same in zip(*(part.steps for part in one), strict=True))


def detached(scores: Scores) -> Scores:
    """The same scores on the CPU in float32, without their graph."""
    parts = {name: value.detach().float().cpu() for name, value in scores.parts.items()}
    return Scores(scores.total.detach().float().cpu(), parts, scores.valid.cpu())


def valid_rows(scores: Scores) -> Scores:
    """The valid scores only."""
    known = scores.valid
    return Scores(scores.total[known], {k: v[known] for k, v in scores.parts.items()}, scores.valid[known])


def parts_of(rows: int, steps: int, seed: int, epoch: int) -> list[Tensor]:
    """The rows of each of an epoch's optimizer steps: of so many neighbours one for each, drawn anew every epoch."""
    generator = key_generator(seed, "update_order", epoch)
    each = np.tile(np.arange(steps), (-(-rows // steps), 1))
    turns = torch.from_numpy(generator.permuted(each, axis=1).flatten())
    return [(turns[:rows] == step).nonzero().flatten() for step in range(steps)]


def means(scores: Scores) -> dict[str, float]:
    """What to log of any epoch's scores: means of the valid ones, and how many are not."""
    known = valid_rows(scores)
    return {
        "reward": known.total.mean().item(),
        "invalid": float((~scores.valid).sum()),
        **{f"reward/{name}": value.nanmean().item() for name, value in known.parts.items()},
    }


def summary(batch: Batch) -> dict[str, float]:
    """`summary_of` a batch's scores."""
    return summary_of(batch.scores, len(batch.group_ids.unique()))


def summary_of(scores: Scores, count: int) -> dict[str, float]:
    """What to log of an epoch's scores: means of the valid ones, spread within groups, groups with nothing to learn.

    Args:
        count: of groups, whose samples follow one another.
    """
    told = means(scores)
    rows = zip(scores.total.view(count, -1), scores.valid.view(count, -1), strict=True)
    groups = [total[valid] for total, valid in rows if valid.any()]
    several = [group for group in groups if len(group) > 1]
    spread = {
        "reward_std_in_group": torch.stack([group.std() for group in several]).mean().item() if several else math.nan,
        "equal_groups": sum(bool((group == group[0]).all()) for group in groups) / max(len(groups), 1),
    }
    return {"reward": told.pop("reward")} | spread | told


def score_rows(scores: Scores) -> list[dict[str, float | bool | None]]:
    """A record for each sample, for people to read: a score that could not be had, or does not apply, is None."""
    columns = {"total": scores.total, **scores.parts}
    rows: list[dict[str, float | bool | None]] = []
    for i, valid in enumerate(scores.valid.tolist()):
        values = {name: float(column[i]) for name, column in columns.items()}
        rows.append({name: value if valid and math.isfinite(value) else None for name, value in values.items()})
        rows[-1]["valid"] = valid
    return rows

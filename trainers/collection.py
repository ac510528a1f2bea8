"""An epoch's rollouts and scores, micro-batch by micro-batch; which process does which, and how they come together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.distributed import gather_text, rank, share, sum_over_ranks, world_size
from flowalign.media import real_media, shown
from flowalign.models.base import Model
from flowalign.prompts import epoch_prompts
from flowalign.randomness import key_noise, keyed_globals
from flowalign.records import Condition, Prompts, PromptSet, Scores, Size, Step, Trajectory, join_steps
from flowalign.rollout import Policy, rollout
from flowalign.schedules import Path
from rewards.base import Reward, join_scores
from trainers.batch import Bucket, Sampling, detached
from trainers.state import Collected


@dataclass(frozen=True)
class Epoch:
    """What an epoch samples, a function of the seed and its number; the same on every process.

    prompts: of each group, those with media of one size together. rows: (group, first member) of each row of a network
    call. members: samples per row. buckets: the rows by size.
    """

    number: int
    path: Path
    prompts: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    members: int
    buckets: tuple[Bucket, ...]

    def size_of(self, row: int) -> Size:
        """Of the media of a row."""
        return next(bucket.size for bucket in self.buckets if row in bucket.rows)

    def cuts(self, batch_size: int) -> list[int]:
        """The first row of each micro-batch, whose rows have one size; then the number of rows."""
        return [row for bucket in self.buckets for row in bucket.rows[::batch_size]] + [len(self.rows)]


@dataclass(frozen=True)
class Draw:
    """What rows of an epoch are drawn from.

    samples: (group, member) of each. told: what a reward is told of each of them. start: noise of each row.
    step_noise: the noise of a step, of each sample. clean: latents of each sample's real media, encoded once.
    """

    samples: tuple[tuple[int, int], ...]
    told: Prompts
    condition: Condition
    start: Float[Tensor, p * d]
    step_noise: Callable[[int], Float[Tensor, b * d]]
    clean: Callable[[], Float[Tensor, b * d]]


class Collection:
    """Makes the micro-batches of an epoch. Each is the same whichever process makes it, to the last bit."""

    keep_velocities = False  # of a rollout's stochastic steps, for `score`

    def __init__(
        self, model: Model, reward: Reward, prompts: PromptSet, sampling: Sampling, policy: Policy, seed: int
    ) -> None:
        self.model, self.reward, self.prompts = model, reward, prompts
        self.told = lru_cache(maxsize=4)(prompts.rows)  # an epoch's prompts are read once
        self.sampling, self.policy, self.seed = sampling, policy, seed
        self.sizes = {asked: model.media_size(asked) for asked in prompts.sizes()}
        self.grids, elements = dict[Size, list[float]](), dict[Size, int]()
        for size in {*self.sizes.values()}:
            with model.sized(size):
                self.grids[size], elements[size] = model.sigmas(sampling.steps), math.prod(model.latent_shape)
        self.largest = max(elements.values())  # numbers of one sample's latents
        # the largest first, so that what a run needs shows at its start
        self.order = sorted(elements, key=lambda size: (-elements[size], size.height, size.width))

    @property
    def sigmas(self) -> list[float]:
        """The grid of the rollouts; of several sizes, that of the largest."""
        return self.grids[self.order[0]]

    def epoch(self, number: int) -> Epoch:
        """What the epoch samples."""
        sampling = self.sampling
        path = self.path(number)
        chosen = epoch_prompts(len(self.prompts), sampling.groups, number, self.seed)
        members = 1 if path.branch is None else sampling.group_size
        firsts = range(0, sampling.group_size, members)
        groups, buckets = self._by_size(tuple(chosen), len(firsts))
        rows = tuple((g, m) for g in range(sampling.groups) for m in firsts)
        return Epoch(number, path, groups, rows, members, buckets)

    def path(self, number: int) -> Path:
        """What an epoch's rollouts do at each step."""
        return self.sampling.plan.resolve(self.sampling.steps, number, self.seed)

    def _by_size(self, chosen: tuple[int, ...], rows: int) -> tuple[tuple[int, ...], tuple[Bucket, ...]]:
        """Prompts, those of one size together, and what that makes of rows, so many for each of them."""
        if len(self.order) == 1:
            return chosen, (Bucket(self.order[0], range(len(chosen) * rows)),)
        asked = [self.sizes[Size.of(metadata)] for metadata in self.told(chosen).metadata]
        sorted_, buckets = list[int](), list[Bucket]()
        for size in self.order:
            start = len(sorted_)
            sorted_ += [prompt for prompt, one in zip(chosen, asked, strict=True) if one == size]
            if len(sorted_) > start:
                buckets.append(Bucket(size, range(start * rows, len(sorted_) * rows)))
        return tuple(sorted_), tuple(buckets)

    def micro_batches(self, epoch: Epoch) -> int:
        """How many the epoch has, over all processes."""
        return len(epoch.cuts(self.sampling.batch_size)) - 1

    def mine(self, epoch: Epoch, process: int | None = None) -> range:
        """Those of a process, by default of this one."""
        return share(self.micro_batches(epoch), rank() if process is None else process, world_size())

    def rows_of(self, epoch: Epoch, micro_batches: range) -> range:
        """The rows that consecutive micro-batches hold."""
        cuts = epoch.cuts(self.sampling.batch_size)
        return range(cuts[micro_batches.start], cuts[micro_batches.stop])

    def told_rows(self, epoch: Epoch, rows: Iterable[int]) -> Prompts:
        """The prompts of rows."""
        return self.told(epoch.prompts).rows([epoch.rows[row][0] for row in rows])

    def collect(self, epoch: Epoch, index: int, clean: bool = False) -> Collected:
        """One micro-batch, padded to the shape of the others so that its replay can have it too.

        Args:
            clean: keep the latents that it ends at, instead of its stochastic steps.
        """
        size = epoch.size_of(self.rows_of(epoch, range(index, index + 1)).start)
        with self.model.sized(size):
            return self._collect(epoch, index, self.grids[size], clean)

    def draw(self, epoch: Epoch, rows: Sequence[int]) -> Draw:
        """What rows of one size are drawn from, that size being the model's; a row may come more than once."""
        groups, members, shape = [epoch.rows[row] for row in rows], epoch.members, self.model.latent_shape
        samples = tuple((g, m) for g, first in groups for m in range(first, first + members))
        shared = members > 1

        def step_noise(step: int) -> Tensor:
            return self.noise(epoch, samples, "step", step)

        starts = [key_noise(self.seed, "start", epoch.number, g, -1 if shared else m, shape=shape) for g, m in groups]
        compared = tuple(group for group, _ in samples)
        told = replace(self.told(epoch.prompts).rows(compared), groups=compared)
        condition = self.model.condition(self.told_rows(epoch, rows))

        @cache
        def clean() -> Tensor:
            return self.model.encode_media(real_media(told, self.model.media_size(Size())))

        return Draw(samples, told, condition, torch.stack(starts).to(self.model.device), step_noise, clean)

    def noise(
        self, epoch: Epoch, samples: Sequence[tuple[int, int]], purpose: str, number: int
    ) -> Float[Tensor, b * d]:
        """A sample's own noise for a purpose and a number, such as that of a step."""
        shape = self.model.latent_shape
        return torch.stack([key_noise(self.seed, purpose, epoch.number, g, m, number, shape=shape) for g, m in samples])

    def _collect(self, epoch: Epoch, index: int, sigmas: list[float], clean: bool) -> Collected:
        rows, members = [*self.rows_of(epoch, range(index, index + 1))], epoch.members
        padded = rows + [rows[-1]] * (self.sampling.batch_size - len(rows))
        with self.model.meter.phase("rollout"):
            draw = self.draw(epoch, padded)
            made = rollout(
                self.model,
                draw.condition,
                draw.start,
                sigmas,
                epoch.path,
                self.policy,
                draw.step_noise,
                members,
                self.sampling.rows_per_call,
                keep_velocities=self.keep_velocities,
            )
        kept = len(rows) * members
        scores = self.score(epoch, index, draw, made, kept)
        if clean:
            return Collected((), scores, made.latents[:kept].to(self.model.steps_device))
        steps = [step.rows(torch.arange(kept // step.members)).to(self.model.steps_device) for step in made.steps]
        return Collected(tuple(steps), scores)

    def score(self, epoch: Epoch, index: int, draw: Draw, made: Trajectory, kept: int) -> Scores:
        """Of the first so many samples of a micro-batch; the others are padding."""
        pixels, told = self.decode(made.latents[:kept]), draw.told.rows(range(kept))
        with self.model.meter.phase("reward"), keyed_globals(self.seed, "reward", epoch.number, index):
            return detached(self.reward(shown(pixels, told, self.model.fps), told))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Float[Tensor, "b *frames 3 h w"]:
        """Pictures of latents, `rows_per_call` at a time."""
        with self.model.meter.phase("decode"):
            parts = latents.split(self.sampling.rows_per_call)
            for _ in parts:
                self.model.meter.count("decode")
            return torch.cat([self.model.decode(part) for part in parts])

    def needed(self, epoch: Epoch, trained: Sequence[int], reference: bool) -> Rows:
        """The fewest network rows that the epoch's rollouts and its update can do with.

        Args:
            trained: steps whose density the loss reads. reference: whether it reads the reference's too.
        """
        samples = len(epoch.rows) * epoch.members
        branch = len(epoch.path.transitions) if epoch.path.branch is None else epoch.path.branch
        total = Rows()
        for step in range(len(epoch.path.transitions)):
            calls = self.model.calls(self.policy.guidance_scale, self.sigmas[step])
            sampled = len(epoch.rows) if step <= branch else samples
            learnt = sampled if step in trained else 0
            both = calls == 2 and self.policy.unconditional_grad
            update = Rows(0, 2 * learnt) if both else Rows((calls - 1) * learnt, learnt)
            total += Rows(calls * sampled) + update + Rows(calls * learnt if reference else 0)
        return total

    def scoring_rows(self, epoch: Epoch) -> Rows:
        """The network rows that scoring the epoch's samples takes beside their rollouts."""
        return Rows()


def join_steps_of(parts: Sequence[Collected]) -> tuple[Step, ...]:
    """The steps of several micro-batches, rows in order; where sizes differ those of one size after another's."""
    alike = [[*same] for _, same in groupby(parts, lambda part: [step.latents.shape[1:] for step in part.steps])]
    return tuple(join_steps(same) for one in alike for same in zip(*(part.steps for part in one), strict=True))


def gather_scores(parts: Sequence[Scores], at: range, total: int) -> Scores:
    """The scores of all samples on every process.

    Args:
        parts: this process's, which are those of the samples `at` out of `total`.
    """
    if world_size() == 1:
        return join_scores(parts)
    held = join_scores(parts) if parts else None
    names = next(json.loads(text) for text in gather_text(json.dumps([*held.parts]) if held else "") if text)
    rows = torch.zeros(len(names) + 2, total)
    if held is not None:
        rows[:, at.start : at.stop] = torch.stack([held.total, held.valid.float(), *held.parts.values()])
    sum_over_ranks([rows])
    return Scores(rows[0], dict(zip(names, rows[2:], strict=True)), rows[1] > 0)


def gather_files(mine: Mapping[int, bytes]) -> dict[int, bytes]:
    """The files of all processes on every one, by number; no two processes have the same."""
    if world_size() == 1:
        return dict(mine)
    told = gather_text(json.dumps({number: len(content) for number, content in mine.items()}))
    sizes = {int(number): size for text in told for number, size in json.loads(text).items()}
    held = {number: torch.zeros(size, dtype=torch.uint8) for number, size in sorted(sizes.items())}
    for number, content in mine.items():
        held[number] = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
    for whole in held.values():
        sum_over_ranks([whole])
    return {number: whole.numpy().tobytes() for number, whole in held.items()}


def gather_rows(mine: Tensor | None, at: range, total: int) -> Tensor:
    """The rows of all processes on every one, 8-bit; mine are those of `at` out of `total`."""
    if world_size() == 1:
        assert mine is not None
        return mine
    shape = next(
        json.loads(text) for text in gather_text(json.dumps(mine.shape[1:]) if mine is not None else "") if text
    )
    rows = torch.zeros(total, *shape, dtype=torch.uint8)
    if mine is not None:
        rows[at.start : at.stop] = mine
    for part in rows.split(64):
        sum_over_ranks([part])
    return rows

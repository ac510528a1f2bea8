"""An epoch's rollouts and scores, micro-batch by micro-batch; which process does which, and how they come together."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.distributed import data_rank, data_size, share
from flowalign.guidance import Guide
from flowalign.media import real_media, shown
from flowalign.models.base import Model
from flowalign.prompts import epoch_prompts
from flowalign.randomness import key_noise
from flowalign.records import Condition, Prompts, PromptSet, Scores, Size, Trajectory
from flowalign.rollout import Policy, rollout
from flowalign.schedules import Path
from flowalign.windows import PromptPlan, path_of
from rewards.base import Reward
from trainers.batch import Bucket, Sampling, detached, in_buckets, rows_of_step
from trainers.overlap import Ask, Asked, Later, at_once, drawing
from trainers.state import Collected


@dataclass(frozen=True)
class Epoch:
    """What an epoch samples, a function of the seed and its number; the same on every process.

    prompts: of each group, those with media of one size and with one path together. rows: (group, first member) of each
    row of a network call. members: samples per row. buckets: the rows by size and path. path: of all of them, or where
    they have their own of the first. rounds: the first row of each round of samples, of which there is one unless
    groups are sampled again (`trainers.resampling`); all rows of a round have buckets of their own.
    """

    number: int
    path: Path
    prompts: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    members: int
    buckets: tuple[Bucket, ...]
    rounds: tuple[int, ...] = (0,)

    def size_of(self, row: int) -> Size:
        """Of the media of a row."""
        return self.bucket_of(row).size

    def bucket_of(self, row: int) -> Bucket:
        """The bucket that a row is in."""
        return next(bucket for bucket in self.buckets if row in bucket.rows)

    def path_of(self, bucket: Bucket) -> Path:
        """What the rollouts of a bucket do at each step."""
        return self.path if bucket.path is None else bucket.path

    @property
    def group_ids(self) -> Int[Tensor, " b"]:
        """The group of each sample."""
        return torch.tensor([group for group, _ in self.rows]).repeat_interleave(self.members)

    @property
    def paths(self) -> tuple[tuple[Path, int], ...]:
        """Each bucket's path, and its rows."""
        return tuple((self.path_of(bucket), len(bucket.rows)) for bucket in self.buckets)

    def cuts(self, batch_size: int) -> list[int]:
        """The first row of each micro-batch, whose rows are of one bucket; then the number of rows."""
        return [row for bucket in self.buckets for row in bucket.rows[::batch_size]] + [len(self.rows)]


@dataclass(frozen=True)
class Draw:
    """What rows of an epoch are drawn from.

    samples: (group, member) of each. told: what a reward is told of each of them. start: noise of each row.
    step_noise: the noise of a step, of each row that it leads to. clean: latents of each sample's real media, encoded
    once.
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
    keep_latents = False  # that rollouts end at, beside their stochastic steps

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
        chosen = epoch_prompts(len(self.prompts), sampling.groups, number, self.seed)
        paths = self._paths(number, chosen)
        members = paths[0].members(sampling.group_size)
        firsts = range(0, sampling.group_size, members)
        asked = [self.order[0]] * len(chosen)
        if len(self.order) > 1:
            asked = [self.sizes[Size.of(metadata)] for metadata in self.told(tuple(chosen)).metadata]
        groups, buckets = in_buckets(chosen, asked, paths, self.order, len(firsts))
        rows = tuple((g, m) for g in range(sampling.groups) for m in firsts)
        return Epoch(number, buckets[0].path or paths[0], groups, rows, members, buckets)

    def path(self, number: int, prompt: int = 0) -> Path:
        """What an epoch's rollouts of a prompt do at each step; most plans do the same for all."""
        return path_of(self.sampling.plan, self.sampling.steps, number, self.seed, prompt)

    def _paths(self, number: int, prompts: Sequence[int]) -> list[Path]:
        """That of each prompt."""
        if not isinstance(self.sampling.plan, PromptPlan):
            return [self.path(number)] * len(prompts)
        own = {prompt: self.path(number, prompt) for prompt in prompts}
        return [own[prompt] for prompt in prompts]

    def micro_batches(self, epoch: Epoch) -> int:
        """How many the epoch has, over all processes."""
        return len(epoch.cuts(self.sampling.batch_size)) - 1

    def mine(self, epoch: Epoch, process: int | None = None) -> range:
        """Those of a process, by default of this one, in an epoch of one round; processes count as `data_rank` does."""
        (only,) = self.shares(epoch, process)
        return only

    def shares(self, epoch: Epoch, process: int | None = None) -> tuple[range, ...]:
        """The micro-batches of a process, by default of this one, in each round: every round is shared out anew."""
        cuts, at = epoch.cuts(self.sampling.batch_size), data_rank() if process is None else process
        starts = [bisect_left(cuts, row) for row in (*epoch.rounds, len(epoch.rows))]
        held = [(start, share(stop - start, at, data_size())) for start, stop in pairwise(starts)]
        return tuple(range(start + part.start, start + part.stop) for start, part in held)

    def rows_of(self, epoch: Epoch, micro_batches: range) -> range:
        """The rows that consecutive micro-batches hold."""
        cuts = epoch.cuts(self.sampling.batch_size)
        return range(cuts[micro_batches.start], cuts[micro_batches.stop])

    def told_rows(self, epoch: Epoch, rows: Iterable[int]) -> Prompts:
        """The prompts of rows."""
        return self.told(epoch.prompts).rows([epoch.rows[row][0] for row in rows])

    def collect(self, epoch: Epoch, index: int, clean: bool = False) -> Collected:
        """One micro-batch, rolled out and scored; arguments are those of `begin`."""
        return self.begin(epoch, index, at_once(self.model.meter), clean)()

    def begin(self, epoch: Epoch, index: int, ask: Ask, clean: bool = False) -> Callable[[], Collected]:
        """Roll out one micro-batch, padded to the shape of the others so that its replay can have it too.

        Args:
            ask: has rewards asked, now or beside what follows; what is returned waits for their answers.
            clean: keep the latents that it ends at, instead of its stochastic steps.
        """
        bucket = epoch.bucket_of(self.rows_of(epoch, range(index, index + 1)).start)
        with self.model.sized(bucket.size):
            return self._begin(epoch, index, epoch.path_of(bucket), self.grids[bucket.size], ask, clean)

    def draw(self, epoch: Epoch, rows: Sequence[int]) -> Draw:
        """What rows of one bucket are drawn from, its size being the model's; a row may come more than once."""
        groups, members, shape = [epoch.rows[row] for row in rows], epoch.members, self.model.latent_shape
        samples = tuple((g, m) for g, first in groups for m in range(first, first + members))
        path, shared = epoch.path_of(epoch.bucket_of(rows[0])), members > 1

        def step_noise(step: int) -> Tensor:
            """Of each row that the step leads to, keyed by the first sample that comes of it."""
            return self.noise(epoch, samples[:: members // path.width(step + 1, members)], "step", step)

        size = self.sampling.group_size  # a later round of a group shares the first one's start too
        roots = [(g, -1 - m % size // members if shared else m) for g, m in groups]
        starts = [key_noise(self.seed, "start", epoch.number, *root, shape=shape) for root in roots]
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

    def _begin(
        self, epoch: Epoch, index: int, path: Path, sigmas: list[float], ask: Ask, clean: bool
    ) -> Callable[[], Collected]:
        rows, members, device = [*self.rows_of(epoch, range(index, index + 1))], epoch.members, self.model.steps_device
        padded = rows + [rows[-1]] * (self.sampling.batch_size - len(rows))
        with self.model.meter.phase("rollout"):
            draw = self.draw(epoch, padded)
            made = self.roll(epoch, index, path, draw, sigmas)
        kept = len(rows) * members
        scores = self.score(epoch, index, draw, made, kept, ask)
        steps = [] if clean else [rows_of_step(step, len(rows), len(padded)).to(device) for step in made.steps]
        ends = made.latents[:kept].to(device) if clean or self.keep_latents else None
        return lambda: Collected(tuple(steps), scores(), ends)

    def roll(self, epoch: Epoch, index: int, path: Path, draw: Draw, sigmas: list[float]) -> Trajectory:
        """The rollouts of a micro-batch, padding included."""
        return rollout(
            self.model,
            draw.condition,
            draw.start,
            path.grid(sigmas),
            path,
            self.policy,
            draw.step_noise,
            epoch.members,
            self.sampling.rows_per_call,
            keep_velocities=self.keep_velocities,
            guide=self.guide(epoch, index, path, draw),
        )

    def guide(self, epoch: Epoch, index: int, path: Path, draw: Draw) -> Guide | None:
        """What moves a micro-batch's steps on its way; nothing by default."""
        return None

    def score(self, epoch: Epoch, index: int, draw: Draw, made: Trajectory, kept: int, ask: Ask) -> Later:
        """Of the first so many samples of a micro-batch; the others are padding."""
        told = draw.told.rows(range(kept))
        return self.judged(self.reward, made.latents[:kept], told, ask, "reward", epoch.number, index)

    def judged(self, reward: Reward, latents: Tensor, told: Prompts, ask: Ask, purpose: str, *key: int) -> Later:
        """Scores of latents, decoded here and now; what the reward draws is keyed by purpose and key."""
        pixels = self.decode(latents)

        def work() -> Scores:
            with drawing(reward, self.seed, purpose, *key):
                return detached(reward(shown(pixels, told, self.model.fps), told))

        return ask(Asked.about(told, purpose, *key), work)

    def decode(self, latents: Tensor) -> Float[Tensor, "b *frames 3 h w"]:
        """Pictures of latents, `rows_per_call` at a time."""
        with self.model.meter.phase("decode"):
            return self.model.decode_rows(latents, self.sampling.rows_per_call)

    def needed(self, epoch: Epoch, trained: Callable[[Path], Sequence[int]], reference: bool) -> Rows:
        """The fewest network rows that the epoch's rollouts and its update can do with.

        Args:
            trained: the steps of a path whose density the loss reads. reference: whether it reads the reference's too.
        """
        total = Rows()
        for path, rows in epoch.paths:
            learning = trained(path)
            for step, sigma in enumerate(path.grid(self.sigmas)[:-1]):
                calls = self.model.calls(self.policy.guidance_scale, sigma)
                sampled = rows * path.width(step, epoch.members)
                learnt = sampled if step in learning else 0
                both = calls == 2 and self.policy.unconditional_grad
                update = Rows(0, 2 * learnt) if both else Rows((calls - 1) * learnt, learnt)
                total += Rows(calls * sampled) + update + Rows(calls * learnt if reference else 0)
        return total

    def scoring_rows(self, epoch: Epoch) -> Rows:
        """The network rows that scoring the epoch's samples takes beside their rollouts."""
        return Rows()

    def media(self, epoch: Epoch) -> int:
        """How many pictures or videos of the epoch are decoded and scored, by default each sample's."""
        return len(epoch.rows) * epoch.members

"""An epoch's rollouts and scores, micro-batch by micro-batch; which process does which, and how they come together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.distributed import gather_text, rank, share, sum_over_ranks, world_size
from flowalign.media import shown
from flowalign.models.base import Model
from flowalign.prompts import epoch_prompts
from flowalign.randomness import key_noise, keyed_globals
from flowalign.records import Prompts, Scores, Step, join_steps
from flowalign.rollout import Policy, rollout
from flowalign.schedules import Path
from rewards.base import Reward, join_scores
from trainers.batch import Sampling, detached
from trainers.state import Collected


@dataclass(frozen=True)
class Epoch:
    """What an epoch samples, a function of the seed and its number; the same on every process.

    rows: (group, first member) of each row of a network call. texts: its prompt. members: samples per row.
    """

    number: int
    path: Path
    prompts: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    members: int


class Collection:
    """Makes the micro-batches of an epoch. Each is the same whichever process makes it, to the last bit."""

    def __init__(
        self, model: Model, reward: Reward, prompts: Prompts, sampling: Sampling, policy: Policy, seed: int
    ) -> None:
        self.model, self.reward, self.prompts = model, reward, prompts
        self.sampling, self.policy, self.seed = sampling, policy, seed
        self.sigmas = model.sigmas(sampling.steps)

    def epoch(self, number: int) -> Epoch:
        """What the epoch samples."""
        sampling = self.sampling
        path = sampling.plan.resolve(sampling.steps, number, self.seed)
        chosen = epoch_prompts(len(self.prompts), sampling.groups, number, self.seed)
        members = 1 if path.branch is None else sampling.group_size
        firsts = range(0, sampling.group_size, members)
        return Epoch(
            number, path, tuple(chosen), tuple((g, m) for g in range(sampling.groups) for m in firsts), members
        )

    def micro_batches(self, epoch: Epoch) -> int:
        """How many the epoch has, over all processes."""
        return -(-len(epoch.rows) // self.sampling.batch_size)

    def mine(self, epoch: Epoch, process: int | None = None) -> range:
        """Those of a process, by default of this one."""
        return share(self.micro_batches(epoch), rank() if process is None else process, world_size())

    def rows_of(self, epoch: Epoch, micro_batches: range) -> range:
        """The rows that consecutive micro-batches hold."""
        size = self.sampling.batch_size
        return range(micro_batches.start * size, min(micro_batches.stop * size, len(epoch.rows)))

    def text(self, epoch: Epoch, row: int) -> str:
        """The prompt of a row."""
        return self.prompts.text[epoch.prompts[epoch.rows[row][0]]]

    def collect(self, epoch: Epoch, index: int) -> Collected:
        """One micro-batch, padded to the shape of the others so that its replay can have it too."""
        rows, members = [*self.rows_of(epoch, range(index, index + 1))], epoch.members
        padded = rows + [rows[-1]] * (self.sampling.batch_size - len(rows))
        groups = [epoch.rows[row] for row in padded]
        samples = [(g, m) for g, first in groups for m in range(first, first + members)]
        shape, shared = self.model.latent_shape, members > 1

        def step_noise(step: int) -> Tensor:
            drawn = [key_noise(self.seed, "step", epoch.number, g, m, step, shape=shape) for g, m in samples]
            return torch.stack(drawn)

        starts = [key_noise(self.seed, "start", epoch.number, g, -1 if shared else m, shape=shape) for g, m in groups]
        with self.model.meter.phase("rollout"):
            made = rollout(
                self.model,
                self.model.encode([self.text(epoch, row) for row in padded]),
                torch.stack(starts).to(self.model.device),
                self.sigmas,
                epoch.path,
                self.policy,
                step_noise,
                members,
                self.sampling.rows_per_call,
            )
        kept = len(rows) * members
        pixels = self.decode(made.latents[:kept])
        compared = tuple(group for group, _ in samples[:kept])
        told = replace(self.prompts.rows([epoch.prompts[group] for group in compared]), groups=compared)
        with self.model.meter.phase("reward"), keyed_globals(self.seed, "reward", epoch.number, index):
            scores = detached(self.reward(shown(pixels, told), told))
        steps = [step.rows(torch.arange(kept // step.members)) for step in made.steps]
        return Collected(tuple(steps), scores)

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


def join_steps_of(parts: Sequence[Collected]) -> tuple[Step, ...]:
    """The steps of several micro-batches, rows in order; none of none."""
    return tuple(join_steps(same) for same in zip(*(part.steps for part in parts), strict=True))


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

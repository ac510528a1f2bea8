"""The noise of each step by what rewards say of it, before training: DenseGRPO's algorithm 1 (arXiv:2601.20218).

    for each t, of N rollouts:   psi(t) += amount where as many gains dR_t are positive as negative, else -= amount

A balanced step can bear more noise, and explores more by it; where gains lean to one side the noise is too large. The
paper takes counts that differ by less than 2 to be balanced, whatever N is: of 24 fair coins they do in 16 % of cases
only, so that a balanced step would lose its noise, down to none, as nothing bounds psi or ends the loop. So a test of
the counts is the default here, psi stays between two multiples of where it started, and rounds are counted.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from scipy.special import bdtr
from torch import Tensor

from flowalign.distributed import on_main
from flowalign.randomness import key_generator
from flowalign.records import intervals
from flowalign.schedules import Path
from flowalign.tracking import Run, write_atomically
from flowalign.transitions import DanceSDE, FlowSDE, Memoryless, TableSDE
from trainers.batch import Sampling, valid_rows
from trainers.completed import CompletedCollection, completed_rewards_of
from trainers.pre_pass import measured

if TYPE_CHECKING:
    from trainers.dense_grpo import DenseGRPO
    from trainers.keeper import Keeper

FILE = "noise.json"  # in the run folder: the table at the start and after each round
FAMILY = (FlowSDE, DanceSDE, TableSDE, Memoryless)  # one SDE, with a g each


@runtime_checkable
class Balance(Protocol):
    """Whether so many positive and so many negative gains are taken to be in balance."""

    def __call__(self, positive: int, negative: int) -> bool: ...


@dataclass(frozen=True)
class BinomialBalance:
    """In balance unless a fair coin would lean as far with a probability below `level` only (exact, two-sided)."""

    level: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ValueError(f"BinomialBalance.level must lie between 0 and 1, got {self.level}")

    def __call__(self, positive: int, negative: int) -> bool:
        fewer, total = min(positive, negative), positive + negative
        return 2 * fewer >= total or bool(2 * bdtr(fewer, total, 0.5) >= self.level)


@dataclass(frozen=True)
class FractionBalance:
    """In balance where the counts differ by less than a fraction of their sum, whatever the number of rollouts."""

    most: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.most <= 1:
            raise ValueError(f"FractionBalance.most must lie in (0, 1], got {self.most}")

    def __call__(self, positive: int, negative: int) -> bool:
        total = positive + negative
        return total == 0 or abs(positive - negative) < self.most * total


@dataclass(frozen=True)
class CountBalance:
    """In balance where the counts differ by less than a number: the paper's rule, with its epsilon_1."""

    most: int = 2

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"CountBalance.most must be at least 1, got {self.most}")

    def __call__(self, positive: int, negative: int) -> bool:
        return abs(positive - negative) < self.most


@dataclass(frozen=True)
class Calibration:
    """How the noise is calibrated.

    rounds: how often the table is moved. groups: of the sampling's group_size, rolled out for each round.
    balance: which counts of positive and negative gains are in balance.
    amount: by which a step's g moves in a round (the paper's epsilon_2).
    tolerance: gains of at most this magnitude count as neither.
    lowest, highest: bounds of a step's g, as multiples of what it is at the start.
    """

    rounds: int = 20
    groups: int = 8
    balance: Balance = BinomialBalance()
    amount: float = 0.01
    tolerance: float = 0.0
    lowest: float = 0.2
    highest: float = 2.0

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.groups < 1 or not self.amount > 0 or self.tolerance < 0:
            raise ValueError(
                f"calibration needs at least one round and one group, a positive amount and a tolerance of at least 0; "
                f"got {self.rounds}, {self.groups}, {self.amount} and {self.tolerance}"
            )
        if not 0 < self.lowest <= 1 <= self.highest:
            raise ValueError(
                f"calibration.lowest must lie in (0, 1] and calibration.highest be at least 1: without noise a step "
                f"has no density; got {self.lowest} and {self.highest}"
            )

    def counts(self, gains: Float[Tensor, "b t"]) -> list[tuple[int, int]]:
        """Positive and negative gains of each step."""
        return [(int((step > self.tolerance).sum()), int((step < -self.tolerance).sum())) for step in gains.T]

    def moved(self, noise: float, start: float, counts: tuple[int, int]) -> float:
        """A step's g after a round."""
        after = noise + (self.amount if self.balance(*counts) else -self.amount)
        return min(max(after, self.lowest * start), self.highest * start)

    def remark(self, sampling: Sampling) -> str:
        """What is told of it when a run starts."""
        rollouts = self.rounds * self.groups * sampling.group_size
        epochs = self.rounds * self.groups / sampling.groups
        return (
            f"the noise of each step is calibrated first: {self.rounds} rounds, {rollouts} rollouts with their "
            f"completions, as many as {epochs:.3g} epochs have; {FILE} in the run folder tells what comes of it"
        )


def noise_table(path: Path, sigmas: list[float]) -> tuple[float, ...]:
    """g of every step of a grid: of a stochastic step its own rule's, of the others the first one's rule's.

    Raises: ValueError for rules that are no SDE with a g.
    """
    rules = [path.transitions[i] for i in path.stochastic]
    wrong = next((rule for rule in rules if not isinstance(rule, FAMILY)), None)
    if wrong is not None:
        raise ValueError(
            f"calibration moves the g of an SDE, and {wrong} has none: choose FlowSDE, DanceSDE, Memoryless or "
            "TableSDE, or leave calibration out"
        )
    table = []
    for interval in intervals(sigmas):
        rule = path.transitions[interval.index] if interval.index in path.stochastic else rules[0]
        _, std = rule(torch.zeros(1, 1), torch.zeros(1, 1), interval)
        table.append(std / math.sqrt(-interval.dt))
    return tuple(table)


def calibrate(trainer: DenseGRPO, settings: Calibration, run: Run, keeper: Keeper) -> None:
    """Move the trainer's table round by round, from where its record stands, and have its rollouts use it.

    The table goes by the number of a step; where media have several sizes, it starts from the grid of the largest.
    Nothing is moved once an epoch's update has begun. Raises: Stopped where a signal asked for it.
    """
    state, sampling = trainer.state, replace(trainer.sampling, groups=settings.groups)
    if not state.noise:
        start = [*noise_table(trainer.collection.epoch(0).path, trainer.sigmas)]
        state.noise = {"start": start, "table": start, "rounds": []}
    seed = int(key_generator(trainer.seed, "calibration").integers(2**63))  # noise of its own
    collection = trainer.collector_of(trainer.reward, sampling, seed, lambda path: path.stochastic)
    first = settings.rounds if state.epoch or state.part else len(state.noise["rounds"])
    for number in range(first, settings.rounds):
        collection.table = tuple(state.noise["table"])
        gains = _gains(trainer, collection, number, keeper)
        counts = dict(zip(collection.path(number).stochastic, settings.counts(gains), strict=True))
        table = [*collection.table]
        for step, each in counts.items():
            table[step] = settings.moved(table[step], state.noise["start"][step], each)
        made = {
            "steps": [*counts],
            "positive": [p for p, _ in counts.values()],
            "negative": [n for _, n in counts.values()],
        }
        state.noise = {**state.noise, "table": table, "rounds": [*state.noise["rounds"], made | {"table": table}]}
        _write(run, state.noise)
        keeper.poll("calibration", number + 1, settings.rounds)
    _write(run, state.noise)
    trainer.collection.table = tuple(state.noise["table"])


def _write(run: Run, noise: dict[str, Any]) -> None:
    on_main(lambda: write_atomically(run.folder / FILE, json.dumps(noise, indent=1).encode()))


def _gains(trainer: DenseGRPO, collection: CompletedCollection, number: int, keeper: Keeper) -> Float[Tensor, "b t"]:
    """Those of a round's valid rollouts, on every process."""
    scores = measured(trainer, collection, number, keeper, f"calibration {number + 1}, rollout")
    return completed_rewards_of(valid_rows(scores)).double().diff(dim=1)

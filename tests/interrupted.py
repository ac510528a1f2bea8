"""Runs that are killed or stopped at a chosen place, and gone on with; what they come to, made comparable."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign import checkpoint
from flowalign.interrupt import Stopped
from tests import jobs, processes
from tests.jobs import JOBS, digest, rows
from trainers import Optimizer
from trainers.collection import Collection
from trainers.forward_steps import ForwardSteps
from trainers.path_steps import PathSteps
from trainers.state import State
from trainers.update import Update

# AdamW moves a parameter whose gradient is near 0 by up to the learning rate, whatever rounding makes of its sign: so
# runs that add gradients in another order are compared at a usual learning rate.
GENTLE = Optimizer(3e-4, ema_decay=0.5, ema_every=1)

PLACES = {
    "rollout": (Collection, "begin"),
    "reward": (jobs, "redness"),
    "update": (Update, "_backward"),
    "path": (PathSteps, "_backward"),
    "step": (PathSteps, "_count_skipped"),
    "forward": (ForwardSteps, "micro_batch"),
    "forward step": (ForwardSteps, "_count_skipped"),
    "write": (checkpoint, "_write"),
    "seal": (checkpoint, "_seal"),
    "rename": (checkpoint, "_sync_folder"),
    "retire": (checkpoint, "_discard"),
}


def dying(work: Callable[[int], Any], place: str, turn: int, victim: int, number: int) -> Callable[[int], Any]:
    """The same work, in which one process is sent a signal as it comes to a place for the n-th time."""
    owner, name = PLACES[place]

    def change(rank: int = 0) -> Any:
        real, seen = getattr(owner, name), [0]

        @functools.wraps(real)
        def counted(*arguments: Any) -> Any:
            seen[0] += 1
            if seen[0] == turn and rank == victim:
                os.kill(os.getpid(), number)
            return real(*arguments)

        setattr(owner, name, counted)
        return work(rank)

    return change


def slow_but(first: Sequence[Any], cases: Iterable[Any]) -> list[Any]:
    """Cases of a test, of which all but some are slow."""
    told = ((one, one if isinstance(one, tuple) else (one,)) for one in cases)
    return [pytest.param(*values, marks=() if one in first else pytest.mark.slow) for one, values in told]


def train(folder: Path, rank: int = 0, kind: str = "flow_grpo", **changes: Any) -> None:
    JOBS[kind](folder, **changes).train(resume=True, report=False)


def unbroken_runs(folder: Path) -> Callable[..., dict[str, str]]:
    """What a run that nothing happens to comes to, by number of processes and kind of job; each is made once."""

    @functools.cache
    def of(world: int, kind: str = "flow_grpo") -> dict[str, str]:
        run = folder / f"{kind}-{world}"
        processes.run(world, folder, functools.partial(train, run, kind=kind))
        return digest(run)

    return of


def told(folder: Path, rank: int, **changes: Any) -> str:
    try:
        train(folder, **changes)
    except Stopped as stop:
        return str(stop)
    return "not stopped"


def assert_close(folder: Path, other: Path, atol: float = 1e-6) -> None:
    """Equal but for the order in which gradients were added."""
    mine, theirs = (state_of(one) for one in (folder, other))
    for name, value in theirs.policy.items():
        torch.testing.assert_close(mine.policy[name], value, atol=atol, rtol=0)
    for row, same in zip(rows(folder), rows(other), strict=True):
        assert row.keys() == same.keys()
        for name, value in same.items():
            if name.startswith("rows/"):
                continue  # padding depends on the split
            assert row[name] == pytest.approx(value, abs=1e-4, rel=1e-3), name


def state_of(folder: Path) -> State:
    path = folder / "checkpoints" / checkpoint.names(folder / "checkpoints")[-1]
    shared, own = checkpoint.load(path)
    shared.pop("facts")
    return State.from_trees(shared, own, range(99), first=True)

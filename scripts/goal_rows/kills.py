"""Runs that are killed at random, again and again, each time gone on with, and in the end held against one left alone.

A kill is SIGKILL to the run, or to one of its two processes: as it comes to a place (rollout, reward, update, and each
step of saving) for the n-th time, or at a moment of the clock. A run is killed until it has been so often enough or
ends between two kills; its policy, average, moments, logs, scores and pictures then have to be those of a run that
nothing happened to.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flowalign import checkpoint
from tests import processes
from tests.interrupted import dying, train
from tests.jobs import BY_GRADIENT, digest
from trainers.steps import OptimizerSteps

SAVING = ("write", "seal", "rename", "retire")
# by what a kind of trainer comes to; each of them is likely to be reached up to so many times before a run has ended
ONLINE = {"rollout": 12, "reward": 16, "update": 24, **dict.fromkeys(SAVING, 8)}
BY_REWARD_GRADIENT = {"path": 12, "step": 6, "reward": 16, **dict.fromkeys(SAVING, 8)}
FORWARD = {"rollout": 12, "forward": 18, "forward step": 6, **dict.fromkeys(SAVING, 8)}
KINDS = ("flow_grpo", "dense_grpo", "flow_grpo", "draft", "flow_grpo", "dpo", "flow_grpo", "nft", "flow_grpo", "tree")
A_RUN = 8  # kills at most


def places(kind: str) -> dict[str, int]:
    """Where a run can be killed, and at which turn at most."""
    if kind in BY_GRADIENT:
        return BY_REWARD_GRADIENT
    return FORWARD if kind in ("dpo", "nft") else ONLINE


def counting(work: Callable[[int], Any], made: Any) -> Callable[[int], Any]:
    """The same work, which notes how many optimizer steps it has made."""

    def change(rank: int = 0) -> Any:
        real = OptimizerSteps._count_skipped

        def counted(self: OptimizerSteps, *arguments: Any) -> None:
            state = self.trainer.state
            made.value = state.epoch * self.trainer.updates_per_epoch + state.part + 1
            real(self, *arguments)

        OptimizerSteps._count_skipped = counted  # type: ignore[method-assign]
        return work(rank)

    return change


def timed(work: Callable[[int], Any], after: float, victim: int) -> Callable[[int], Any]:
    """The same work, in which one process is killed after so many seconds."""

    def change(rank: int = 0) -> Any:
        if rank == victim:
            timer = threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        return work(rank)

    return change


def drawn(kind: str, world: int, work: Callable[[int], Any], rng: random.Random) -> tuple[str, Callable[[int], Any]]:
    """Where the next kill is to come, and the work that it comes to. One of three is by the clock."""
    victim = rng.randrange(world)
    if rng.random() < 1 / 3:
        return "clock", timed(work, rng.uniform(0.0, 2.5), victim)
    place = rng.choice([*places(kind)])
    # a place in the first steps is reached by the shortest rest of a run too
    turn = 1 + int(rng.random() ** 2 * places(kind)[place] / world)
    return place, dying(work, place, turn, victim, signal.SIGKILL)


def ended(world: int, place: Path, work: Callable[[int], Any]) -> bool:
    """Whether a run ends by itself. Raises: RuntimeError where it fails by anything but a kill."""
    if world == 1:
        code = processes.killed(work)
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"a run ended with {code}")
        return code == 0
    try:
        processes.run(world, place, work)
    except RuntimeError as error:
        if "gone" not in str(error):
            raise
        return False
    return True


def looked(folder: Path, made: int) -> tuple[list[str], int]:
    """What of a killed run's checkpoints cannot be read, and how many optimizer steps are in none."""
    if not (folder / "checkpoints").is_dir():
        return [], made
    found, problems = checkpoint.newest(folder / "checkpoints")
    if found is None:
        return problems, made
    state = checkpoint.load(found)[0]
    return problems, made - (state["epoch"] * 2 + state["part"])  # two optimizer steps an epoch


def chain(number: int, unbroken: Callable[[str, int], dict[str, str]]) -> dict[str, Any]:
    """One run, killed up to eight times; every fifth of them is of two processes.

    Args:
        unbroken: what a run of a kind and a number of processes comes to when it is left alone.
    """
    rng, kind, world = random.Random(number), KINDS[number % len(KINDS)], 2 if number % 5 == 4 else 1
    kills, unreadable, lost = [], list[str](), [0]
    made = processes.FORK.Value("i", 0)
    with TemporaryDirectory(prefix="flowalign-kills-") as held:
        folder = Path(held) / "run"
        work = counting(functools.partial(train, folder, kind=kind), made)
        for _ in range(A_RUN):
            place, fatal = drawn(kind, world, work, rng)
            if ended(world, Path(held), fatal):
                break
            kills.append(place)
            problems, missing = looked(folder, made.value)
            unreadable += problems
            lost.append(missing)
        else:
            if not ended(world, Path(held), work):
                raise RuntimeError("a run that nobody kills has not ended")
        differs = [name for name, value in unbroken(kind, world).items() if digest(folder).get(name) != value]
    return {"kind": kind, "processes": world, "kills": kills, "unreadable": unreadable, "most lost": max(lost),
            "differs": differs}  # fmt: skip


def unbroken_run(kind: str, world: int) -> dict[str, str]:
    """What a run comes to that nothing happens to."""
    with TemporaryDirectory(prefix="flowalign-kills-") as held:
        processes.run(world, Path(held), functools.partial(train, Path(held) / "run", kind=kind))
        return digest(Path(held) / "run")

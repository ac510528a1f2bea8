"""Short measurements of what no test states: seconds of a save and of a stop, gaps between worlds and ratios."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from flowalign import checkpoint, distributed
from flowalign.interrupt import Stopped
from flowalign.models.sd3 import SD3
from flowalign.records import Step
from flowalign.rollout import replay
from flowalign.schedules import AllSteps
from flowalign.transitions import FlowSDE
from tests import processes
from tests.interrupted import dying
from tests.jobs import job
from tests.test_processes import UNEVEN, policy
from tests.tiny import randomise_policy, tiny_sd3
from trainers import Evaluation, FlowGRPO, Sampling

SIZE = 64 << 20  # bytes of a LoRA and its optimizer's state
PLACES = ("rollout", "reward", "update", "write")


def save_pause(times: int) -> dict[str, Any]:
    """Seconds that a checkpoint of 64 MB stops a run for, flushed to the disk, hashed and renamed into place."""
    tree = {f"layer-{i}": torch.randn(SIZE // 16 // 4) for i in range(16)}
    spent = []
    with TemporaryDirectory(prefix="flowalign-goals-") as held:
        for number in range(times):
            name, began = f"step-{number:08d}", time.monotonic()
            checkpoint.save(Path(held), name, {"policy": tree}, {}, lambda _: None, lambda name=name: {name})
            spent.append(time.monotonic() - began)
    return {"median": statistics.median(spent), "slowest": max(spent), "times": times}


def stopping(folder: Path, where: tuple[str, int, int], number: int, rank: int) -> dict[str, Any]:
    """A run that one process is told to stop; when, and how many optimizer steps later it has saved and left."""
    trainers, seen = list[FlowGRPO](), dict[str, Any]()
    real = os.kill

    def made() -> int:
        return trainers[0].state.epoch * 2 + trainers[0].state.part

    def sent(process: int, signal_number: int) -> None:
        seen.update(at=time.monotonic(), made=made())
        real(process, signal_number)

    def work(rank: int) -> None:
        trainers.append(job(folder))
        trainers[0].train(report=False)

    os.kill = sent
    try:
        dying(work, *where, number)(rank)
    except Stopped:
        seen |= {"left": time.monotonic(), "ended": made()}
    return seen


def stops(times: int) -> dict[str, Any]:
    """Of each trial, on one and two processes: seconds and optimizer steps from a signal to all being saved."""
    rng, found = random.Random(0), []
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for trial in range(times):
        world, number = 1 + trial % 2, numbers[trial % 3]
        where = (rng.choice(PLACES), rng.randint(1, 4), rng.randrange(world))
        with TemporaryDirectory(prefix="flowalign-goals-") as held:
            work = functools.partial(stopping, Path(held) / "run", where, number)
            told = processes.run(world, Path(held), work)
        (sender,) = [one for one in told if "at" in one] or [{}]
        same = len({one.get("ended") for one in told}) == 1 and "ended" in told[0]
        row = {"signal": number.name, "processes": world, "place": where[0], "same step": same}
        if same and sender:
            row |= {"steps": sender["ended"] - sender["made"], "wait": max(one["left"] for one in told) - sender["at"]}
        found.append(row)
    return {"trials": found}


def seeing(folder: Path, rank: int) -> float:
    """In the first process, the moment at which it knows that the other one has gone."""
    try:
        dying(lambda rank: job(folder).train(report=False), "update", 3, 1, signal.SIGKILL)(rank)
    except distributed.LostProcess:
        (folder / "seen").write_text(json.dumps(time.monotonic()))
    return 0.0


def detection() -> dict[str, Any]:
    """Seconds from a process's death to the others' knowing it."""
    with TemporaryDirectory(prefix="flowalign-goals-") as held:
        real = os.kill

        def sent(process: int, number: int) -> None:
            (Path(held) / "killed").write_text(json.dumps(time.monotonic()))
            real(process, number)

        os.kill = sent
        try:
            processes.run(2, Path(held), functools.partial(seeing, Path(held) / "run"))
        except RuntimeError:
            killed, seen = (
                json.loads(path.read_text()) for path in (Path(held) / "killed", Path(held) / "run" / "seen")
            )
            return {"wait": seen - killed}
        finally:
            os.kill = real
    raise RuntimeError("no process has died")


def worlds(largest: int) -> dict[str, Any]:
    """The largest difference of any weight after six optimizer steps of the whole loop, from one process's."""
    gaps = {}
    with TemporaryDirectory(prefix="flowalign-goals-") as held:
        work = lambda world: functools.partial(policy, Path(held) / str(world), {"sampling": UNEVEN})  # noqa: E731
        (alone,) = processes.run(1, Path(held), work(1))
        for world in range(2, largest + 1):
            found = processes.run(world, Path(held), work(world))
            gaps[str(world)] = float(max(np.abs(one[name] - alone[name]).max() for one in found for name in one))
    return {"gaps": gaps}


def ratios(precision: str) -> dict[str, Any]:
    """How far ratios are from 1 at most before anything is learnt: of the rollout's calls again, and of single rows.

    Single rows of the last step, whose noise is next to nothing, are told apart: its log-probs are several times those
    of the others, and "unit" is what the last bit of the largest is worth.
    """
    model = SD3(tiny_sd3(), max_sequence_length=0, mixed_precision=precision)
    randomise_policy(model)
    with TemporaryDirectory(prefix="flowalign-goals-") as held:
        plan = AllSteps(FlowSDE(0.7))
        sampling = Sampling(plan, 4, 8, batch_size=8, rows_per_call=8, steps=6, guidance_scale=2.0)
        trainer = job(Path(held) / "run", model=model, sampling=sampling, evaluation=Evaluation())
        batch = trainer.collect(0)
        told = batch.condition(model, range(len(batch.texts)))
        (part,) = batch.parts
        gaps = {"same": 0.0, "other": 0.0, "last": 0.0}

        @torch.no_grad()
        def gap(step: Step, size: int) -> float:
            """The largest of calls of so many rows."""
            transition, furthest = part.path.transitions[step.interval.index], 0.0
            for rows in torch.arange(len(step.latents)).split(size):
                taken = step.rows(rows)
                again = replay(model, taken, transition, told.rows(rows), trainer.policy)
                furthest = max(furthest, float((again.log_probs - taken.log_probs).exp().sub(1).abs().max()))
            return furthest

        for step in part.steps:
            for name, size in (("same", 8), ("last" if step is part.steps[-1] else "other", 1)):
                gaps[name] = max(gaps[name], gap(step, size))
        largest = part.steps[-1].log_probs.abs().max()
        gaps["unit"] = float(largest.nextafter(largest.new_tensor(torch.inf)) - largest)
        trainer.ratio_guard = None  # which would make the old log-probs anew
        trainer.update(batch)
    return gaps | {"first step": trainer.state.seen[0]["ratio_max"], "clipped": trainer.state.seen[0]["clip_fraction"]}

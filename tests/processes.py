"""Several processes of one test: forked, so that nothing is imported twice, and met through a file."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import typecheck

from flowalign import distributed

FORK = multiprocessing.get_context("fork")
# seconds that processes may take; a busy machine may need more
PATIENCE = float(os.environ.get("FLOWALIGN_TEST_SECONDS", "60"))


def run(world: int, place: Path, work: Callable[[int], Any], seconds: float = PATIENCE) -> list[Any]:
    """What `work(rank)` returns on each of `world` processes.

    Raises: RuntimeError with the traceback of a process that fails, or the ranks that do not end in time.
    """
    meeting = place / f"meeting-{time.monotonic_ns()}"
    queue = FORK.Queue()
    started = [FORK.Process(target=_child, args=(rank, world, meeting, work, queue)) for rank in range(world)]
    for process in started:
        process.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + seconds
    try:
        while len(found) < world:
            gone = [rank for rank, process in enumerate(started) if rank not in found and process.exitcode]
            try:
                rank, error, value = queue.get(timeout=2.0 if gone else 0.1)
            except Empty:
                if gone or time.monotonic() > deadline:
                    raise RuntimeError(f"processes {gone or sorted({*range(world)} - {*found})} have gone") from None
                continue
            if error:
                raise RuntimeError(f"process {rank}:\n{error}")
            found[rank] = value
    finally:
        for process in started:
            process.join(timeout=10 if len(found) == world else 0.2)
            if process.is_alive():
                process.kill()
    return [found[rank] for rank in range(world)]


def killed(work: Callable[[], Any], seconds: float = PATIENCE) -> int:
    """The exit code of a process that does `work`, negative for the signal that killed it."""
    process = FORK.Process(target=_alone, args=(work,))
    process.start()
    process.join(timeout=seconds)
    if process.is_alive():
        process.kill()
        raise RuntimeError("the process did not end")
    assert process.exitcode is not None
    return process.exitcode


def _alone(work: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    typecheck.switch_off()
    work()


def _child(rank: int, world: int, meeting: Path, work: Callable[[int], Any], queue: Any) -> None:
    torch.set_num_threads(1)
    typecheck.switch_off()
    os.environ["RANK"] = str(rank)
    try:
        if world > 1:
            distributed.join(f"file://{meeting}", rank, world)
        value = work(rank)
        queue.put((rank, "", value))
        distributed.finish()
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))

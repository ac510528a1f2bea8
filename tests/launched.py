"""The command as a launcher starts it, several processes at once: forked, each with its variables and own stderr."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import typecheck

from flowalign.cli import main
from tests.processes import FORK


@dataclass(frozen=True)
class Ended:
    """How a process has ended: its exit code, or minus the signal that killed it, and what it said."""

    code: int
    said: str


def launched(
    place: Path,
    words: Sequence[str],
    change: Callable[[int], None],
    world: int = 2,
    leave: Sequence[int] = (),
    seconds: float = 60,
) -> list[Ended]:
    """`flowalign WORDS` on `world` processes.

    Args:
        change: called with the rank in each process before the command. leave: those that are killed, hanging or not,
            once all others have ended.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    files = [place / f"stderr-{rank}" for rank in range(world)]
    asked = (world, port, [*words], change)
    started = [FORK.Process(target=_child, args=(rank, files[rank], *asked)) for rank in range(world)]
    for process in started:
        process.start()
    deadline = time.monotonic() + seconds
    for rank, process in enumerate(started):
        if rank not in leave:
            process.join(timeout=max(deadline - time.monotonic(), 0.0))
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()
    codes = [process.exitcode for process in started]
    said = [file.read_text() if file.exists() else "" for file in files]
    return [Ended(-signal.SIGKILL if code is None else code, text) for code, text in zip(codes, said, strict=True)]


def _child(rank: int, file: Path, world: int, port: int, words: list[str], change: Callable[[int], None]) -> None:
    sys.stderr = file.open("w", buffering=1)  # pytest has put its own in place of the system's
    torch.set_num_threads(1)
    typecheck.switch_off()
    told = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in told.items()}
    change(rank)
    code = main(words)
    os._exit(code)  # without the parent's atexit and pytest's

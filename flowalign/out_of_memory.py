"""Running out of memory: calls whose rows do not depend on one another are made smaller, all others say what to lower.

PyTorch raises `torch.OutOfMemoryError` for a device and a plain RuntimeError for the host, numpy a MemoryError; here
they are one thing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

# what a RuntimeError of torch's says where memory ran out: on the host, on Apple's GPUs, and inside cuBLAS
SIGNS = ("DefaultCPUAllocator", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
LESS_MODEL = "model.memory (offload, quantize, vae_slicing, vae_tiling) or a smaller size of the media"
# what makes a phase smaller; a rollout's calls are not made smaller by themselves, since their replay has that shape
ADVICE = {
    "rollout": f"lower sampling.batch_size or sampling.rows_per_call, or take {LESS_MODEL}",
    "completion": f"lower sampling.rows_per_call, or take {LESS_MODEL}",
    "evaluation": f"lower sampling.rows_per_call, or take {LESS_MODEL}",
    "update": f"lower sampling.batch_size, or take model.gradient_checkpointing, {LESS_MODEL}",
    "decode": "lower sampling.batch_size, or take model.memory.vae_slicing, vae_tiling or a smaller size of the media",
    "reward": "lower sampling.batch_size (and sampling.group_size, where a reward looks at whole groups), or score on "
    "another machine (rewards.RemoteReward)",
    "checkpoint": "lower model.lora.rank, or give the process more memory",
}
OTHERWISE = f"take {LESS_MODEL}, or a machine with more memory"


class OutOfMemory(ValueError):
    """Memory ran out where nothing can be made smaller by itself; the message says what to lower."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


@contextmanager
def explained(doing: str, advice: str = OTHERWISE) -> Iterator[None]:
    """While entered, running out of memory is one line: doing what, and what to lower.

    Raises: OutOfMemory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory in {doing}: {advice}") from error


class CallSize:
    """The most rows of one kind of call: as many as are asked for, and half for good wherever memory runs out.

    Only for rows that do not depend on one another, whose results then are the same but for rounding.

    Args:
        what: names the calls, as in "decoding". advice: what to lower where a single row is too much.
    """

    def __init__(self, what: str, advice: str) -> None:
        self.what, self.advice = what, advice
        self.most: int | None = None

    def apart(self, rows: int, asked: int, call: Callable[[range], T]) -> list[T]:
        """What `call` makes of consecutive rows, `asked` at a time or as many fewer as memory allows.

        Raises: OutOfMemory where it does not allow one.
        """
        made, done, failed = list[T](), 0, 0
        while done < rows:
            size = min(asked if self.most is None else min(asked, self.most), rows - done)
            part = _tried(call, range(done, done + size))
            if part is None:
                failed = max(failed, size)
                self._halve(size)
                continue
            made += part
            done += size
        if failed:
            self._tell(failed)
        return made

    def _halve(self, size: int) -> None:
        if size == 1:
            raise OutOfMemory(f"out of memory in {self.what} a single sample: {self.advice}")
        self.most = size // 2
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _tell(self, failed: int) -> None:
        process = os.environ.get("RANK", "0")
        who = f"process {process}: " if process != "0" else ""
        print(
            f"flowalign: {who}out of memory in {self.what} {failed} samples at once: {self.most} at a time from now on",
            file=sys.stderr,
            flush=True,
        )


def _tried(call: Callable[[range], T], rows: range) -> list[T] | None:
    """What the call returns; None where memory ran out. The error, and what its frames hold, is gone by then."""
    try:
        return [call(rows)]
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    return None

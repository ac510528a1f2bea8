"""What a run costs: network rows by kind, and seconds by phase.

The rows of a network call are counted, not the calls, so that padding and repeated work show: the floor of a method is
the rows that its maths need, and all above it is waste.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from flowalign import watchdog
from flowalign.out_of_memory import ADVICE, OTHERWISE, explained


@dataclass(frozen=True)
class Rows:
    """Rows of network calls: without gradient, and with one (each of which has its backward)."""

    forward: int = 0
    gradient: int = 0

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.forward + other.forward, self.gradient + other.gradient)

    @property
    def cost(self) -> int:
        """In forwards of one row: a forward with its backward counts 3."""
        return self.forward + 3 * self.gradient


class Meter:
    """Counts rows and calls, and times phases; `seconds` of a phase leave out those of a phase inside it.

    Where CUDA is in use a phase ends by waiting for the device, so that its time is its own.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.rows = Rows()
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._forgotten = False
        self._since = time.perf_counter()

    def network(self, rows: int) -> None:
        """A network call of so many rows, with gradient if gradients are on."""
        gradient = torch.is_grad_enabled() and not self._forgotten
        self.calls["gradient" if gradient else "forward"] += 1
        self.rows += Rows(0, rows) if gradient else Rows(rows, 0)

    @contextmanager
    def forgotten(self) -> Iterator[None]:
        """While entered, calls keep nothing for a backward pass: activation checkpointing makes them again."""
        before, self._forgotten = self._forgotten, True
        try:
            yield
        finally:
            self._forgotten = before

    def count(self, kind: str) -> None:
        """A call of another kind: a backward, a decode."""
        self.calls[kind] += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """While entered, time is this phase's. Raises: OutOfMemory in place of whatever says that memory ran out."""
        self._book()
        self._open.append(name)
        try:
            with watchdog.doing(name), explained(name, ADVICE.get(name, OTHERWISE)):
                yield
        finally:
            self._book()
            self._open.pop()

    def add(self, name: str, seconds: float) -> None:
        """Seconds that something took beside the phases, in a thread of its own."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _book(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.add(name, now - self._since)
        self._since = now

    def take(self) -> tuple[Counter[str], Rows, dict[str, float]]:
        """Calls, rows and seconds since the last time, and start again; open phases stay open."""
        self._book()
        taken = self.calls, self.rows, self.seconds
        self.calls, self.rows, self.seconds = Counter(), Rows(), {}
        return taken

"""What each of several processes is doing, noted where the others can read it: so one that hangs or fails is named.

A note is one small entry in the store at which the processes have met, written when a phase begins or ends and read by
those who wait. Alone, a process notes nothing.

The first process keeps the store. Where it hangs the store does not answer, and torch sets a question no limit: one is
asked in a thread of its own, and given up in time.

Moments are seconds since the processes have met, by each one's steady clock: they all meet within a moment, while the
hosts' wall clocks may be hours apart or be set amid a run.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

WAITING = "waiting for the others"
STARTING, BETWEEN = "starting", "between two phases"
LEFT_AFTER = 0.5  # of the time that others are waited for, before a line says for whom
ANSWERED_IN = 3.0  # seconds that the store may take; on the hosts of one run it takes some milliseconds


@dataclass(frozen=True)
class Note:
    """What a process has said of itself: what it does, for how many seconds, or what it has failed with."""

    rank: int
    doing: str
    age: float
    failed: str = ""

    @property
    def where(self) -> str:
        """For one line of an error."""
        return self.doing if self.doing in (STARTING, BETWEEN) else f"in {self.doing}"


class Watchdog:
    """This process's notes, and a thread that says whom it waits for when that takes long; made once all have met.

    Args:
        store: torch's, at which the processes have met. seconds: that others are waited for, then it is an error.
    """

    def __init__(self, store: Any, rank: int, world: int, seconds: float) -> None:
        self.store, self.rank, self.world, self.seconds = store, rank, world, seconds
        self._met = time.monotonic()
        self._open = [(STARTING, self._now())]
        self._waiting: float | None = None
        self._left = threading.Event()
        self._turn = threading.Lock()  # at the store, which keeps a second thread waiting for the first one's answer
        self._thread = threading.Thread(target=self._watch, name="flowalign-watchdog", daemon=True)
        self.write()
        self._thread.start()

    def _now(self) -> float:
        return time.monotonic() - self._met

    def enter(self, doing: str) -> None:
        """A phase, or waiting, begins."""
        self._open.append((doing, self._now()))
        if doing == WAITING:
            self._waiting = time.monotonic()
        self.write()

    def leave(self) -> None:
        """It ends, well or not."""
        doing, _ = self._open.pop()
        if doing == WAITING:
            self._waiting = None
        if self._open[-1][0] in (STARTING, BETWEEN):
            self._open[-1] = (BETWEEN, self._now())

    def write(self, failed: str = "") -> None:
        """Note what this process does now, or what it has failed with."""
        doing, since = self._open[-1]
        if not self._turn.acquire(timeout=ANSWERED_IN):
            return  # a note is not worth a run: the store does not answer, and the next exchange says so
        try:
            self.store.set(f"flowalign/{self.rank}", json.dumps([doing, since, failed]))
        except RuntimeError:
            return  # it has gone
        finally:
            self._turn.release()

    def notes(self) -> list[Note] | None:
        """The others', as far as they can be read; None where the store does not answer."""
        if not self._turn.acquire(timeout=ANSWERED_IN):
            return None  # to one who has asked before
        found: list[Note] = []
        reader = threading.Thread(target=self._read, args=(found,), name="flowalign-notes", daemon=True)
        reader.start()
        reader.join(timeout=ANSWERED_IN)
        return None if reader.is_alive() and not found else [*found]

    def _read(self, found: list[Note]) -> None:
        """Notes, one by one as they are read; then the turn, which is this thread's, is over."""
        try:
            for rank in range(self.world):
                if rank != self.rank and self.store.check([f"flowalign/{rank}"]):
                    doing, since, failed = json.loads(self.store.get(f"flowalign/{rank}"))
                    found.append(Note(rank, doing, max(self._now() - since, 0.0), failed))
        except RuntimeError:
            return  # the process that keeps the store has gone
        finally:
            self._turn.release()

    def blamed(self, gone: bool) -> str:
        """Those who have failed, else those who do not wait; empty where nothing is known of any.

        Args:
            gone: a process has left, which then is one of those.
        """
        notes = self.notes()
        if notes is None:
            return f"process 0, which keeps the notes of all, does not answer; this one was {self._mine()}"
        failed = [f"process {note.rank}: {note.failed}" for note in notes if note.failed]
        busy = [note for note in notes if note.doing != WAITING]
        if failed or not busy:
            return "; ".join(failed)
        if not gone:
            return "; ".join(f"process {note.rank} has been {note.where} for {note.age:.0f} s" for note in busy)
        if len(busy) == 1:
            return f"process {busy[0].rank} has gone, {busy[0].where}"
        return "one of these has gone: " + ", ".join(f"process {note.rank} {note.where}" for note in busy)

    def _mine(self) -> str:
        """Where this process is, or was before it waited, for one line of an error."""
        doing = next(doing for doing, _ in reversed(self._open) if doing != WAITING)
        return Note(self.rank, doing, 0.0).where

    def _watch(self) -> None:
        """Once for each time that waiting takes long."""
        told: float | None = None
        while not self._left.wait(min(1.0, self.seconds / 10)):
            since = self._waiting
            if since is None or since == told or time.monotonic() - since < LEFT_AFTER * self.seconds:
                continue
            told, line = since, self.blamed(gone=False)
            if line:
                waited = time.monotonic() - since
                print(
                    f"flowalign: process {self.rank} has waited for {waited:.0f} s: {line}", file=sys.stderr, flush=True
                )

    def close(self) -> None:
        """End the thread."""
        self._left.set()
        self._thread.join(timeout=5.0)


class _Here:
    """This process's watchdog, if it is one of several."""

    present: Watchdog | None = None


def start(store: Any, rank: int, world: int, seconds: float) -> None:
    """Begin to take notes."""
    stop()
    _Here.present = Watchdog(store, rank, world, seconds)


def stop() -> None:
    """Take no more notes."""
    if _Here.present is not None:
        _Here.present.close()
    _Here.present = None


@contextmanager
def doing(phase: str) -> Iterator[None]:
    """While entered, this process is noted to be in that phase; of phases within one another in the innermost."""
    watchdog = _Here.present
    if watchdog is None:
        yield
        return
    watchdog.enter(phase)
    try:
        yield
    finally:
        watchdog.leave()
    watchdog.write()  # of an error the note stays: it has happened there


def failed(message: str) -> None:
    """Note what this process has failed with, for those who wait for it."""
    if _Here.present is not None:
        _Here.present.write(" ".join(message.split()))


def blamed(error: RuntimeError) -> str:
    """Whom an exchange has failed for, and where that one was, in one line."""
    watchdog, timed_out = _Here.present, "imed out" in str(error) or "imeout" in str(error)
    line = "" if watchdog is None else watchdog.blamed(not timed_out)
    if watchdog is None or not line:
        return "another process has gone or does not answer; its own message says why"
    if timed_out:
        return (
            f"waited for {watchdog.seconds:g} s: {line}; where it is only slow, set FLOWALIGN_TIMEOUT to more seconds"
        )
    return line

"""Stopping on a signal: the request is noted, and the loop saves and leaves at its next safe point."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
PATIENCE = 2.0  # seconds; launchers hand a terminal's Ctrl-C on, so one request may come twice


class Stopped(KeyboardInterrupt):
    """A run has stopped as a signal asked; `args[0]` says by which, what was saved, and how to go on."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGUSR1 are noted in `asked` instead of killing the process.

    A second signal, more than two seconds after the first, has its usual effect. In another thread than the main one,
    where python delivers no signals, nothing changes.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self.asked = 0
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._first = number, now
        elif now - self._first > PATIENCE:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)

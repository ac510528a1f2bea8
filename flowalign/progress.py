"""How far a run is, on the terminal or in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from flowalign.distributed import rank


class Progress:
    """How far a run is: a bar on a terminal, elsewhere a line every `interval` seconds and one at the end.

    Args:
        total: steps of the whole run.
        interval: seconds between lines where the output is no terminal.
        done: steps that an earlier part of the run has made.

    Only the first of many processes shows it.
    """

    def __init__(self, total: int, interval: float = 30.0, done: int = 0) -> None:
        self.total, self.done, self.interval = total, done, interval
        self._first, self._samples = done, 0
        self._start = time.monotonic()
        self._last_line = self._last_step = self._start
        self._said = False
        self._live = sys.stderr.isatty() and rank() == 0
        self._bar = tqdm(total=total, initial=done, disable=not self._live, unit="step", dynamic_ncols=True)

    def update(self, samples: int, metrics: Mapping[str, float | None]) -> None:
        """One step is done: it took `samples` samples, and these are the numbers to show (None is left out)."""
        self.done += 1
        self._last_step = time.monotonic()
        self._samples += samples
        shown = {name: f"{value:.3f}" for name, value in metrics.items() if value is not None}
        shown["samples/s"] = f"{self._samples / max(time.monotonic() - self._start, 1e-9):.1f}"
        if self._live:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(1)
        elif rank() == 0 and self._is_due():
            self._last_line, self._said = time.monotonic(), True
            print(self._line(shown), file=sys.stderr, flush=True)

    def _is_due(self) -> bool:
        """The first step and the last are shown at once."""
        return not self._said or self.done == self.total or time.monotonic() - self._last_line >= self.interval

    def within(self, what: str, done: int, total: int) -> None:
        """How far the step in hand is: on a terminal at once, elsewhere if it takes longer than `interval`."""
        text, now = f"{what} {done}/{total}", time.monotonic()
        if self._live:
            self._bar.set_description_str(text)
        elif rank() == 0 and now - max(self._last_line, self._last_step) >= self.interval:
            self._last_line = now
            print(f"step {self.done + 1}/{self.total}  {text}", file=sys.stderr, flush=True)

    def _line(self, shown: Mapping[str, str]) -> str:
        each = (time.monotonic() - self._start) / max(self.done - self._first, 1)
        left = tqdm.format_interval(each * (self.total - self.done))
        numbers = "  ".join(f"{name} {value}" for name, value in shown.items())
        return f"step {self.done}/{self.total}  {numbers}  {left} left"

    def close(self) -> None:
        """End the bar and leave it on the screen as it is."""
        self._bar.close()

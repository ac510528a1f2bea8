"""What a run leaves behind and shows on its way: the run folder, metrics, pictures, the progress line, trackers."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from flowalign.config import dump_yaml
from flowalign.pictures import grid

TrackerName = Literal["tensorboard", "wandb", "trackio", "swanlab"]


class Run:
    """A run folder: `config.yaml`, `metrics.jsonl` and `samples/`, written as the run goes on.

    Args:
        folder: made if it is not there. One that holds anything is refused, so that no run writes over another.
        config: the resolved config (plain data); `flowalign train` of the written file repeats the run.
        resume: go on in a folder that holds a run; a torn last line of its metrics, as a kill leaves, is dropped.
        log_with: trackers that get config and metrics too, through accelerate. None need be installed otherwise.

    Raises: ValueError for a folder in use and for a tracker that is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Mapping[str, Any] | None = None,
        *,
        resume: bool = False,
        log_with: Sequence[TrackerName] = (),
    ) -> None:
        self.folder = Path(folder)
        self._trackers = _check_trackers(log_with)
        _claim(self.folder, resume)
        self._metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._start = time.monotonic()
        if config is not None:
            write_atomically(self.folder / "config.yaml", dump_yaml(config).encode())
        self._accelerator = _start_trackers(self._trackers, self.folder, config or {})

    def log(self, step: int, metrics: Mapping[str, float | Tensor | str | None]) -> None:
        """Append one line to `metrics.jsonl`: step, seconds since the start, then the metrics in their order.

        A number that is not finite is written as null: JSON has no NaN. Flushed, so that `tail -f` shows it.
        """
        row: dict[str, float | int | str | None] = {"step": step, "seconds": round(time.monotonic() - self._start, 3)}
        row |= {name: _number(value) for name, value in metrics.items()}
        self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
        self._metrics.flush()
        if self._accelerator is not None:
            self._accelerator.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=step)

    def save_grid(self, name: str, pixels: Float[Tensor, "b 3 h w"], captions: Sequence[str] = ()) -> Path:
        """Write pictures in [0, 1], with a caption under each if given, as `samples/<name>.png`; returns the path.

        The file appears whole or not at all. Small pictures are enlarged without smoothing.
        """
        path = self.folder / "samples" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, grid(pixels, captions))
        return path

    def close(self) -> None:
        """Close the metrics file and end the trackers; a second call does nothing."""
        self._metrics.close()
        if self._accelerator is not None:
            self._accelerator.end_training()
            self._accelerator = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Progress:
    """How far a run is: a bar on a terminal, elsewhere a line every `interval` seconds and one at the end.

    Args:
        total: steps of the whole run.
        interval: seconds between lines where the output is no terminal.
        done: steps that an earlier part of the run has made.
    """

    def __init__(self, total: int, interval: float = 30.0, done: int = 0) -> None:
        self.total, self.done, self.interval = total, done, interval
        self._first, self._samples = done, 0
        self._start = time.monotonic()
        self._last_line = self._start - interval  # the first step is shown at once
        self._live = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, disable=not self._live, unit="step", dynamic_ncols=True)

    def update(self, samples: int, metrics: Mapping[str, float | None]) -> None:
        """One step is done: it took `samples` samples, and these are the numbers to show (None is left out)."""
        self.done += 1
        self._samples += samples
        shown = {name: f"{value:.3f}" for name, value in metrics.items() if value is not None}
        shown["samples/s"] = f"{self._samples / max(time.monotonic() - self._start, 1e-9):.1f}"
        if self._live:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(1)
        elif time.monotonic() - self._last_line >= self.interval or self.done == self.total:
            self._last_line = time.monotonic()
            print(self._line(shown), file=sys.stderr, flush=True)

    def _line(self, shown: Mapping[str, str]) -> str:
        each = (time.monotonic() - self._start) / max(self.done - self._first, 1)
        left = tqdm.format_interval(each * (self.total - self.done))
        numbers = "  ".join(f"{name} {value}" for name, value in shown.items())
        return f"step {self.done}/{self.total}  {numbers}  {left} left"

    def close(self) -> None:
        """End the bar and leave it on the screen as it is."""
        self._bar.close()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a kill, finds the old content or the new one, and nothing in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _claim(folder: Path, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name another folder for the run")
    if folder.exists() and any(folder.iterdir()) and not resume:
        what = "holds a run already" if (folder / "metrics.jsonl").exists() else "is not empty"
        raise ValueError(f"{folder} {what}; name another folder, or move this one away")
    folder.mkdir(parents=True, exist_ok=True)
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        content = metrics.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            write_atomically(metrics, content[:whole])


def _number(value: float | Tensor | str | None) -> float | int | str | None:
    if isinstance(value, Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_trackers(log_with: Sequence[TrackerName]) -> list[str]:
    if not log_with:
        return []
    from accelerate.tracking import get_available_trackers

    installed = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    missing = [name for name in log_with if name not in installed]
    if missing:  # accelerate itself leaves these out without a word
        raise ValueError(f"log_with: {', '.join(missing)} is not installed; pip install {' '.join(missing)}")
    return list(log_with)


def _start_trackers(names: list[str], folder: Path, config: Mapping[str, Any]) -> Any:
    if not names:
        return None
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=names, project_dir=str(folder / "trackers"))
    accelerator.init_trackers("flowalign", config=dict(_flat(config)))
    return accelerator


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str | int | float | bool]]:
    """Dotted keys to scalars: TensorBoard's hyperparameters take nothing else."""
    rows: list[tuple[str, str | int | float | bool]] = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append(
                (f"{prefix}{name}", value if isinstance(value, bool | int | float | str) else json.dumps(value))
            )
    return rows

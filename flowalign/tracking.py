"""What a run leaves behind: the run folder, its logs and pictures, and what trackers get."""

from __future__ import annotations

import json
import math
import os
import platform
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign import __version__
from flowalign.config import dump_yaml
from flowalign.distributed import on_main, rank, world_size
from flowalign.pictures import grid

if sys.platform != "win32":
    import fcntl

TrackerName = Literal["tensorboard", "wandb", "trackio", "swanlab"]


LOGS = ("metrics.jsonl", "histograms.jsonl")


class Run:
    """A run folder: `config.yaml`, `metrics.jsonl`, `samples/` and the like, written as the run goes on.

    With many processes the first one writes and the others pass by.

    Args:
        folder: made if it is not there. One that holds anything but a run is refused.
        config: the resolved config (plain data); `flowalign train` of the written file repeats the run.
        resume: go on in a folder that holds a run.
        log_with: trackers that get config and metrics too, through accelerate. None need be installed otherwise.

    Raises: ValueError for a folder in use and for a tracker that is not installed; OSError for one not writable.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Mapping[str, Any] | None = None,
        *,
        resume: bool = False,
        log_with: Sequence[TrackerName] = (),
    ) -> None:
        self.folder, self.main = Path(folder), rank() == 0
        self._trackers = _check_trackers(log_with) if self.main else []
        self._logs: dict[str, TextIO] = {}
        self._lock: TextIO | None = None
        self._start, self._accelerator = time.monotonic(), None
        on_main(lambda: self._open(config, resume))

    def _open(self, config: Mapping[str, Any] | None, resume: bool) -> None:
        _claim(self.folder, resume)
        self._lock = _lock(self.folder)
        for path in [*self.folder.glob(".*.tmp"), *self.folder.glob("*/.*.tmp")]:
            path.unlink()  # what a kill has left half-written
        for name in LOGS:
            self._logs[name] = (self.folder / name).open("a", encoding="utf-8")
        self._note_environment()
        if config is not None:
            self.configure(config)

    def _note_environment(self) -> None:
        """Write down what a result depends on besides the config; of a run that goes on, tell what has changed."""
        path, present = self.folder / "environment.json", environment()
        for line in drift(path, present):
            self.note("environment", line)
            print(f"flowalign: {line}", file=sys.stderr, flush=True)
        write_atomically(path, json.dumps(present, indent=1).encode())

    def configure(self, config: Mapping[str, Any]) -> None:
        """Write the config and hand it to the trackers."""
        if self.main:
            write_atomically(self.folder / "config.yaml", dump_yaml(config).encode())
            self._accelerator = _start_trackers(self._trackers, self.folder, config)

    @property
    def seconds(self) -> float:
        """Since the start of the run, its earlier parts included."""
        return time.monotonic() - self._start

    def log(self, step: int, metrics: Mapping[str, float | Tensor | str | None]) -> None:
        """Append one line to `metrics.jsonl`: step, seconds since the start, then the metrics in their order.

        A number that is not finite is written as null: JSON has no NaN. Flushed, so that `tail -f` shows it.
        """
        row: dict[str, float | int | str | None] = {"step": step, "seconds": round(self.seconds, 3)}
        row |= {name: _number(value) for name, value in metrics.items()}
        self._append("metrics.jsonl", row)
        if self._accelerator is not None:
            self._accelerator.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=step)

    def log_histogram(self, step: int, name: str, low: float, high: float, counts: Sequence[int]) -> None:
        """Append one line to `histograms.jsonl`: counts in equal bins of [low, high], what lies outside in the ends."""
        row = {"step": step, "name": name, "low": low, "high": high, "counts": list(counts)}
        self._append("histograms.jsonl", row)

    def note(self, event: str, detail: str) -> None:
        """Append what happened to `events.jsonl`, which is no result: a repeated run has other events."""
        if self.main:
            row = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, "detail": detail}
            with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if self.main:
            self._logs[name].write(json.dumps(row, allow_nan=False) + "\n")
            self._logs[name].flush()

    def written(self) -> dict[str, int]:
        """The sizes of the logs, in bytes, once they are on the disk."""
        for file in self._logs.values():
            os.fsync(file.fileno())
        return {name: (self.folder / name).stat().st_size for name in self._logs}

    def rewind(self, written: Mapping[str, int], seconds: float) -> None:
        """Drop what the logs have got since they had these sizes, and let the clock go on from `seconds`."""
        self._start = time.monotonic() - seconds
        for name, file in self._logs.items():
            file.truncate(min(written.get(name, 0), (self.folder / name).stat().st_size))

    def save_grid(
        self,
        name: str,
        pixels: Float[Tensor, "b 3 h w"] | Sequence[Float[Tensor, "3 _ _"]],
        captions: Sequence[str] = (),
        columns: int = 0,
    ) -> Path:
        """Write pictures in [0, 1], with a caption under each if given, as `samples/<name>.png`; returns the path.

        The file appears whole or not at all. Small pictures are enlarged without smoothing.
        """
        path = self.folder / "samples" / f"{name}.png"
        if self.main:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, grid(pixels, captions, columns))
        return path

    def close(self) -> None:
        """Close the logs, end the trackers and let the folder go; a second call does nothing."""
        held, self._logs, self._lock = [*self._logs.values(), self._lock], {}, None
        for file in held:
            with suppress(OSError):  # what was logged is on the disk or, as on a full one, has been complained about
                if file is not None:
                    file.close()
        if self._accelerator is not None:
            self._accelerator.end_training()
            self._accelerator = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def environment() -> dict[str, Any]:
    """What a result may depend on besides the config."""
    names = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy")
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "flowalign": __version__,
        **{name: version(name) for name in names},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else ["cpu"],
    }


def drift(path: Path, present: Mapping[str, Any]) -> list[str]:
    """A line where a run was made with other libraries, or on another machine, than it is to go on with; else none."""
    if not path.is_file():
        return []
    try:
        known = json.loads(path.read_bytes())
        other = [f"{name} {known[name]} then, {present[name]} now" for name in known if known[name] != present[name]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return [f"{path} cannot be read: whether the run goes on with what it was made with is not known"]
    if not other:
        return []
    return [f"the run goes on with something else than it was made with, so not to the last bit: {'; '.join(other)}"]


def json_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """One JSON object a line; what JSON cannot hold is written as text."""
    return "".join(json.dumps(row, default=str, allow_nan=False) + "\n" for row in rows).encode()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a kill, finds the old content or the new one, and nothing in between.

    Several processes may write the same one at once, of several machines too: one of them is last, and whole.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(folder: Path, resume: bool = True) -> None:
    """Whether a run could be written there, found out without writing.

    Raises: ValueError for a file, for a folder that holds something else (or, without `resume`, a run); PermissionError
    where nothing may be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name another folder for the run")
    if folder.exists() and any(path.name != ".lock" for path in folder.iterdir()):
        if not (folder / "metrics.jsonl").exists():
            raise ValueError(f"{folder} is not empty and holds no run; name another folder, or move this one away")
        if not resume:
            raise ValueError(f"{folder} holds a run already; name another folder, or move this one away")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written: {there} is read-only or no folder; name another folder")


def _claim(folder: Path, resume: bool) -> None:
    check_folder(folder, resume)
    folder.mkdir(parents=True, exist_ok=True)


def _lock(folder: Path) -> TextIO:
    """Hold the folder for this process; the system lets go of it when the process ends, however it does."""
    file = (folder / ".lock").open("a+", encoding="utf-8")
    if sys.platform == "win32":
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ValueError(f"{folder} is in use by a run that is going on ({holder}); name another folder") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


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

"""A run folder as data: everything that the report shows, except pictures, which stay on the disk until needed.

Only `metrics.jsonl` has to be there. A killed run may leave the last line of a file torn: that line is left out. Any
other broken line is an error, because a report that silently skips lines shows a run that never was.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flowalign.config import load_yaml

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One line of `metrics.jsonl`: epochs done, seconds since the run's start, and numbers; nan for null."""

    step: int
    seconds: float
    values: Mapping[str, float]

    def get(self, name: str) -> float:
        """The number of that name, nan where there is none."""
        return self.values.get(name, math.nan)


@dataclass(frozen=True)
class Histogram:
    """Counts in equal bins of [low, high] after so many epochs; what lies outside is in the bins at the ends."""

    step: int
    name: str
    low: float
    high: float
    counts: tuple[float, ...]


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt; kind and unseen are None where its metadata do not tell."""

    text: str
    kind: str | None = None
    unseen: bool | None = None


@dataclass(frozen=True)
class Event:
    """Something that happened to the run: start, resume, stop, skip, finish."""

    time: str
    name: str
    detail: str


# Scores of every held-out prompt, by name; {} where the score is not valid, and a name is left out where it is null.
PromptScores = tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds. What is missing is empty, or None.

    epochs, evaluations: the rows of `metrics.jsonl`, each by rising step. scored: scores per held-out prompt, by epoch.
    sheets: contact sheets by epoch.
    """

    folder: Path
    config: Mapping[str, Any]
    config_text: str
    epochs: tuple[Row, ...]
    evaluations: tuple[Row, ...]
    histograms: tuple[Histogram, ...]
    prompts: tuple[Prompt, ...]
    scored: Mapping[int, PromptScores]
    best: int | None
    environment: Mapping[str, Any]
    events: tuple[Event, ...]
    sheets: tuple[tuple[int, Path], ...]

    def setting(self, *keys: str) -> Any:
        """A value of the config, None where it or the config is missing."""
        found: Any = self.config
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def number(self, *keys: str) -> int | None:
        """A whole number of the config."""
        found = self.setting(*keys)
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    @property
    def done(self) -> int:
        """Epochs done."""
        return self.epochs[-1].step if self.epochs else 0

    @property
    def seconds(self) -> float:
        """From the start to the last line written, over all restarts."""
        return max(row.seconds for row in self.epochs + self.evaluations)

    @property
    def metric(self) -> str:
        """The score that decides which policy is best: the config's, else the part whose mean the rows repeat."""
        named = self.setting("evaluation", "metric")
        if isinstance(named, str) or self.config or not self.evaluations:
            return named if isinstance(named, str) else "total"
        last = self.evaluations[-1]
        parts = [
            name for name in last.values if last.get(name) == last.get("held-out") and name.startswith("held-out/")
        ]
        bounds = ("held-out/total", "held-out/low", "held-out/high")
        return next((name.removeprefix("held-out/") for name in parts if name not in bounds), "total")

    def zip_of(self, epoch: int) -> Path:
        """Where the pictures of an evaluation are, if they were kept."""
        return self.folder / "evaluations" / f"epoch-{epoch:06d}.zip"


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises: ValueError where there is no `metrics.jsonl` or no line in it, and for a broken line or file, by its name.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"{folder} has no metrics.jsonl; name the folder of a run")
    rows = _parsed(metrics, _row)
    if not rows:
        raise ValueError(f"{metrics} has no whole line yet; wait for the run's first")
    config = folder / "config.yaml"
    prompts = tuple(_parsed(folder / "evaluations" / "prompts.jsonl", _prompt))
    evaluations = tuple(row for row in rows if "held-out" in row.values)
    return RunRecord(
        folder=folder,
        config=load_yaml(config) if config.is_file() else {},
        config_text=config.read_text(encoding="utf-8-sig") if config.is_file() else "",
        epochs=_last_of_each_step([row for row in rows if "held-out" not in row.values]),
        evaluations=_last_of_each_step(list(evaluations)),
        histograms=tuple(_parsed(folder / "histograms.jsonl", _histogram)),
        prompts=prompts,
        scored=_scored(folder / "evaluations", len(prompts)),
        best=_best(folder / "best.json", evaluations),
        environment=_object(folder / "environment.json"),
        events=tuple(_parsed(folder / "events.jsonl", _event)),
        sheets=_numbered(folder / "samples", "png"),
    )


def _parsed(path: Path, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    """Every line of a file of JSON objects, parsed; none where the file is missing."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            if not isinstance(data, dict):
                raise TypeError(f"expected a JSON object, got {type(data).__name__}")
            found.append(parse(data))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            if number == len(lines):  # no newline after it: the run was killed while it wrote
                break
            raise ValueError(f"{path}:{number}: this line is broken ({type(error).__name__}: {error})") from error
    return found


def _object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}:1: this file is broken ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}:1: expected a JSON object, got {type(data).__name__}")
    return data


def _row(data: dict[str, Any]) -> Row:
    values = {name: _float(value) for name, value in data.items() if not isinstance(value, str)}
    return Row(int(data["step"]), values.pop("seconds"), {name: v for name, v in values.items() if name != "step"})


def _prompt(data: dict[str, Any]) -> Prompt:
    kind, unseen = data.get("kind"), data.get("unseen")
    return Prompt(
        str(data["prompt"]), None if kind is None else str(kind), unseen if isinstance(unseen, bool) else None
    )


def _scores(data: dict[str, Any]) -> dict[str, float]:
    if not data.get("valid", True):
        return {}
    numbers = {name: _float(value) for name, value in data.items() if name != "valid" and not isinstance(value, str)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _histogram(data: dict[str, Any]) -> Histogram:
    low, high, counts = _float(data["low"]), _float(data["high"]), tuple(_float(n) for n in data["counts"])
    if not (low < high and counts):
        raise ValueError(f"a histogram needs bins between two numbers, got {len(counts)} in [{low}, {high}]")
    return Histogram(int(data["step"]), str(data["name"]), low, high, counts)


def _event(data: dict[str, Any]) -> Event:
    return Event(str(data.get("time", "")), str(data["event"]), str(data.get("detail", "")))


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _last_of_each_step(rows: list[Row]) -> tuple[Row, ...]:
    """A run that was killed and resumed may have made an epoch twice: the later row is the one that counts."""
    latest = {row.step: row for row in rows}
    return tuple(latest[step] for step in sorted(latest))


def _numbered(folder: Path, suffix: str) -> tuple[tuple[int, Path], ...]:
    """The files epoch-000034.<suffix>, by epoch."""
    found = folder.glob(f"epoch-*.{suffix}") if folder.is_dir() else ()
    named = [(re.fullmatch(r"epoch-(\d+)", path.stem), path) for path in found]
    return tuple(sorted((int(match[1]), path) for match, path in named if match))


def _scored(folder: Path, prompts: int) -> dict[int, PromptScores]:
    """The evaluations that have a line for every prompt; one that a kill cut short is left out."""
    read = {epoch: tuple(_parsed(path, _scores)) for epoch, path in _numbered(folder, "jsonl")}
    wanted = prompts or max((len(scores) for scores in read.values()), default=0)
    return {epoch: scores for epoch, scores in read.items() if scores and len(scores) == wanted}


def _best(path: Path, evaluations: tuple[Row, ...]) -> int | None:
    """The epoch of the best policy; the first of the highest, as training itself picks it, where no file says so."""
    named = _object(path).get("epoch")
    if isinstance(named, int):
        return named
    known = [row for row in evaluations if math.isfinite(row.get("held-out"))]
    return max(known, key=lambda row: (row.get("held-out"), -row.step)).step if known else None

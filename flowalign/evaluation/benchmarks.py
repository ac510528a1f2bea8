"""What a benchmark is: prompts with their categories, what scores them, and how scores become its number.

A number is a mean over prompts, or as some benchmarks publish it the mean over categories of the means within each,
so that a category counts the same however many prompts it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from flowalign.config import Elsewhere, Recipe
from flowalign.prompts import PromptData, as_prompts
from flowalign.records import Prompts
from flowalign.shapes import prompts as shapes_prompts
from flowalign.shapes.scenes import KINDS
from flowalign.shapes.video import prompts as video_prompts
from flowalign.shapes.video.scenes import KINDS as VIDEO_KINDS
from rewards.base import Reward

Kind = Literal["image", "video"]
# a reward's config, or none: it is made when it is needed
Scored = Annotated[Any, Elsewhere(Reward | Callable[..., Any] | str | None)]
Labels = tuple[str, ...]  # one for each prompt, "" where a prompt has none


@dataclass(frozen=True)
class Scorer:
    """One number of a benchmark.

    reward: a reward's config, as YAML has it. part: of its scores that is meant; None for the total.
    per: the breakdown over whose categories the number is a mean; None for the mean over prompts.
    only: (breakdown, label) of the prompts that it is for; None for all.
    """

    name: str
    reward: Any
    part: str | None = None
    per: str | None = None
    only: tuple[str, str] | None = None


@dataclass(frozen=True)
class Set:
    """A benchmark's prompts. labels: for each breakdown (kind, style, dimension) that of every prompt."""

    prompts: Prompts
    labels: Mapping[str, Labels]

    def first(self, limit: int | None) -> Set:
        """All, or at most so many spread evenly; noise stays that of a prompt's place among all."""
        numbered = [row if "seed" in row else {**row, "seed": i} for i, row in enumerate(self.prompts.metadata)]
        whole = replace(self, prompts=replace(self.prompts, metadata=tuple(numbered)))
        if limit is None or limit >= len(self.prompts):
            return whole
        chosen = [i * len(self.prompts) // limit for i in range(limit)]
        labels = {name: tuple(told[i] for i in chosen) for name, told in self.labels.items()}
        return Set(whole.prompts.rows(chosen), labels)


class Benchmark(ABC):
    """Prompts, and what makes a number of the media that models draw for them.

    kind: of the media. samples: how many a prompt the published protocol draws, where it says so. note: what a reader
    of the numbers has to know, foremost where they differ from the published ones; one line.
    """

    kind: Kind = "image"
    samples: int = 1
    note: str = ""
    limit: int | None = None

    def load(self) -> Set:
        """The prompts, at most `limit` of them. Raises: ValueError where they cannot be had, or read."""
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        return self.read().first(self.limit)

    @abstractmethod
    def read(self) -> Set:
        """All prompts with their categories."""

    @abstractmethod
    def scorers(self) -> tuple[Scorer, ...]:
        """Its numbers, the first of which is its headline; none where the sweep's metrics are all there is."""


def recipe(reward: Any) -> Any:
    """The plain config of a reward that a file has named."""
    return reward.config if isinstance(reward, Recipe) else reward


@dataclass(frozen=True)
class Shapes(Benchmark):
    """The embedded world of pictures: the share of held-out prompts whose picture shows all that they ask for.

    The verifier reads pixels; categories are kinds of prompts, and clauses of all kinds.

    count, seed, kinds: of the held-out prompts, as in `flowalign.shapes.held_out_prompts`.
    """

    count: int = 128
    seed: int = 0
    kinds: tuple[str, ...] = KINDS
    limit: int | None = None
    note = "shapes: the embedded world; accuracy is the share of prompts of which every clause holds, read from pixels"

    def read(self) -> Set:
        check_asked(self.count, self.kinds, KINDS)
        return _world(shapes_prompts.held_out_prompts(self.count, self.seed, self.kinds))

    def scorers(self) -> tuple[Scorer, ...]:
        return (Scorer("accuracy", {"class": "rewards.ShapesVerifier"}, "strict"),)


@dataclass(frozen=True)
class ShapesVideo(Benchmark):
    """The same of the embedded world of videos, whose shapes move."""

    count: int = 128
    seed: int = 0
    kinds: tuple[str, ...] = VIDEO_KINDS
    limit: int | None = None
    kind = "video"
    note = "shapes-video: the embedded world of videos; accuracy as of shapes"

    def read(self) -> Set:
        check_asked(self.count, self.kinds, VIDEO_KINDS)
        return _world(video_prompts.held_out_prompts(self.count, self.seed, self.kinds))

    def scorers(self) -> tuple[Scorer, ...]:
        return (Scorer("accuracy", {"class": "rewards.ShapesVideoVerifier"}, "strict"),)


def check_asked(count: int, kinds: Sequence[str], known: Sequence[str]) -> None:
    """Raises: ValueError for prompts of the embedded worlds that cannot be drawn."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if not kinds or not {*kinds} <= {*known}:
        raise ValueError(f"kinds must be some of {', '.join(known)}, got {', '.join(kinds) or 'none'}")


def _world(prompts: Prompts) -> Set:
    kinds = tuple(str(row["kind"]) for row in prompts.metadata)
    novel = tuple("unseen in training" if row["unseen"] else "seen in training" for row in prompts.metadata)
    return Set(prompts, {"kind": kinds, "composition": novel})


@dataclass(frozen=True)
class PromptBenchmark(Benchmark):
    """Prompts of your own.

    prompts: as anywhere: a file, a list, a dataset of the hub ({class: flowalign.prompts.HubPrompts, ...}).
    reward: what scores them; None where the sweep's metrics do. part: of its scores; None for the total.
    category: the key of the prompts' records that names their category. per_category: the number is the mean over
    categories. video: the prompts are for videos.
    """

    prompts: PromptData
    reward: Scored = None
    part: str | None = None
    category: str | None = None
    per_category: bool = False
    video: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.per_category and self.category is None:
            raise ValueError("per_category needs the category: the key of the prompts' records that names it")
        object.__setattr__(self, "kind", "video" if self.video else "image")

    def read(self) -> Set:
        prompts = as_prompts(self.prompts).all()
        return Set(prompts, {} if self.category is None else {self.category: labelled(prompts, self.category)})

    def scorers(self) -> tuple[Scorer, ...]:
        per = self.category if self.per_category else None
        return () if self.reward is None else (Scorer(self.part or "score", recipe(self.reward), self.part, per),)


def labelled(prompts: Prompts, key: str) -> Labels:
    """What each prompt's record says under a key. Raises: ValueError for one that says nothing."""
    for text, row in zip(prompts.text, prompts.metadata, strict=True):
        if row.get(key) is None:
            raise ValueError(f"the prompt {text!r} has no category: its record has no {key!r}")
    return tuple(str(row[key]) for row in prompts.metadata)


def texts(rows: Sequence[tuple[str, Mapping[str, Any]]], where: Path | str) -> Prompts:
    """Prompts of texts with their records. Raises: ValueError for none, or an empty one."""
    if not rows:
        raise ValueError(f"{where} holds no prompts")
    return as_prompts(Prompts(tuple(text for text, _ in rows), tuple(dict(row) for _, row in rows))).all()

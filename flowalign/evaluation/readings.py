"""What is read off drawn media: rewards, judges between two arms, diversity, distances to reference pictures.

Each reading is a list of jobs, whose results are kept by what they are made of; a network is loaded when the first job
is missing, and let go of after the last.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.config import build
from flowalign.evaluation.cells import Column, Kept, Store, column, score_key
from flowalign.evaluation.drawing import Unit
from flowalign.evaluation.facts import key_of
from flowalign.media import shown
from flowalign.randomness import keyed_globals
from flowalign.records import Prompts
from rewards.algebra import running_normalisers
from rewards.base import Reward, as_reward
from rewards.sets import Embedder, ReferenceSet

PIXELS = "pixels"


@dataclass(frozen=True)
class Job:
    """Something to be read, of one call or of several that belong together. key: of its result."""

    key: str
    units: tuple[Unit, ...]


class Reading(ABC):
    """One of them. name: in tables. benchmark: of whose media. facts: what of it makes another result."""

    def __init__(
        self, name: str, benchmark: str, prompts: Prompts, config: Any, facts: Any, allow_code: bool, store: Store
    ) -> None:
        self.name, self.benchmark, self.prompts = name, benchmark, prompts
        self.config, self.facts, self.allow_code, self.store = config, facts, allow_code, store

    @abstractmethod
    def load(self) -> Any:
        """What reads: a network; the same for all readings with equal facts."""

    @abstractmethod
    def jobs(self, units: Sequence[Unit], kept: Mapping[str, Kept]) -> list[Job]:
        """All of them."""

    @abstractmethod
    def read(self, loaded: Any, job: Job, kept: Mapping[str, Kept]) -> Column:
        """The result of one, a value for each row of its first unit unless the reading says otherwise."""

    def _told(self, unit: Unit) -> Prompts:
        return self.prompts.rows(unit.rows)

    def _media(self, kept: Kept, rows: Sequence[int]) -> Float[Tensor, "b *frames 3 h w"]:
        """Some of a call's media, on this process's GPU if there is one: networks follow them."""
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        return self.store.media(kept, rows).to(device)


class OfReward(Reading):
    """A reward's scores of every call. rows: the prompts that it is for; None for all."""

    rows: frozenset[int] | None = None

    def load(self) -> Reward:
        made: Reward = build(as_reward, {"reward": self.config}, self.allow_code)
        return made

    def jobs(self, units: Sequence[Unit], kept: Mapping[str, Kept]) -> list[Job]:
        return [Job(self._key(unit, kept[unit.key]), (unit,)) for unit in units if self._own(unit, kept[unit.key])]

    def _own(self, unit: Unit, kept: Kept) -> list[int]:
        """Which media of a call are scored."""
        wanted = [self.rows is None or row in self.rows for row in unit.rows]
        return [i for i, (good, digest) in enumerate(zip(wanted, kept.digests, strict=True)) if good and digest]

    def _key(self, unit: Unit, kept: Kept) -> str:
        own = self._own(unit, kept)
        return score_key(
            [self.facts, own], [kept.digests[i] for i in own], self._told(unit), kept.fps, self.store.digests
        )

    def read(self, loaded: Reward, job: Job, kept: Mapping[str, Kept]) -> Column:
        (unit,) = job.units
        held = kept[unit.key]
        own = self._own(unit, held)
        told = self._told(unit).rows(own)
        media = shown(self._media(held, own), told, held.fps)
        with keyed_globals(0, "evaluation_score", int(job.key[:12], 16)):
            scores = loaded(media, told)
        return column(scores, own, len(unit.rows))


class OfJudge(Reading):
    """The share of comparisons that an arm's media win against the baseline's: both orders, ties count half."""

    baseline: str = ""

    def load(self) -> Reward:
        made: Reward = build(as_reward, {"reward": self.config}, self.allow_code)
        return made

    def jobs(self, units: Sequence[Unit], kept: Mapping[str, Kept]) -> list[Job]:
        base = {(unit.seed, unit.rows): unit for unit in units if unit.arm == self.baseline}
        pairs = [(unit, base[unit.seed, unit.rows]) for unit in units if unit.arm != self.baseline]
        return [Job(self._key(pair, kept), pair) for pair in pairs]

    def _key(self, pair: tuple[Unit, Unit], kept: Mapping[str, Kept]) -> str:
        digests = [digest for unit in pair for digest in kept[unit.key].digests]
        return score_key(["judge", self.facts], digests, self._told(pair[0]), kept[pair[0].key].fps, self.store.digests)

    def read(self, loaded: Reward, job: Job, kept: Mapping[str, Kept]) -> Column:
        one, other = (kept[unit.key] for unit in job.units)
        rows = [i for i, both in enumerate(zip(one.digests, other.digests, strict=True)) if all(both)]
        count = len(job.units[0].rows)
        if not rows:
            return Column({"total": (math.nan,) * count})
        told = self._told(job.units[0]).rows(rows)
        pixels = torch.cat([self._media(held, rows) for held in (one, other)])
        both = Prompts(told.text * 2, told.metadata * 2, tuple(range(len(rows))) * 2)
        with keyed_globals(0, "evaluation_judge", int(job.key[:12], 16)):
            scores = loaded(shown(pixels, both, one.fps), both)
        return column(scores.rows(range(len(rows))), rows, count)


class OfDiversity(Reading):
    """The mean distance of two of a prompt's media from different seeds.

    Of pixels the root of the mean squared difference, in [0, 1]; by an embedder 1 - cosine, of a video's mean over its
    frames. Media of one prompt that are alike count 0.
    """

    def load(self) -> Embedder | None:
        if self.name == PIXELS:
            return None
        made: Embedder = build(_embedder, {"embedder": self.config}, self.allow_code)
        return made

    def jobs(self, units: Sequence[Unit], kept: Mapping[str, Kept]) -> list[Job]:
        groups: dict[tuple[str, tuple[int, ...]], list[Unit]] = {}
        for unit in units:
            groups.setdefault((unit.arm, unit.rows), []).append(unit)
        return [Job(self._key(group, kept), tuple(group)) for group in groups.values() if len(group) > 1]

    def _key(self, group: Sequence[Unit], kept: Mapping[str, Kept]) -> str:
        return key_of(["diversity", self.name == PIXELS, self.facts, [kept[unit.key].digests for unit in group]])

    def read(self, loaded: Embedder | None, job: Job, kept: Mapping[str, Kept]) -> Column:
        found = []
        for i in range(len(job.units[0].rows)):
            there = [kept[unit.key] for unit in job.units if kept[unit.key].digests[i]]
            found.append(_spread([self._media(one, [i])[0] for one in there], loaded))
        return Column({"total": tuple(found)})


def _embedder(embedder: Embedder) -> Embedder:
    return embedder


@torch.no_grad()
def _spread(media: Sequence[Float[Tensor, "*frames 3 h w"]], embedder: Embedder | None) -> float:
    """The mean distance of all pairs; nan of fewer than two."""
    if len(media) < 2:
        return math.nan
    if embedder is None:
        between = [float((a - b).square().mean().sqrt()) for a, b in combinations(media, 2)]
    else:
        frames = [one.reshape(-1, *one.shape[-3:]) for one in media]
        means = torch.stack([embedder(one).float().mean(0) for one in frames])
        unit = torch.nn.functional.normalize(means, dim=1)
        between = [float(1 - a @ b) for a, b in combinations(unit, 2)]
    return sum(between) / len(between)


class OfDistance(Reading):
    """The distance of all pictures of an arm to a set of reference pictures: one number, lower is nearer."""

    def load(self) -> ReferenceSet:
        made: ReferenceSet = build(_reference, {"reference": self.config}, self.allow_code)
        return made

    def jobs(self, units: Sequence[Unit], kept: Mapping[str, Kept]) -> list[Job]:
        arms = dict.fromkeys(unit.arm for unit in units)
        groups = [tuple(unit for unit in units if unit.arm == arm) for arm in arms]
        return [Job(key_of([self.facts, [kept[unit.key].digests for unit in group]]), group) for group in groups]

    @torch.no_grad()
    def read(self, loaded: ReferenceSet, job: Job, kept: Mapping[str, Kept]) -> Column:
        features = []
        for unit in job.units:
            held = kept[unit.key]
            rows = [i for i, digest in enumerate(held.digests) if digest]
            if rows:
                features.append(loaded.embedder(self._media(held, rows)).cpu().double())
        known = torch.cat(features)
        if len(known) < loaded.least:
            raise ValueError(f"{self.name} needs {loaded.least} pictures of an arm at least, got {len(known)}")
        return Column({"total": (float(loaded.distance(known)),)})


def _reference(reference: ReferenceSet) -> ReferenceSet:
    return reference


def scope_of(reward: Reward) -> str:
    """What one score depends on: its sample, its group, or all that are scored together, now or before."""
    return "set" if running_normalisers(reward) else reward.card.scope


def check_scope(scope: str, name: str, judge: bool) -> None:
    """Raises: ValueError for a metric that compares samples, and for a judge that does not compare those of a group."""
    if judge and scope != "group":
        raise ValueError(f"{name} scores each sample on its own: put it under metrics, which tell win rates too")
    if not judge and scope != "sample":
        raise ValueError(f"{name} depends on other samples' scores: put what compares samples under judges")


def looks_at(modality: str, kind: str) -> bool:
    """Whether a reward of a modality scores media of a kind."""
    return modality in ("any", kind)

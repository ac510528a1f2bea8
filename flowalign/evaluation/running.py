"""Runs a sweep: draws, reads, and leaves its results in a folder.

In the folder:

    table.md, table.json   every arm's numbers with their intervals, and which differences are real
    results.json           all of it, per prompt: for the page, and for tables of your own
    report.html            the same for reading: bars, and the prompts on which arms differ most with their pictures
    sweep.yaml             what was asked
    cells/                 media and scores, by content (`flowalign.evaluation.cells`)
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowalign.config import Call, build, construct, parse
from flowalign.distributed import together, world_size
from flowalign.evaluation.benchmarks import Scorer, Set
from flowalign.evaluation.cells import Kept, Store, read_object
from flowalign.evaluation.drawing import Drawing, Unit, from_main, in_turns, mine_of, tell
from flowalign.evaluation.facts import facts, key_of, reward_facts
from flowalign.evaluation.readings import (
    PIXELS,
    Job,
    OfDistance,
    OfDiversity,
    OfJudge,
    OfReward,
    Reading,
    check_scope,
    looks_at,
    scope_of,
)
from flowalign.evaluation.sweep import Plan, configs
from flowalign.interrupt import StopRequest
from flowalign.progress import Progress
from flowalign.tracking import write_atomically
from rewards.base import Reward, as_reward
from rewards.sets import Embedder, ReferenceSet

NOT_RESULTS = ("cells", "sweep.yaml", "table.md", "table.json", "results.json", "report.html")


@dataclass(frozen=True)
class Done:
    """A sweep that has run: calls, what each has come to, and what was read off them.

    readings: with the jobs of each; notes: lines for the table.
    """

    drawing: Drawing
    units: tuple[Unit, ...]
    kept: Mapping[str, Kept]
    readings: tuple[tuple[Reading, tuple[Job, ...]], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Named:
    """A reward by name and config, what it is, and of what scope and modality."""

    name: str
    config: Any
    facts: Any
    modality: str


class Running:
    """One start of a sweep."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.store = plan, Store(plan.cache)
        self.notes: list[str] = []

    def run(self) -> Done:
        """Draw and read what is not there yet. Raises: Stopped where a signal asked for it; what is done stays."""
        together(lambda: check_results(self.plan.folder))
        together(self._open)
        with StopRequest() as stop:
            drawing = Drawing(self.plan, self.store, stop)
            readings = self._readings()  # which raises what is wrong with rewards before anything is drawn
            units = drawing.prepare()
            kept = drawing.run(units)
            read = [(reading, self._jobs(reading, units, kept)) for reading in readings]
            self._read_all(read, kept, stop)
        return Done(drawing, tuple(units), kept, tuple(read), tuple(self.notes))

    def _open(self) -> None:
        self.plan.folder.mkdir(parents=True, exist_ok=True)
        self.store.open()
        mark = self.plan.folder / "sweep.yaml"
        mark.touch()  # so that a sweep that is killed goes on in its folder

    def _jobs(self, reading: Reading, units: Sequence[Unit], kept: Mapping[str, Kept]) -> tuple[Job, ...]:
        own = [unit for unit in units if unit.benchmark == reading.benchmark]
        return tuple(reading.jobs(own, kept))

    def _readings(self) -> list[Reading]:
        sweep, found = self.plan.sweep, list[Reading]()
        metrics = [self._named(name, config, "metrics") for name, config in configs(sweep.metrics).items()]
        judges = [self._named(name, config, "judges") for name, config in configs(sweep.judges).items()]
        for name, benchmark in sweep.benchmarks.items():
            scorers = benchmark.scorers()
            twice = [metric.name for metric in metrics if metric.name in [one.name for one in scorers]]
            if twice:
                raise ValueError(f"metrics.{twice[0]}: the benchmark {name} has a number of that name; take another")
            for scorer in scorers:
                told = self._named(scorer.name, scorer.reward, f"benchmarks.{name}")
                if not looks_at(told.modality, benchmark.kind):
                    raise ValueError(
                        f"benchmarks.{name}: {scorer.name} scores {told.modality}s, and it is of {benchmark.kind}s"
                    )
                found.append(self._of_reward(scorer, name, told))
            own = [metric for metric in metrics if self._fits(metric, name, "metrics")]
            found += [self._of_reward(Scorer(metric.name, metric.config), name, metric) for metric in own]
            found += [self._of_judge(judge, name) for judge in judges if self._fits(judge, name, "judges")]
            found += self._of_sets(name)
        return found

    def _fits(self, named: Named, benchmark: str, what: str) -> bool:
        kind = self.plan.sweep.benchmarks[benchmark].kind
        if looks_at(named.modality, kind):
            return True
        self.notes.append(f"{what}.{named.name} scores {named.modality}s, so not those of {benchmark}")
        return False

    def _named(self, name: str, config: Any, where: str) -> Named:
        """A reward's modality, which is kept: to know it, the reward has to be made once."""
        allow = self.plan.allow_code

        def make() -> dict[str, str]:
            made: Reward = build(as_reward, {"reward": config}, allow)
            return {"modality": made.card.modality, "scope": scope_of(made)}

        told, card = self._known(lambda: reward_facts(config, allow, self.store.digests), make)
        check_scope(card["scope"], f"{where}.{name}", where == "judges")
        return Named(name, config, told, card["modality"])

    def _facts(self, call: Call) -> Any:
        """Of an embedder or a distance, which is made once so that what is wrong with it is told at the start."""

        def make() -> dict[str, str]:
            construct(call)
            return {"made": call.path}

        return self._known(lambda: facts(call, self.store.digests), make)[0]

    def _known(self, told: Callable[[], Any], make: Callable[[], dict[str, str]]) -> tuple[Any, dict[str, str]]:
        """Facts, and what `make` has said of them once; facts after that, when what it fetches from the hub is here."""

        def known() -> list[Any]:
            card = read_object(self._card(told()))
            if card is None:
                card = make()
                write_atomically(self._card(told()), json.dumps(card).encode())
            return [told(), card]

        found, card = from_main(known)
        return found, card

    def _card(self, told: Any) -> Path:
        return self.store.folder / "scores" / f"card-{key_of(told)}.json"

    def _of_reward(self, scorer: Scorer, benchmark: str, told: Named) -> OfReward:
        reading = OfReward(scorer.name, benchmark, self._set(benchmark).prompts, told.config, told.facts,
                           self.plan.allow_code, self.store)  # fmt: skip
        if scorer.only is not None:
            breakdown, label = scorer.only
            labels = self._set(benchmark).labels[breakdown]
            reading.rows = frozenset(i for i, one in enumerate(labels) if one == label)
        return reading

    def _of_judge(self, judge: Named, benchmark: str) -> OfJudge:
        reading = OfJudge(judge.name, benchmark, self._set(benchmark).prompts, judge.config, judge.facts,
                          self.plan.allow_code, self.store)  # fmt: skip
        reading.baseline = self.plan.baselines[benchmark]
        return reading

    def _of_sets(self, benchmark: str) -> list[Reading]:
        """Diversity, where there are seeds to compare, and distances of pictures to references."""
        sweep, allow, prompts = self.plan.sweep, self.plan.allow_code, self._set(benchmark).prompts
        found: list[Reading] = []
        if len(sweep.seeds) > 1:
            found.append(OfDiversity(PIXELS, benchmark, prompts, None, None, allow, self.store))
            for name, config in configs(sweep.embedders).items():
                told = self._facts(parse(_embedder, {"embedder": config}, allow))
                found.append(OfDiversity(name, benchmark, prompts, config, told, allow, self.store))
        if sweep.distances and sweep.benchmarks[benchmark].kind == "video":
            self.notes.append(f"distances are of pictures, so none of {benchmark}")
            return found
        for name, config in configs(sweep.distances).items():
            told = self._facts(parse(_reference, {"reference": config}, allow))
            found.append(OfDistance(name, benchmark, prompts, config, told, allow, self.store))
        return found

    def _set(self, benchmark: str) -> Set:
        return self.plan.sets[benchmark]

    def _read_all(
        self, read: Sequence[tuple[Reading, Sequence[Job]]], kept: Mapping[str, Kept], stop: StopRequest
    ) -> None:
        """Every job whose result is not there, by reading; those of one network one after another."""
        missing = from_main(lambda: [[self.store.scores(job.key) is None for job in jobs] for _, jobs in read])
        left = [
            [job for job, lacks in zip(jobs, row, strict=True) if lacks]
            for (_, jobs), row in zip(read, missing, strict=True)
        ]
        total = sum(len(mine_of(jobs)) for jobs in left)
        every = sum(len(jobs) for _, jobs in read)
        done = every - sum(map(len, left))
        tell(f"{done} of {every} calls are scored")
        progress = Progress(total) if total else None
        order = sorted(range(len(read)), key=lambda i: key_of([type(read[i][0]).__name__, read[i][0].facts]))
        held, loaded = "", None
        for number in order:
            reading, jobs = read[number][0], left[number]
            mine = mine_of(jobs)
            name = key_of([type(reading).__name__, reading.facts])
            if mine and name != held:
                if loaded is not None:
                    loaded = None
                    _free()
                held, loaded = name, reading.load()
            for job in in_turns(mine, -(-len(jobs) // world_size()), stop, "calls are scored", done):
                self.store.keep_scores(job.key, reading.read(loaded, job, kept))
                if progress:
                    progress.update(1, {})
            done += len(jobs)
        if progress:
            progress.close()
        together(lambda: None)


def _embedder(embedder: Embedder) -> Embedder:
    return embedder


def _reference(reference: ReferenceSet) -> ReferenceSet:
    return reference


def _free() -> None:
    """A network that is let go of leaves the GPU at once."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def check_results(folder: Path) -> None:
    """Raises: ValueError for a folder that holds anything but a sweep's results."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name another folder with --folder")
    other = [path.name for path in folder.iterdir() if path.name not in NOT_RESULTS] if folder.exists() else []
    if other and not (folder / "sweep.yaml").is_file():
        raise ValueError(f"{folder} is in use and holds no sweep ({other[0]}); name another folder with --folder")

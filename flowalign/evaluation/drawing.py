"""A sweep's media: what is not there yet is drawn, shared out over processes, arm by arm."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch

from flowalign.config import Call, construct
from flowalign.distributed import gather_text, largest, on_main, rank, share, together, world_size
from flowalign.evaluation.cells import Kept, Store, draw_key
from flowalign.evaluation.facts import key_of, model_facts
from flowalign.evaluation.methods import Method, Price, Searched
from flowalign.evaluation.sweep import Arm, Plan, chunks
from flowalign.interrupt import Stopped, StopRequest
from flowalign.models import Model
from flowalign.progress import Progress
from flowalign.records import Prompts
from flowalign.videos import check_writable
from trainers.search_cost import Prices

T = TypeVar("T")


@dataclass(frozen=True)
class Unit:
    """A call of an arm: some prompts of a benchmark from one seed. key: of its media."""

    arm: str
    benchmark: str
    seed: int
    rows: tuple[int, ...]
    key: str


class Held:
    """The model of the arm in hand: arms that differ in their method alone share it."""

    def __init__(self) -> None:
        self._config: Call | None = None
        self._model: Model | None = None

    def get(self, arm: Arm) -> Model:
        """Load it. Raises: ValueError for one whose weights are spread over processes, which would have to join in."""
        if self._model is None or self._config != arm.config:
            self.free()
            made: Model = construct(arm.config)
            if made.sharded:
                raise ValueError(
                    f"{arm.name}: memory.shard spreads a model over processes, and each of eval has its own"
                )
            self._config, self._model = arm.config, made
        return self._model

    def free(self) -> None:
        """Let go of it."""
        if self._model is None:
            return
        self._config = self._model = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def from_main(action: Callable[[], Any]) -> Any:
    """What an action returns on the first process, plain data, on all of them; what it raises is raised on all."""
    held: list[Any] = []
    on_main(lambda: held.append(action()))
    return json.loads(gather_text(json.dumps(held[0]) if held else "")[0])


class Drawing:
    """Draws what a plan's arms lack.

    prices: what a picture of each arm costs. methods: each arm's, at the budget where there is one.
    """

    def __init__(self, plan: Plan, store: Store, stop: StopRequest) -> None:
        self.plan, self.store, self.stop, self.held = plan, store, stop, Held()
        self.prices: dict[str, Price] = {}
        self.methods: dict[str, Method] = {}

    def prepare(self) -> list[Unit]:
        """Prices, methods at their budgets, and all calls with their keys."""
        facts: dict[str, Any] = from_main(
            lambda: {arm.name: model_facts(arm.config, self.store.digests) for arm in self.plan.arms}
        )
        facts |= {"device": "cuda" if torch.cuda.is_available() else "cpu"}
        for arm in self.plan.arms:
            self.prices[arm.name] = self._price(arm, facts)
            self.methods[arm.name] = self._paid(arm)
        sweep = self.plan.sweep
        if sweep.at_equal_compute:
            budget = sweep.budget or max(price.cost for price in self.prices.values())
            self.methods = {arm.name: self._within(arm, budget) for arm in self.plan.arms}
        told = from_main(lambda: [asdict(unit) for unit in self._units(facts)])
        on_main(self.store.digests.save)
        return [Unit(**{**one, "rows": tuple(one["rows"])}) for one in told]

    def _price(self, arm: Arm, facts: Mapping[str, Any]) -> Price:
        """Known, or measured by the first process."""
        given = self.plan.sweep.prices

        def name() -> str:
            return key_of([facts[arm.name], arm.method.facts(self.store.digests), given and asdict(given)])

        def known() -> dict[str, Any]:
            price = self.store.prices(name())
            if price is None:
                prompts = self.plan.sets[arm.benchmarks[0]].prompts
                rows = chunks(prompts, self.plan.sweep.batch_size)[0]
                price = self._measured(arm, prompts.rows(rows), given, key_of([facts[arm.name], "decode"]))
                self.store.keep_price(name(), price)  # anew: a search's reward may only now be here from the hub
            return asdict(price)

        told = from_main(known)
        return Price(Prices(**told["prices"]), told["rows"], told["cost"])

    def _measured(self, arm: Arm, prompts: Prompts, given: Prices | None, name: str) -> Price:
        """The clock is not exact: what decoding costs is measured once for all arms of a model."""
        model, size = self._model(arm), self.plan.sweep.batch_size
        price, known = arm.method.price(model, prompts, size, given), self.store.prices(name)
        if given is not None:
            return price
        if known is None:
            self.store.keep_price(name, price)
            return price
        return arm.method.price(model, prompts, size, replace(price.prices, decode=known.prices.decode))

    def _paid(self, arm: Arm) -> Method:
        """A search is told the prices, so that it does not measure them at every call."""
        method = arm.method
        return method.paid(self.prices[arm.name].prices) if isinstance(method, Searched) else method

    def _within(self, arm: Arm, budget: float) -> Method:
        try:
            return arm.method.within(budget, self.prices[arm.name])
        except ValueError as error:
            raise ValueError(f"{arm.name}: {error}") from error

    def _model(self, arm: Arm) -> Model:
        """The loaded model, which makes what its benchmarks are of. Raises: ValueError where it does not."""
        model = self.held.get(arm)
        for name in arm.benchmarks:
            wanted = self.plan.sweep.benchmarks[name].kind
            if (model.fps is not None) != (wanted == "video"):
                made = "pictures" if model.fps is None else "videos"
                raise ValueError(f"{arm.name} makes {made}, and the benchmark {name} is of {wanted}s")
        if model.fps is not None:
            check_writable()
        return model

    def _units(self, facts: Mapping[str, Any]) -> list[Unit]:
        found = []
        for arm in self.plan.arms:
            method = self.methods[arm.name]
            made_by = method.facts(self.store.digests)
            whole = isinstance(method, Searched)
            for name in arm.benchmarks:
                prompts = self.plan.sets[name].prompts
                for seed in self.plan.sweep.seeds:
                    for rows in chunks(prompts, self.plan.sweep.batch_size):
                        model = [facts[arm.name], facts["device"]]
                        key = draw_key(model, made_by, prompts.rows(rows), seed, whole, self.store.digests)
                        found.append(Unit(arm.name, name, seed, rows, key))
        return found

    def run(self, units: Sequence[Unit]) -> dict[str, Kept]:
        """Draw what is missing; returns all calls by their keys.

        Raises: Stopped where a signal asked for it; what is drawn stays.
        """
        every = {unit.key: unit for unit in units}  # arms that are the same have the same
        missing = from_main(lambda: [key for key in every if self.store.drawn(key) is None])
        total = sum(len(mine_of([k for k in missing if every[k].arm == arm.name])) for arm in self.plan.arms)
        done = len(every) - len(missing)
        tell(f"{done} of {len(every)} calls are drawn")
        progress = Progress(total) if total else None
        for arm in self.plan.arms:
            own = [every[key] for key in missing if every[key].arm == arm.name]
            for unit in in_turns(mine_of(own), -(-len(own) // world_size()), self.stop, "calls are drawn", done):
                self._draw(arm, unit)
                if progress:
                    progress.update(len(unit.rows), {})
            done += len(own)
            self.methods[arm.name].free()
        if progress:
            progress.close()
        self.held.free()
        together(lambda: None)
        return {key: self._kept(key) for key in every}

    def _kept(self, key: str) -> Kept:
        kept = self.store.drawn(key)
        if kept is None:
            raise OSError(f"{self.store.folder / 'drawn' / key} has gone while it was in use; start again")
        return kept

    def _draw(self, arm: Arm, unit: Unit) -> None:
        model = self._model(arm)
        prompts: Prompts = self.plan.sets[unit.benchmark].prompts.rows(unit.rows)
        drawn = self.methods[arm.name].draw(model, prompts, unit.seed, self.plan.sweep.batch_size)
        self.store.keep(unit.key, drawn, prompts, model.fps)


def tell(line: str) -> None:
    """A line about where a sweep is; of many processes by the first."""
    if rank() == 0:
        print(f"flowalign: {line}", file=sys.stderr, flush=True)


def mine_of(listed: Sequence[T]) -> list[T]:
    """This process's share."""
    return [listed[i] for i in share(len(listed), rank(), world_size())]


def in_turns(mine: Sequence[T], turns: int, stop: StopRequest, what: str, done: int) -> Iterator[T]:
    """This process's items, while all processes agree in every turn whether a signal has asked to stop.

    Raises: Stopped where one has, on all of them together.
    """
    for turn in range(turns):
        asked = int(largest([float(stop.asked)])[0])
        if asked:
            name = f"signal {asked}"
            raise Stopped(asked, f"stopped by {name}: {done + turn * world_size()} {what}; the same command goes on")
        if turn < len(mine):
            yield mine[turn]

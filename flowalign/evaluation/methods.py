"""How an arm draws: by the plain ODE, or by any search over start noises; and what that costs."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.config import Call, ConfigError, construct, locate, parse
from flowalign.evaluation.facts import Digests, facts
from flowalign.models.base import Model
from flowalign.pictures import to_bytes
from flowalign.records import Prompts
from flowalign.rollout import Policy
from flowalign.sample import pictures
from flowalign.schedules import Path
from flowalign.sizes import calls_of
from flowalign.transitions import ODE
from rewards.base import FunctionReward, Reward, as_reward
from trainers.best_of_n import MANY
from trainers.search import Search
from trainers.search_cost import Prices, Spent
from trainers.search_sampler import Sampler

STAND_IN = {"model": "shapes", "prompts": ["-"]}  # for what a sweep gives a search itself, while its settings are read
GIVEN = ("model", "prompts", "seed", "folder", "save_seconds", "prices")


@dataclass(frozen=True)
class Drawn:
    """A call's media in 8 bits, None where a search has found no valid one; what all of them have cost; seconds."""

    media: tuple[UInt8[Tensor, "*frames 3 h w"] | None, ...]
    spent: Spent
    seconds: float


@dataclass(frozen=True)
class Price:
    """What one picture of an arm costs as it is set, in forwards of one network row, and what that is made of."""

    prices: Prices
    rows: int
    cost: float


class Method(ABC):
    """A way to draw from a model. steps, guidance_scale: of the rollout; None for the model's own."""

    steps: int | None
    guidance_scale: float | None

    @abstractmethod
    def settled(self, steps: int, guidance_scale: float) -> Method:
        """The same with the model's own settings where it leaves them open."""

    @abstractmethod
    def facts(self, digests: Digests) -> dict[str, Any]:
        """What of it makes another picture; plain data."""

    @abstractmethod
    def price(self, model: Model, prompts: Prompts, batch_size: int, prices: Prices | None) -> Price:
        """What a picture costs; prices of decode and reward are measured where they are not given."""

    @abstractmethod
    def within(self, budget: float, price: Price) -> Method:
        """The same at a budget, in forwards of one network row for a picture.

        Raises: ValueError for one that does not pay for a picture.
        """

    @abstractmethod
    def draw(self, model: Model, prompts: Prompts, seed: int, batch_size: int) -> Drawn:
        """A call's media: of prompt i from the noise of its seed in its record, the same for every method."""

    def free(self) -> None:  # noqa: B027  # the ODE holds nothing
        """Let go of what drawing has loaded."""

    def told(self) -> dict[str, Any]:
        """Its settings, for people to read."""
        return {"steps": self.steps, "guidance_scale": self.guidance_scale}


@dataclass(frozen=True)
class Plain(Method):
    """The ODE; its budget buys steps."""

    steps: int | None = None
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def settled(self, steps: int, guidance_scale: float) -> Plain:
        scale = guidance_scale if self.guidance_scale is None else self.guidance_scale
        return Plain(steps if self.steps is None else self.steps, scale)

    def facts(self, digests: Digests) -> dict[str, Any]:
        return {"method": "ODE", **asdict(self)}

    def price(self, model: Model, prompts: Prompts, batch_size: int, prices: Prices | None) -> Price:
        assert self.steps is not None
        assert self.guidance_scale is not None
        nothing = FunctionReward(lambda media, told: torch.zeros(len(media)))
        path, policy = Path((ODE(),) * self.steps), Policy(self.guidance_scale)
        sampler = Sampler(model, nothing, prompts, path, policy, False, 0)
        call = calls_of(model, prompts, batch_size)[0]
        with model.sized(call.size):
            prices = replace(prices or sampler.measure(call, batch_size), reward=0.0)
            rows = sampler.one(False).network.forward
        return Price(prices, rows, rows + prices.decode)

    def within(self, budget: float, price: Price) -> Plain:
        """As many steps as it pays for, each at the mean price of the settings' own."""
        assert self.steps is not None
        steps = int((budget - price.prices.decode) / (price.rows / self.steps) + 1e-9)
        if steps < 1:
            raise ValueError(f"a budget of {budget:g} forwards does not pay for one step and its decode")
        return replace(self, steps=steps)

    def draw(self, model: Model, prompts: Prompts, seed: int, batch_size: int) -> Drawn:
        assert self.steps is not None
        assert self.guidance_scale is not None
        began = time.perf_counter()
        calls = calls_of(model, prompts, batch_size)
        model.meter.take()
        media: dict[int, Tensor] = {}
        drawn = pictures(model, prompts, self.steps, self.guidance_scale, seed, calls=calls)
        for call, pixels in zip(calls, drawn, strict=True):
            media |= zip(call.rows, to_bytes(pixels), strict=True)
        spent = Spent(model.meter.take()[1], Rows(len(prompts)), Rows())
        return Drawn(tuple(media[i] for i in range(len(prompts))), spent, time.perf_counter() - began)


class Lazy:
    """A reward that is made when it is first needed, once for all calls, and let go of with `free`."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self._made: Reward | None = None

    def get(self) -> Reward:
        """The reward itself."""
        if self._made is None:
            self._made = as_reward(construct(self.tree))
        return self._made

    def free(self) -> None:
        """Let go of it: it may be a large network."""
        self._made = None


@dataclass(frozen=True)
class Searched(Method):
    """The best sample that a search of `trainers` finds by its reward; its budget buys tries.

    call: the search's parsed settings, with stand-ins for what a sweep gives.
    """

    call: Call
    reward: Lazy
    steps: int | None = None
    guidance_scale: float | None = None
    budget: float | None = None
    prices: Prices | None = None

    def settled(self, steps: int, guidance_scale: float) -> Searched:
        scale = guidance_scale if self.guidance_scale is None else self.guidance_scale
        return replace(self, steps=steps if self.steps is None else self.steps, guidance_scale=scale)

    def facts(self, digests: Digests) -> dict[str, Any]:
        own = (set(GIVEN) | {"steps", "guidance_scale"}) & {*self.call.arguments, *self.call.defaults}
        given, left = ({k: v for k, v in part.items() if k not in own} for part in
                       (self.call.arguments, self.call.defaults))  # fmt: skip
        told = facts(Call(self.call.path, self.call.target, given, left), digests)
        prices = None if self.prices is None else asdict(self.prices)
        own_budget = given.get("budget")  # tries then depend on the prices, as with the sweep's budget
        paid = {"budget": self.budget, "prices": prices if self.budget or own_budget else None}
        return {"method": told, "steps": self.steps, "guidance_scale": self.guidance_scale, **paid}

    def price(self, model: Model, prompts: Prompts, batch_size: int, prices: Prices | None) -> Price:
        search = self._search(model, prompts, 0, batch_size, prices)
        paid = prices or search.start().prices
        one = search.sampler.one(search.needs_gradient)
        tries = search.tries if search.budget is None else min(search.tries, int(search.budget / one.cost(paid)))
        rows = search.sampler.one(False).network.forward
        return Price(paid, rows, max(tries, 1) * one.cost(paid))

    def within(self, budget: float, price: Price) -> Searched:
        return replace(self, budget=budget, prices=price.prices)

    def paid(self, prices: Prices) -> Searched:
        """With prices that are known, so that a budget of its own buys the same tries every time."""
        return replace(self, prices=prices)

    def draw(self, model: Model, prompts: Prompts, seed: int, batch_size: int) -> Drawn:
        began = time.perf_counter()
        found = self._search(model, prompts, seed, batch_size, self.prices).find()
        spent = sum((one.spent for one in found), Spent())
        media = tuple(None if one.best is None else one.best.media for one in found)
        return Drawn(media, spent, time.perf_counter() - began)

    def _search(self, model: Model, prompts: Prompts, seed: int, batch_size: int, prices: Prices | None) -> Search:
        own = {"model": model, "prompts": prompts, "seed": seed, "reward": self.reward.get(), "prices": prices}
        own |= {"steps": self.steps, "guidance_scale": self.guidance_scale}
        own |= {"batch_size": self.call.arguments.get("batch_size", batch_size)}
        search: Search = construct(Call(self.call.path, self.call.target, self.call.arguments | own, {}))
        if self.budget is not None:
            search.tries, search.budget = MANY, self.budget
        return search

    def free(self) -> None:
        self.reward.free()

    def told(self) -> dict[str, Any]:
        own = {"steps": self.steps, "guidance_scale": self.guidance_scale}
        number = {k: v for k, v in self.call.arguments.items() if isinstance(v, int | float | str) and k not in own}
        known = {k: v for k, v in number.items() if k not in GIVEN}
        return {"search": self.call.path, **own, **known} | ({} if self.budget is None else {"budget": self.budget})


def read_method(told: Mapping[str, Any], name: str, allow_code: bool = False) -> Method:
    """A method of a sweep file: the ODE's steps and guidance_scale, or with the key `search` a search's own settings.

    Those are what a config of `flowalign optimize` says but for model, prompts, seed and folder.

    Raises: ConfigError for what is neither.
    """
    try:
        if "search" not in told:
            plain: Plain = construct(parse(Plain, told, allow_code))
            return plain
        return _read_search(told, allow_code)
    except ConfigError as error:
        raise ConfigError(f"methods.{name}: {error}") from error


def _read_search(told: Mapping[str, Any], allow_code: bool) -> Searched:
    path = told["search"]
    target = locate(path, allow_code) if isinstance(path, str) else None
    if not isinstance(target, type) or not issubclass(target, Search):
        raise ConfigError(f"search: {path!r} is no search, such as trainers.BestOfN or trainers.ReNO")
    given = [key for key in GIVEN if key in told]
    if given:
        raise ConfigError(f"{given[0]} is the sweep's own, not a method's: leave it out")
    own = {key: value for key, value in told.items() if key != "search"}
    call = parse(target, {**STAND_IN, **own}, allow_code)
    steps, scale = call.arguments.get("steps"), call.arguments.get("guidance_scale")
    return Searched(Call(path, target, call.arguments, call.defaults), Lazy(call.arguments["reward"]), steps, scale)

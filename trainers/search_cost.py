"""What a search costs, in one unit: the forward of one row of the network. With its backward a row counts 3."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flowalign.accounting import Meter, Rows

TURNS = 3  # of a measurement, whose shortest counts: the first of them warms up


@dataclass(frozen=True)
class Prices:
    """Of one sample's decode and reward without gradient, in forwards of one network row."""

    decode: float
    reward: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(price) and price >= 0 for price in (self.decode, self.reward)):
            raise ValueError(f"prices must be finite and at least 0, got {self.decode} and {self.reward}")


@dataclass(frozen=True)
class Spent:
    """Rows of the network, samples decoded and samples scored, each without and with gradient.

    Prompts' encoding is not counted: it is done once, whatever the search does.
    """

    network: Rows = Rows()
    decodes: Rows = Rows()
    rewards: Rows = Rows()

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.network + other.network, self.decodes + other.decodes, self.rewards + other.rewards)

    def cost(self, prices: Prices) -> float:
        """In forwards of one network row."""
        return self.network.cost + prices.decode * self.decodes.cost + prices.reward * self.rewards.cost


def measured(
    network: Callable[[], object], decode: Callable[[], object], reward: Callable[[], object], rows: int, samples: int
) -> Prices:
    """Prices by the clock, without gradient.

    Args:
        network, decode, reward: one call each, of `rows` network rows and of `samples` samples.
    """
    calls = {"network": network, "decode": decode, "reward": reward}
    found = dict.fromkeys(calls, math.inf)
    for _ in range(TURNS):
        meter = Meter()
        for name, call in calls.items():
            with meter.phase(name), torch.no_grad():
                call()
            found[name] = min(found[name], meter.seconds[name])
    row = max(found["network"], 1e-9) / rows
    return Prices(found["decode"] / samples / row, found["reward"] / samples / row)

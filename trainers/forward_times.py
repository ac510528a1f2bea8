"""At which sigmas clean latents are noised anew: laws of a few discrete points of the model's own table."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


class Times(ABC):
    """Draws the sigmas at which a sample, or a pair together, is noised in an optimizer step.

    draws: how many of them; the loss is their mean, and each is a network call.
    """

    draws: int

    @abstractmethod
    def draw(self, generator: np.random.Generator, table: Sequence[float], grid: Sequence[float]) -> list[float]:
        """`draws` sigmas.

        Args:
            table: what the network was trained at (`Model.train_sigmas`), falling, all above 0.
            grid: of the rollouts, falling, the last point left out.
        """


def _check(draws: int) -> None:
    if draws < 1:
        raise ValueError(f"times.draws must be at least 1, got {draws}")


@dataclass(frozen=True)
class UniformTimes(Times):
    """Every point of the table is as likely, as in Diffusion-DPO (arXiv:2311.12908)."""

    draws: int = 1

    def __post_init__(self) -> None:
        _check(self.draws)

    def draw(self, generator: np.random.Generator, table: Sequence[float], grid: Sequence[float]) -> list[float]:
        return [table[int(i)] for i in generator.integers(len(table), size=self.draws)]


@dataclass(frozen=True)
class LogitNormalTimes(Times):
    """The point at a share u of the table's length, counted from its end at the data.

        u = 1 / (1 + exp(-(mean + std n))),   n standard normal                        (arXiv:2403.03206, eq. 19)

    The table is shifted, and so are the sigmas. mean 0 and std 1 are flow_grpo's; mean > 0 is towards the noise.
    """

    mean: float = 0.0
    std: float = 1.0
    draws: int = 1

    def __post_init__(self) -> None:
        _check(self.draws)
        if not self.std > 0:
            raise ValueError(f"times.std must be positive, got {self.std}")

    def draw(self, generator: np.random.Generator, table: Sequence[float], grid: Sequence[float]) -> list[float]:
        shares = [1 / (1 + math.exp(-(self.mean + self.std * n))) for n in generator.standard_normal(self.draws)]
        return [table[min(int((1 - share) * len(table)), len(table) - 1)] for share in shares]


@dataclass(frozen=True)
class GridTimes(Times):
    """`draws` distinct points of the rollouts' own grid, from the noise down, as DiffusionNFT (arXiv:2509.16117)."""

    draws: int = 1

    def __post_init__(self) -> None:
        _check(self.draws)

    def draw(self, generator: np.random.Generator, table: Sequence[float], grid: Sequence[float]) -> list[float]:
        if self.draws > len(grid):
            raise ValueError(f"times.draws is {self.draws}, but a rollout has {len(grid)} points to choose from")
        return [grid[int(i)] for i in sorted(generator.choice(len(grid), self.draws, replace=False))]


@dataclass(frozen=True)
class StratifiedTimes(Times):
    """A point of each of `draws` even strata of the rollouts' grid, as AWM (arXiv:2509.25050).

    first: the first point of the grid that may be drawn. share: of the grid's steps, counted from the noise, that may.
    The strata's borders are rounded down to points of the grid. first 1 and share .9 are the authors' for GenEval and
    text, first 0 for PickScore.
    """

    draws: int = 1
    first: int = 0
    share: float = 1.0

    def __post_init__(self) -> None:
        _check(self.draws)
        if self.first < 0 or not 0 < self.share <= 1:
            raise ValueError(
                f"times.first must be at least 0 and times.share lie in (0, 1], got {self.first} and {self.share}"
            )

    def draw(self, generator: np.random.Generator, table: Sequence[float], grid: Sequence[float]) -> list[float]:
        stop = int(len(grid) * self.share)
        if stop - self.first < self.draws:
            raise ValueError(
                f"times asks for {self.draws} strata of points {self.first} to {stop - 1} of a rollout's {len(grid)}: "
                "lower times.draws, or take more steps"
            )
        width = (stop - self.first) / self.draws
        borders = [self.first + int(width * i + 1e-9) for i in range(self.draws + 1)]
        return [grid[int(generator.integers(a, b))] for a, b in zip(borders, borders[1:], strict=False)]

"""How sure a number is: a paired bootstrap over prompts, each with all of its noise.

A prompt's score under a seed is mu + a_p + e_ps: noise is keyed by prompt and seed, so it is nested in prompts. The
variance of a mean over P prompts of S seeds is (var a + var e / S) / P, which is what resampling prompts, each with all
of its seeds, has (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). Seeds are therefore
not drawn once more within prompts: that would count var e twice, by (S - 1) / S^2 var e / P.

Two corrections make intervals of few prompts as wide as they have to be (Hesterberg, arXiv:1411.5279):
replicates are spread by sqrt(n / (n - 1)), and percentiles are taken where Student's t has its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import ndtr, stdtrit

from flowalign.randomness import key_generator

RESAMPLES = 10_000
LEVEL = 0.95
BLOCK = 4_000_000  # numbers of resampled counts in memory at once

Columns = Float[np.ndarray, "p k"]


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` prompts, its bootstrap standard error and its 95 % interval; nan where there is none.

    freedom: degrees of freedom: prompts less strata. moved: prompts whose own value is not 0.
    """

    value: float
    low: float
    high: float
    error: float
    count: int
    freedom: int
    moved: int

    def real(self, comparisons: int) -> bool:
        """Whether it differs from 0 at 5 % over so many comparisons together (Bonferroni).

        |value| > t(1 - 0.025 / m) error. And as many prompts have to differ as a sign test needs to be able to say so,
        2^(1 - moved) <= 0.05 / m: where all of a few prompts move alike, a bootstrap has no spread at all.
        """
        if self.freedom < 1 or not math.isfinite(self.value) or not self.value:
            return False
        level = (1 - LEVEL) / max(comparisons, 1)
        reach = float(stdtrit(self.freedom, 1 - level / 2)) * self.error
        return abs(self.value) > reach and 2.0 ** (1 - self.moved) <= level


def over_seeds(values: Float[np.ndarray, "p s"]) -> Float[np.ndarray, " p"]:
    """Each prompt's mean over the seeds with a score; nan without any."""
    known = np.isfinite(values)
    count = known.sum(1)
    return np.where(count > 0, np.where(known, values, 0.0).sum(1) / np.maximum(count, 1), np.nan)


def wins(values: Float[np.ndarray, "p s"], others: Float[np.ndarray, "p s"]) -> Float[np.ndarray, "p s"]:
    """1 where a score is above the other one, 1/2 where they are equal, 0 where below; nan where one is missing."""
    known = np.isfinite(values) & np.isfinite(others)
    return np.where(known, (values > others) + 0.5 * (values == others), np.nan)


def estimates(
    columns: Columns, strata: Sequence[str] | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> list[Estimate]:
    """The mean of each column with its interval, all from the same resampled prompts.

    Args:
        columns: a row for each prompt, nan where a column does not apply.
        strata: a category for each prompt: then the mean is that of the categories' means, resampled within each.
        seed: of the resampling: equal columns have equal intervals, always.
    """
    groups = _groups(strata, len(columns))
    value, replicates, freedom = _replicates(columns, groups, seed, resamples)
    known = np.isfinite(columns)
    moved = (known & (np.where(known, columns, 0.0) != 0)).sum(0)
    error, (low, high) = replicates.std(0), _percentiles(replicates, freedom)
    # a mean lies among its values, which replicates that were spread may leave
    low = np.maximum(low, np.where(known, columns, np.inf).min(0))
    high = np.minimum(high, np.where(known, columns, -np.inf).max(0))
    counts = known.sum(0)
    return [
        Estimate(
            float(value[k]), float(low[k]), float(high[k]), float(error[k]), int(counts[k]), int(freedom[k]),
            int(moved[k]),
        )
        for k in range(columns.shape[1])
    ]  # fmt: skip


def _groups(strata: Sequence[str] | None, count: int) -> list[Int[np.ndarray, " n"]]:
    """The rows of each stratum, in the order of their names."""
    if strata is None:
        return [np.arange(count)]
    told = np.array(strata)
    return [np.flatnonzero(told == name) for name in sorted({*strata})]


def _replicates(
    columns: Columns, groups: Sequence[Int[np.ndarray, " n"]], seed: int, resamples: int
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "r k"], Int[np.ndarray, " k"]]:
    """Means, their replicates spread as they should be, and degrees of freedom.

    Of strata with a known value, each counts the same.
    """
    known = np.isfinite(columns)
    filled = np.where(known, columns, 0.0)
    counts = np.stack([known[rows].sum(0) for rows in groups])
    shares = (counts > 0) / np.maximum((counts > 0).sum(0), 1)
    value = np.where((counts > 0).any(0), 0.0, np.nan)
    away = np.zeros((resamples, columns.shape[1]))
    for number, rows in enumerate(groups):
        mean = filled[rows].sum(0) / np.maximum(counts[number], 1)
        spread = np.sqrt(counts[number] / np.maximum(counts[number] - 1, 1))
        value = value + shares[number] * mean
        drawn = _resampled_means(filled[rows], known[rows], mean, key_generator(seed, "bootstrap", number), resamples)
        away += shares[number] * spread * (drawn - mean)
    return value, value + away, np.maximum(counts - 1, 0).sum(0)


def _resampled_means(
    filled: Columns,
    known: np.ndarray,
    mean: Float[np.ndarray, " k"],
    generator: np.random.Generator,
    resamples: int,
) -> Float[np.ndarray, "r k"]:
    """Means over rows drawn with replacement, `mean` where no known one is drawn."""
    count, found = len(filled), []
    held = known.astype(float)
    for start in range(0, resamples, max(1, BLOCK // count)):
        size = min(max(1, BLOCK // count), resamples - start)
        drawn = generator.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(float)
        total = times @ held
        found.append(np.where(total > 0, times @ filled / np.maximum(total, 1), mean))
    return np.concatenate(found)


def _percentiles(
    replicates: Float[np.ndarray, "r k"], freedom: Int[np.ndarray, " k"]
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """The ends of each column's interval; nan without a degree of freedom."""
    ends = np.full((2, replicates.shape[1]), np.nan)
    for degrees in np.unique(freedom[freedom > 0]):
        tail = float(ndtr(-stdtrit(int(degrees), 1 - (1 - LEVEL) / 2)))
        at = freedom == degrees
        ends[:, at] = np.quantile(replicates[:, at], [tail, 1 - tail], axis=0)
    return ends[0], ends[1]

"""Which prompts an epoch's groups take."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from flowalign.randomness import key_generator


def epoch_prompts(total: int, groups: int, epoch: int, seed: int) -> list[int]:
    """The prompt of each of an epoch's groups: every prompt once before any comes again, in an order drawn per pass.

    A function of its arguments alone, so that resuming needs no cursor and nothing is skipped.
    """
    counters = range(epoch * groups, (epoch + 1) * groups)
    return [int(_order(total, n // total, seed)[n % total]) for n in counters]


@lru_cache(maxsize=4)
def _order(total: int, number: int, seed: int) -> np.ndarray:
    return key_generator(seed, "prompt_order", number).permutation(total)

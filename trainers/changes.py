"""How numbers of the same prompts have changed between two evaluations, and what of it is beyond chance.

The prompts and their noise are the same each time, so that differences are taken prompt by prompt, and their standard
error is that of paired samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.special import ndtri, stdtr
from torch import Tensor

LEAST = 2  # prompts that a spread can be taken of


@dataclass(frozen=True)
class Change:
    """Means before and after over `count` prompts, the standard error of their difference, and the spread before.

    spread: the standard deviation over the prompts before; nan of a single one, as the error is.
    """

    before: float
    after: float
    error: float
    spread: float
    count: int

    @property
    def mean(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def errors(self) -> float:
        """How many standard errors the change is, signed: those of a normal distribution that are as rare.

        Student's t of few prompts has long tails: of three prompts a change of ten standard errors counts as 2.6.
        0 where there is no change, and for a single prompt.
        """
        if not self.error > 0:  # nan, of a single prompt, or the same change everywhere
            return math.copysign(math.inf, self.mean) if self.error == 0 and self.mean else 0.0
        tail = float(stdtr(self.count - 1, -abs(self.mean) / self.error))
        return math.copysign(-float(ndtri(tail)), self.mean)

    @property
    def spreads(self) -> float:
        """The change in standard deviations of the prompts before; infinite where they were all alike."""
        return self.mean / self.spread if self.spread > 0 else math.copysign(math.inf, self.mean) if self.mean else 0.0


def paired(before: Float[Tensor, " n"], after: Float[Tensor, " n"]) -> Change | None:
    """The change over the prompts of which both numbers are known (are not nan); None where there are none."""
    known = ~(before.isnan() | after.isnan())
    old, new = before[known].double(), after[known].double()
    if not len(old):
        return None
    count = len(old)
    several = count >= LEAST
    error = (new - old).std().item() / math.sqrt(count) if several else math.nan
    return Change(old.mean().item(), new.mean().item(), error, old.std().item() if several else math.nan, count)


def over_epochs(values: Sequence[float], width: int) -> Change | None:
    """The change from the first `width` of a run's epochs to its last, of a number that each logs once.

    The prompts differ, so that the standard error is that of two independent means, and a weaker one. None for fewer
    than twice as many epochs, and for a width of 1.
    """
    known = torch.tensor([value for value in values if math.isfinite(value)], dtype=torch.float64)
    if len(known) < 2 * width or width < LEAST:
        return None
    old, new = known[:width], known[-width:]
    error = ((old.var() + new.var()) / width).sqrt().item()
    return Change(old.mean().item(), new.mean().item(), error, old.std().item(), 2 * width - 1)


def slope(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """The least-squares slope of y on x over what is known of both; 0 where x does not vary."""
    known = ~(x.isnan() | y.isnan())
    across, up = x[known].double(), y[known].double()
    if len(across) < LEAST:
        return 0.0
    across = across - across.mean()
    spread = across.square().sum().item()
    return (across * (up - up.mean())).sum().item() / spread if spread > 0 else 0.0


def shortfall(worth: float, trained: Float[Tensor, " n"], judged: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """By how much a judge of each prompt has gained less than the trained reward's gain should have brought.

        worth * trained - judged

    It is Goodhart's law as a number: it grows as the one is optimised and the other does not come along.

    Args:
        worth: of the judge, what a unit of the trained reward is: the `slope` of the one on the other over pictures
            that nothing was optimised in. 0 where they have nothing in common: what is left is the judge's fall.
        trained, judged: changes; nan where one is not known.
    """
    return worth * trained - judged

"""What holds a policy near its reference, over a run: the KL's coefficient by what the KL is, and a newer reference.

    bands         c <- c factor   where KL > band target,   c <- c / factor   where KL < target / band
    proportional  c <- c (1 + gain clip(KL / target - 1, -most, most))

Bands are PPO's (arXiv:1707.06347, section 4); the proportional rule, which TRL took over, is Ziegler et al.'s
(arXiv:1909.08593, section 2.2). KL is the mean over an epoch's update of what the coefficient multiplies, whichever KL
that is and in the log-prob's reduction, so that a target belongs to a choice of `kl` and `reduce`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from flowalign.transitions import CPS, DDIM, Renoise, Transition, flow_grpo_kl

if TYPE_CHECKING:
    from trainers.base import Trainer


class AdaptiveCoefficient(ABC):
    """A coefficient that follows the KL that it multiplies, epoch by epoch; in the place of a number.

    start: at first. target: the KL that is wanted.
    """

    start: float
    target: float

    @abstractmethod
    def moved(self, coefficient: float, kl: float) -> float:
        """The next epoch's, after one whose KL was this on average."""

    def _check(self) -> None:
        name = type(self).__name__
        if not (math.isfinite(self.start) and self.start > 0 and math.isfinite(self.target) and self.target > 0):
            raise ValueError(
                f"{name}.start and {name}.target must be positive, got {self.start} and {self.target}: a coefficient "
                "of 0 stays there, and no KL is below 0"
            )


@dataclass(frozen=True)
class BandCoefficient(AdaptiveCoefficient):
    """PPO's: nothing is done while the KL is between target / band and target band; its own numbers are 1.5 and 2."""

    start: float
    target: float
    band: float = 1.5
    factor: float = 2.0

    def __post_init__(self) -> None:
        self._check()
        if not self.band >= 1 or not self.factor > 1:
            raise ValueError(
                f"BandCoefficient.band must be at least 1 and factor above 1, got {self.band} and {self.factor}"
            )

    def moved(self, coefficient: float, kl: float) -> float:
        if kl > self.band * self.target:
            return coefficient * self.factor
        return coefficient / self.factor if kl < self.target / self.band else coefficient


@dataclass(frozen=True)
class ProportionalCoefficient(AdaptiveCoefficient):
    """Ziegler et al.'s: in proportion to how far the KL is from the target, of which at most `most` counts.

    gain .1 and most .2 are theirs, so that an epoch moves it by 2 % at most.
    """

    start: float
    target: float
    gain: float = 0.1
    most: float = 0.2

    def __post_init__(self) -> None:
        self._check()
        if not self.gain > 0 or not self.most > 0 or self.gain * self.most >= 1:
            raise ValueError(
                f"ProportionalCoefficient.gain and most must be positive and their product below 1, got {self.gain} "
                f"and {self.most}"
            )

    def moved(self, coefficient: float, kl: float) -> float:
        off = min(max(kl / self.target - 1, -self.most), self.most)
        return coefficient * (1 + self.gain * off)


@dataclass(frozen=True)
class Refresh:
    """A newer reference every `every` epochs, 0 for never: the policy as it is then, or the average of its weights.

    The KL to a policy of a while ago bounds how fast a policy moves, and not how far.
    """

    every: int = 0
    average: bool = False

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"refresh.every must be at least 0, got {self.every}")
        if self.average and not self.every:
            raise ValueError("refresh.average says what the reference becomes, and refresh.every is 0: it stays")

    def renewed(self, trainer: Trainer) -> dict[str, Tensor] | None:
        """The reference from the next epoch on, where an epoch has just been worked; None for as before."""
        if not self.every or (trainer.state.epoch + 1) % self.every:
            return None
        optimizer = trainer.optimizer
        if not self.average:
            return optimizer.snapshot()
        return {name: value.clone() for name, value in optimizer.average.items()}


def older_policy(trainer: Trainer) -> AbstractContextManager[None]:
    """While entered, the network is the policy that the record holds as older, at first what the run starts from."""
    older = trainer.state.older
    if not older:
        return trainer.model.reference()
    return trainer.model.as_older() or trainer.optimizer.holding(older)


def check_kl(kl: Callable[..., Tensor], rules: Iterable[Transition]) -> None:
    """Raises: ValueError for Flow-GRPO's |dt| on steps whose std has no sqrt(-dt) that their code would leave out."""
    other = sorted({type(rule).__name__ for rule in rules if isinstance(rule, (CPS, DDIM, Renoise))})
    if kl is flow_grpo_kl and other:
        raise ValueError(
            f"kl: flow_grpo_kl is of SDE steps, and the plan's are {', '.join(other)}, under which the authors' code "
            "has the exact KL: set kl to flowalign.transitions.exact_kl"
        )


def check_refresh(refresh: Refresh, kl_coef: float, ema_decay: float) -> None:
    """Raises: ValueError for a reference that no loss reads, or for an average that is not kept."""
    if refresh.every and not kl_coef:
        raise ValueError("refresh renews the reference of the KL, and kl_coef is 0: no loss reads it; leave it out")
    if refresh.average and not ema_decay:
        raise ValueError("refresh.average is of the averaged weights, and optimizer.ema_decay is 0: there are none")

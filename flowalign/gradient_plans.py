"""Plans for trainers that go back through steps: where a reward's gradient reaches the policy, and what is drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from flowalign.randomness import key_generator
from flowalign.schedules import Path
from flowalign.transitions import DDIM, ODE, Transition


class GradientPlan(ABC):
    """A plan that says in which steps a reward's gradient reaches the policy, for trainers that go through them."""

    @abstractmethod
    def resolve(self, steps: int, epoch: int, seed: int) -> Path: ...


def _truncated(first: int, steps: int, transition: Transition) -> Path:
    return Path((transition,) * steps, gradient_from=first)


def _check_first(name: str, low: int, high: int, steps: int) -> None:
    if not 0 <= low <= high < steps:
        raise ValueError(
            f"{name} chooses the first step with gradient among {low} to {high}, which have to be "
            f"steps of a rollout of {steps} (0 to {steps - 1}) in that order"
        )


@dataclass(frozen=True)
class LastSteps(GradientPlan):
    """Gradient in the last `count` steps, and none before: DRaFT-K; None for all, DRaFT (arXiv:2309.17400).

    transition: of every step, deterministic by default.
    """

    count: int | None = None
    transition: Transition = ODE()

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        count = steps if self.count is None else self.count
        if not 1 <= count <= steps:
            raise ValueError(f"LastSteps.count is {count}, but a rollout has {steps} steps: choose 1 to {steps}")
        return _truncated(steps - count, steps, self.transition)


@dataclass(frozen=True)
class RandomTruncation(GradientPlan):
    """Gradient from a step that is drawn for every epoch, uniformly among `low` ... `high`, the last step by default.

    AlignProp (arXiv:2310.03739). Its 50 steps are DDIM with eta 1, which is the transition's default too.
    """

    low: int = 1
    high: int | None = None
    transition: Transition = DDIM(1.0)

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        high = steps - 1 if self.high is None else self.high
        _check_first("RandomTruncation", self.low, high, steps)
        first = int(key_generator(seed, "truncation", epoch).integers(self.low, high + 1))
        return _truncated(first, steps, self.transition)


@dataclass(frozen=True)
class GaussianTruncation(GradientPlan):
    """Gradient from a step near `mean`, drawn for every epoch: normal, cut to an integer, anew until it is a step.

    What AlignProp's code does by default (its paper draws uniformly, see `RandomTruncation`): of 50 steps 9.1 have
    gradient on average. Its int() cuts; rounding would give 8.7. Step 0 is left out, as there.
    """

    mean: float = 42.0
    std: float = 5.0
    transition: Transition = DDIM(1.0)

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        if not self.std > 0 or not 1 <= self.mean <= steps - 1:
            raise ValueError(
                f"GaussianTruncation needs a positive std and a mean among the steps 1 to {steps - 1} of a rollout of "
                f"{steps}; got {self.std} and {self.mean}"
            )
        generator = key_generator(seed, "truncation", epoch)
        while not 1 <= (first := int(generator.normal(self.mean, self.std))) < steps:
            pass
        return _truncated(first, steps, self.transition)


@dataclass(frozen=True)
class LateStep(GradientPlan):
    """Gradient in one late step, drawn for every epoch among `low` ... `high`, which goes to sigma 0 at once.

    ReFL (arXiv:2304.05977), whose authors draw among steps 30 to 39 of 40. No later step is made.
    """

    low: int = 30
    high: int = 39

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        _check_first("LateStep", self.low, self.high, steps)
        step = int(key_generator(seed, "late_step", epoch).integers(self.low, self.high + 1))
        return Path((ODE(),) * (step + 1), gradient_from=step, cut=step + 1)

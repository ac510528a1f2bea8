"""Plans whose few stochastic steps move, and tails of fewer steps after the last of them.

A window of stochastic steps moves over the grid as epochs go by, is drawn for every epoch, or for every prompt of an
epoch; all other steps are the ODE's. What follows the last stochastic step has no density and is not replayed, so that
it may be made of fewer steps: `ShortTail` and `Jump` do that to any plan. Evaluation stays on the whole grid.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from flowalign.gradient_plans import GradientPlan
from flowalign.randomness import key_generator
from flowalign.schedules import ChosenSteps, Path, Plan, Window
from flowalign.transitions import ODE, Transition


class PromptPlan(ABC):
    """A plan that may give each prompt of an epoch a path of its own; one prompt's samples all have the same."""

    @abstractmethod
    def of_prompt(self, steps: int, epoch: int, seed: int, prompt: int) -> Path:
        """The path of a prompt, told by its number; all of an epoch have as many stochastic steps."""

    @abstractmethod
    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        """The path of all prompts. Raises: ValueError where they have not the same."""


def path_of(plan: Plan, steps: int, epoch: int, seed: int, prompt: int) -> Path:
    """What a plan does for a prompt."""
    if isinstance(plan, PromptPlan):
        return plan.of_prompt(steps, epoch, seed, prompt)
    return plan.resolve(steps, epoch, seed)


def _check_window(name: str, length: int, low: int, high: int, steps: int) -> None:
    if not 1 <= length <= high - low or low < 0 or high > steps:
        raise ValueError(
            f"{name} has a window of {length} steps among the steps {low} to {high - 1}, which does not lie in a "
            f"rollout of {steps} steps (0 to {steps - 1})"
        )


@dataclass(frozen=True)
class SlidingWindow:
    """Of MixGRPO (arXiv:2507.21802): every `every` epochs the window moves on by `stride`, until it is at the end.

        start = min(stride floor(epoch / every), end - length)

    end: the first step that the window never reaches, by default the end of the grid. MixGRPO's authors leave the last
    two steps out.
    """

    transition: Transition
    length: int = 4
    every: int = 25
    stride: int = 1
    end: int | None = None
    shared_noise: bool = False

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        end = steps if self.end is None else self.end
        _check_window("SlidingWindow", self.length, 0, end, steps)
        _check_pace("SlidingWindow", self.every, self.stride)
        start = min(self.stride * (epoch // self.every), end - self.length)
        return Window(self.transition, start, self.length, self.shared_noise).resolve(steps, epoch, seed)


@dataclass(frozen=True)
class RollingWindow:
    """As `SlidingWindow`, but the window slides out at the end, cut short, and then starts anew.

    What MixGRPO's code does with `roll_back`; the epochs that it spends with no step at all in its window are left out.
    """

    transition: Transition
    length: int = 4
    every: int = 25
    stride: int = 1
    end: int | None = None
    shared_noise: bool = False

    def epochs_at(self, start: int, end: int) -> int:
        """How many epochs the window stays at a start."""
        return self.every

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        end = steps if self.end is None else self.end
        _check_window(type(self).__name__, self.length, 0, end, steps)
        _check_pace(type(self).__name__, self.every, self.stride)
        turns = [start for start in range(0, end, self.stride) for _ in range(self.epochs_at(start, end))]
        start = turns[epoch % len(turns)]
        chosen = tuple(range(start, min(start + self.length, end)))
        return ChosenSteps(self.transition, chosen, self.shared_noise).resolve(steps, epoch, seed)


@dataclass(frozen=True)
class LinearlyHastenedWindow(RollingWindow):
    """Late windows stay for fewer epochs: max(least, floor(every (1 - p) + least p)) at p = start / end.

    MixGRPO's code calls it "decay"; its `least` is a quarter of `every` where it is not given.
    """

    least: int = 1

    def epochs_at(self, start: int, end: int) -> int:
        if not 1 <= self.least <= self.every:
            raise ValueError(f"LinearlyHastenedWindow.least must lie in 1 ... every = {self.every}, got {self.least}")
        share = start / end
        return max(self.least, int(self.every * (1 - share) + self.least * share))


@dataclass(frozen=True)
class ExponentiallyHastenedWindow(RollingWindow):
    """Late windows stay for fewer epochs: ceil(every exp(-rate max(start - threshold, 0))).

    MixGRPO's code calls it "exp_decay".
    """

    threshold: int = 13
    rate: float = 0.1

    def epochs_at(self, start: int, end: int) -> int:
        if not self.rate > 0:
            raise ValueError(f"ExponentiallyHastenedWindow.rate must be positive, got {self.rate}")
        return math.ceil(self.every * math.exp(-self.rate * max(start - self.threshold, 0)))


def _check_pace(name: str, every: int, stride: int) -> None:
    if every < 1 or stride < 1:
        raise ValueError(f"{name}.every and stride must be at least 1, got {every} and {stride}")


def _start(purpose: str, low: int, high: int, length: int, seed: int, *key: int) -> int:
    return int(key_generator(seed, purpose, *key).integers(low, high - length + 1))


@dataclass(frozen=True)
class RandomWindow:
    """The window's start is drawn for every epoch, so that it lies among the steps `low` ... `high` - 1.

    Flow-GRPO-Fast (github.com/yifan123/flow_grpo): two steps in the first half of the grid, from an ODE prefix that a
    group shares (shared_noise). MixGRPO's "random" (arXiv:2507.21802) too.

    high: None for the end of the grid.
    """

    transition: Transition
    length: int = 2
    low: int = 0
    high: int | None = None
    shared_noise: bool = False

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        high = steps if self.high is None else self.high
        _check_window("RandomWindow", self.length, self.low, high, steps)
        start = _start("window", self.low, high, self.length, seed, epoch)
        return Window(self.transition, start, self.length, self.shared_noise).resolve(steps, epoch, seed)


@dataclass(frozen=True)
class PromptWindow(PromptPlan):
    """As `RandomWindow`, but every prompt of an epoch has a window of its own, the same for all of its samples.

    Flash-GRPO (arXiv:2605.15980): with one step each, an epoch trains all steps at one call with gradient per sample,
    and no sample is compared with one that had its noise at another step. Its correction of what steps weigh is
    `flowalign.step_weights.even_gradients`. Drawn from (seed, epoch, prompt).
    """

    transition: Transition
    length: int = 1
    low: int = 0
    high: int | None = None
    shared_noise: bool = False

    def of_prompt(self, steps: int, epoch: int, seed: int, prompt: int) -> Path:
        high = steps if self.high is None else self.high
        _check_window("PromptWindow", self.length, self.low, high, steps)
        start = _start("prompt_window", self.low, high, self.length, seed, epoch, prompt)
        return Window(self.transition, start, self.length, self.shared_noise).resolve(steps, epoch, seed)

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        raise ValueError(
            "PromptWindow gives each prompt stochastic steps of its own; where all are to have the same, "
            "take RandomWindow or Window"
        )


def _tail_of(path: Path, name: str) -> int:
    """The point from which a path is the ODE's to its end."""
    if not path.stochastic:
        raise ValueError(f"{name} shortens what follows the last stochastic step, but its plan has none")
    if path.cut is not None or path.passed:
        raise ValueError(f"{name} is given a plan whose tail is shortened already: shorten it once")
    return path.stochastic[-1] + 1


def _check_inner(plan: Plan, name: str) -> None:
    if isinstance(plan, GradientPlan):
        raise ValueError(
            f"{name} is given {type(plan).__name__}, which says where a reward's gradient flows and by which steps a "
            "rollout ends; shorten plans with stochastic steps"
        )


@dataclass(frozen=True)
class ShortTail(PromptPlan):
    """A plan whose tail, the steps after the last stochastic one, visits one in `every` of the grid's points.

    With that step ending at point k the tail visits k, k + 1, k + 1 + every, k + 1 + 2 every ... and the end of the
    grid: G2RPO's tails of granularity `every` (arXiv:2510.01982), whose code may end without the last point. 1 leaves
    all as it is. Steps before the tail, their numbers and their noise stay as they are.
    """

    plan: Plan
    every: int = 2

    def __post_init__(self) -> None:
        _check_inner(self.plan, "ShortTail")
        if self.every < 1:
            raise ValueError(f"ShortTail.every must be at least 1, got {self.every}")

    def of_prompt(self, steps: int, epoch: int, seed: int, prompt: int) -> Path:
        return self._shortened(path_of(self.plan, steps, epoch, seed, prompt))

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        return self._shortened(self.plan.resolve(steps, epoch, seed))

    def _shortened(self, path: Path) -> Path:
        start, end = _tail_of(path, "ShortTail"), len(path.transitions)
        passed = tuple(point for point in range(start + 2, end) if (point - start - 1) % self.every)
        return replace(path, transitions=path.transitions[: end - len(passed)], passed=passed)


@dataclass(frozen=True)
class Jump(PromptPlan):
    """A plan whose tail is one Euler step to sigma 0, x - sigma v: the denoised latents after the last stochastic step.

    Talk2Move's shortcut (arXiv:2601.02356). Nothing changes where that step is the grid's last.
    """

    plan: Plan

    def __post_init__(self) -> None:
        _check_inner(self.plan, "Jump")

    def of_prompt(self, steps: int, epoch: int, seed: int, prompt: int) -> Path:
        return self._shortened(path_of(self.plan, steps, epoch, seed, prompt))

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        return self._shortened(self.plan.resolve(steps, epoch, seed))

    def _shortened(self, path: Path) -> Path:
        start = _tail_of(path, "Jump")
        if start == len(path.transitions):
            return path
        return replace(path, transitions=(*path.transitions[:start], ODE()), cut=start + 1)

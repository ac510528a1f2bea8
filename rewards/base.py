"""What every reward is, and how rewards are added up.

A reward maps media and prompts to scores: higher is better, float32, differentiable where `differentiable` says so. A
score that could not be had is marked invalid and never replaced by a number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.records import Media, Prompts, Scores


class Reward(ABC):
    """Scores media for prompts. Sums, differences and multiples of rewards are rewards and keep their parts.

    name: of its part in the scores. differentiable: whether scores carry a gradient to the pixels.
    """

    name: str
    differentiable: bool = False

    @abstractmethod
    def score(self, media: Media, prompts: Prompts) -> Scores:
        """Scores of each of the media for its prompt."""

    def __add__(self, other: Reward | float) -> WeightedSum:
        return _sum(self, other, 1.0)

    def __radd__(self, other: float) -> WeightedSum:
        return _sum(self, other, 1.0)

    def __sub__(self, other: Reward | float) -> WeightedSum:
        return _sum(self, other, -1.0)

    def __rsub__(self, other: float) -> WeightedSum:
        return _sum(-self, other, 1.0)

    def __mul__(self, factor: float) -> WeightedSum:
        return WeightedSum((self,), (float(factor),))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> WeightedSum:
        return self * (1 / divisor)

    def __neg__(self) -> WeightedSum:
        return self * -1.0


def simple_scores(name: str, total: Float[Tensor, " b"], parts: dict[str, Tensor] | None = None) -> Scores:
    """Scores in float32 of a reward that has one number per sample; those that are not finite are not valid."""
    total = total.float()
    return Scores(total, {name: total, **(parts or {})}, torch.isfinite(total.detach()))


class WeightedSum(Reward):
    """constant + sum_k weight_k reward_k; its parts are its terms', and invalid where any term is.

    Two rewards with a part of one name get a number behind it, in the order given.
    """

    name = "sum"

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float], constant: float = 0.0) -> None:
        if not rewards or len(rewards) != len(weights):
            raise ValueError(f"a weighted sum needs as many weights as rewards, got {len(weights)} and {len(rewards)}")
        self.rewards, self.weights, self.constant = tuple(rewards), tuple(map(float, weights)), float(constant)
        self.differentiable = all(reward.differentiable for reward in rewards)

    def score(self, media: Media, prompts: Prompts) -> Scores:
        terms = [reward.score(media, prompts) for reward in self.rewards]
        total = torch.stack([weight * term.total for weight, term in zip(self.weights, terms, strict=True)]).sum(0)
        valid = torch.stack([term.valid for term in terms]).all(0)
        return Scores(total + self.constant, join_parts(terms), valid)


class Minimum(Reward):
    """The least of several rewards, so that none can be bought with another; gradient runs through the least."""

    name = "minimum"

    def __init__(self, rewards: Sequence[Reward]) -> None:
        if not rewards:
            raise ValueError("a minimum needs at least one reward")
        self.rewards = tuple(rewards)
        self.differentiable = all(reward.differentiable for reward in rewards)

    def score(self, media: Media, prompts: Prompts) -> Scores:
        terms = [reward.score(media, prompts) for reward in self.rewards]
        total = torch.stack([term.total for term in terms]).amin(0)
        return Scores(total, join_parts(terms), torch.stack([term.valid for term in terms]).all(0))


def join_parts(terms: Sequence[Scores]) -> dict[str, Tensor]:
    """The parts of several scores under names of their own."""
    joined: dict[str, Tensor] = {}
    for term in terms:
        for name, value in term.parts.items():
            free, number = name, 2
            while free in joined:
                free, number = f"{name}_{number}", number + 1
            joined[free] = value
    return joined


def _sum(left: Reward, right: Reward | float, weight: float) -> WeightedSum:
    a = _as_sum(left)
    if not isinstance(right, Reward):
        return WeightedSum(a.rewards, a.weights, a.constant + weight * right)
    b = _as_sum(right)
    weights = a.weights + tuple(weight * w for w in b.weights)
    return WeightedSum(a.rewards + b.rewards, weights, a.constant + weight * b.constant)


def _as_sum(reward: Reward) -> WeightedSum:
    return reward if isinstance(reward, WeightedSum) else WeightedSum((reward,), (1.0,))


class FunctionReward(Reward):
    """A callable `(media: Media, prompts: Prompts) -> one number per sample` as a reward.

    The callable may return a tensor [b], a sequence of b numbers, or `Scores`. What is not finite is not valid.

    Raises: ValueError where the callable returns something else, or another number of scores.
    """

    def __init__(self, function: Callable[[Media, Prompts], Any], differentiable: bool = False) -> None:
        self.function, self.differentiable = function, differentiable
        self.name = getattr(function, "__name__", type(function).__name__)

    def score(self, media: Media, prompts: Prompts) -> Scores:
        made = self.function(media, prompts)
        if not isinstance(made, Scores):
            made = simple_scores(self.name, self._checked(made, len(media)))
        self._checked(made.total, len(media))
        return made

    def _checked(self, made: Any, count: int) -> Tensor:
        try:
            total = torch.as_tensor(made)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"reward {self.name} must return numbers, it returned {made!r:.80}") from error
        if total.shape != (count,):
            raise ValueError(
                f"reward {self.name} must return one number for each of {count} samples, "
                f"it returned the shape {tuple(total.shape)}"
            )
        return total.float()


def as_reward(reward: Reward | Callable[..., Any]) -> Reward:
    """The reward itself, or a callable wrapped as one.

    Raises: ValueError for anything else.
    """
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, type) or not callable(reward):
        raise ValueError(f"reward must be a Reward or a callable (media, prompts) -> scores, got {reward!r}")
    return FunctionReward(reward)

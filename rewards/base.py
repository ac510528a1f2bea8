"""What every reward is, and how rewards are added up.

A reward maps media and prompts to scores: higher is better, float32, differentiable where `differentiable` says so. A
score that could not be had is marked invalid and never replaced by a number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.records import Media, Prompts, Scores


@dataclass(frozen=True)
class Card:
    """What a reward is.

    weights: hub id and file, or where else they are from. licence: of the weights. usual: the range most scores lie in.
    modality: what it looks at; "any" for what passes its media on. scope: what one score depends on: its own sample,
    the samples of its group, which have to be scored together, or all that are scored together.
    """

    weights: str = ""
    licence: str = ""
    usual: tuple[float, float] | None = None
    modality: Literal["image", "video", "latent", "any"] = "image"
    scope: Literal["sample", "group", "set"] = "sample"


class Reward(ABC):
    """Scores media for prompts. Sums, differences and multiples of rewards are rewards and keep their parts.

    A new reward writes `score`; a reward is used by calling it, which checks what goes in and what comes out.

    name: of its part in the scores. differentiable: whether scores carry a gradient to the pixels.
    """

    name: str
    differentiable: bool = False
    card: Card = Card()

    @abstractmethod
    def score(self, media: Media, prompts: Prompts) -> Scores:
        """Scores of each of the media for its prompt."""

    def __call__(self, media: Media, prompts: Prompts, *, grad: bool = False, chunk: int | None = None) -> Scores:
        """Scores in float32, with their graph to the pixels if `grad`; what is not finite is not valid.

        Args:
            chunk: the most media scored at once, for what scores each on its own.

        Raises: ValueError for another number of prompts than media, for media of the wrong kind, for `grad` where there
        is no gradient, and for samples of groups without their group's numbers.
        """
        self._check(media, prompts, grad)
        size = len(media) if chunk is None or self.card.scope != "sample" else chunk
        with torch.set_grad_enabled(grad):
            parts = [self._part(media, prompts, start, size) for start in range(0, len(media), max(size, 1))]
        scores = join_scores(parts) if parts else Scores(torch.zeros(0), {}, torch.zeros(0, dtype=torch.bool))
        total = scores.total.float()
        return Scores(total, scores.parts, scores.valid & total.detach().isfinite())

    def _part(self, media: Media, prompts: Prompts, start: int, size: int) -> Scores:
        if size >= len(media):
            return self.score(media, prompts)
        index = [*range(start, min(start + size, len(media)))]
        return self.score(media.rows(index), prompts.rows(index))

    def _check(self, media: Media, prompts: Prompts, grad: bool) -> None:
        name, card = type(self).__name__, self.card
        if len(media) != len(prompts):
            raise ValueError(f"{name}: {len(media)} media but {len(prompts)} prompts")
        if card.modality == "image" and media.is_video:
            raise ValueError(f"{name} scores pictures, and these are videos: wrap it as rewards.OnFrames({name}(...))")
        if card.modality == "video" and not media.is_video:
            raise ValueError(f"{name} scores videos [b, f, 3, h, w], and these are pictures")
        if grad and not self.differentiable:
            raise ValueError(f"{name} has no gradient: it cannot be backpropagated through")
        if card.scope == "group" and prompts.groups is None:
            raise ValueError(f"{name} compares the samples of a group: it needs their group numbers (Prompts.groups)")

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


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Scores of several batches as one."""
    names = parts[0].parts
    return Scores(
        torch.cat([part.total for part in parts]),
        {name: torch.cat([part.parts[name] for part in parts]) for name in names},
        torch.cat([part.valid for part in parts]),
    )


def joint_card(rewards: Sequence[Reward]) -> Card:
    """The card of a combination: it looks at what its terms look at, and at as many samples as the widest of them."""
    scopes = ("sample", "group", "set")
    widest = max((reward.card.scope for reward in rewards), key=scopes.index)
    kinds = {reward.card.modality for reward in rewards} - {"any"}
    return Card(modality=kinds.pop() if len(kinds) == 1 else "any", scope=widest)


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
        self.card = joint_card(rewards)

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
        self.card = joint_card(rewards)

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

    card = Card(modality="any")

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

"""What every reward is, and how rewards are added up.

A reward maps media and prompts to scores: higher is better, float32, differentiable where `differentiable` says so. A
score that could not be had is marked invalid and never replaced by a number.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowalign.config.paths import OUTSIDE, names_code
from flowalign.out_of_memory import ADVICE, CallSize
from flowalign.records import Media, Prompts, Scores
from rewards.card import SCOPES
from rewards.card import Card as Card
from rewards.joined import join_scores, spread
from rewards.pixels import finite


class Reward(ABC):
    """Scores media for prompts. Sums, differences and multiples of rewards are rewards and keep their parts.

    A new reward writes `score`; a reward is used by calling it, which checks what goes in and what comes out.

    name: of its part in the scores. differentiable: whether scores carry a gradient to the pixels. ahead: calls under
    way meanwhile, in threads, where a reward computes elsewhere; with more than one it draws no random number here.
    """

    name: str
    differentiable: bool = False
    ahead: int = 0
    card: Card = Card()

    @abstractmethod
    def score(self, media: Media, prompts: Prompts) -> Scores:
        """Scores of each of the media for its prompt."""

    def __call__(self, media: Media, prompts: Prompts, *, grad: bool = False, chunk: int | None = None) -> Scores:
        """Scores in float32, with their graph to the pixels if `grad`; what is not finite is not valid.

        Nor are media with a pixel that is not finite; without `grad` the reward does not see them, as black pictures.

        Args:
            chunk: the most media scored at once, for what scores each on its own.

        Raises: ValueError for another number of prompts than media, for media of the wrong kind, for `grad` where there
        is no gradient, and for samples of groups without their group's numbers.
        """
        self._check(media, prompts, grad)
        whole = finite(media.pixels)
        with torch.set_grad_enabled(grad):
            if grad or whole.all() or not whole.any():
                scores = self._chunked(media, prompts, grad, chunk)
            else:
                rows = whole.nonzero().flatten().tolist()
                scores = spread(self._chunked(media.rows(rows), prompts.rows(rows), grad, chunk), rows, len(media))
        total = scores.total.float()
        valid = scores.valid & total.detach().isfinite() & whole.to(scores.valid.device)
        return replace(scores, total=total, valid=valid)

    @cached_property
    def call_size(self) -> CallSize:
        """How many media are scored at once, once memory has run out."""
        return CallSize(f"scoring by {self.name}", ADVICE["reward"])

    def _chunked(self, media: Media, prompts: Prompts, grad: bool, chunk: int | None) -> Scores:
        parts = self._parts(media, prompts, grad, chunk or len(media))
        return join_scores(parts) if parts else Scores(torch.zeros(0), {}, torch.zeros(0, dtype=torch.bool))

    def _parts(self, media: Media, prompts: Prompts, grad: bool, chunk: int) -> list[Scores]:
        count, alone = len(media), self.card.scope == "sample"

        def some(at: range) -> Scores:
            return self.score(*(media, prompts) if len(at) == count else (media.rows([*at]), prompts.rows(at)))

        if alone and not grad:
            return self.call_size.apart(count, chunk, some)
        size = max(chunk if alone else count, 1)
        return [some(range(start, min(start + size, count))) for start in range(0, count, size)]

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

    def __mul__(self, factor: Reward | float) -> Combination:
        return Product((self, factor)) if isinstance(factor, Reward) else WeightedSum((self,), (float(factor),))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Combination:
        return self * (1 / divisor)

    def __neg__(self) -> Combination:
        return self * -1.0


def joint_card(rewards: Sequence[Reward]) -> Card:
    """The card of a combination: it looks at what its terms look at, and at as many samples as the widest of them."""
    widest = max((reward.card.scope for reward in rewards), key=SCOPES.index)
    kinds = {reward.card.modality for reward in rewards} - {"any"}
    opens = any(reward.card.opens_files for reward in rewards)
    return Card(modality=kinds.pop() if len(kinds) == 1 else "any", scope=widest, opens_files=opens)


def simple_scores(name: str, total: Float[Tensor, " b"], parts: dict[str, Tensor] | None = None) -> Scores:
    """Scores in float32 of a reward that has one number per sample; those that are not finite are not valid."""
    total = total.float()
    return Scores(total, {name: total, **(parts or {})}, torch.isfinite(total.detach()))


class Combination(Reward):
    """A reward made of others: differentiable where all of them are; it looks at as many samples as the widest."""

    def __init__(self, rewards: Sequence[Reward]) -> None:
        if not rewards:
            raise ValueError(f"{type(self).__name__} needs at least one reward")
        self.rewards = tuple(rewards)
        self.differentiable = all(reward.differentiable for reward in rewards)
        self.ahead = min(reward.ahead for reward in rewards)
        self.card = joint_card(rewards)


class Elementwise(Combination):
    """A combination whose `combine` makes one total of its terms'. Their parts are kept, with their own values.

    A score is valid where all terms' are, and the total is finite; where it is not, it is nan and has no gradient.
    """

    @abstractmethod
    def combine(self, totals: Float[Tensor, "k b"]) -> Float[Tensor, " b"]:
        """The total of each sample from those of the terms, all finite: 1 stands in where one is not valid."""

    def score(self, media: Media, prompts: Prompts) -> Scores:
        terms = [reward.score(media, prompts) for reward in self.rewards]
        totals, valid = valid_totals(terms)
        return masked(self.combine(totals), terms, valid)


def valid_totals(terms: Sequence[Scores]) -> tuple[Float[Tensor, "k b"], Bool[Tensor, " b"]]:
    """The totals of several scores, 1 where they are not valid, and where all of them are valid."""
    known = torch.stack([term.valid & term.total.detach().isfinite() for term in terms])
    return torch.stack([term.total for term in terms]).where(known, 1.0), known.all(0)


def masked(total: Float[Tensor, " b"], terms: Sequence[Scores], valid: Bool[Tensor, " b"]) -> Scores:
    """A total with its terms' parts, nan and invalid where it is not `valid` or not finite."""
    valid = valid & total.detach().isfinite()
    return Scores(total.where(valid, torch.nan), join_parts(terms), valid)


class WeightedSum(Elementwise):
    """constant + sum_k weight_k reward_k; its parts are its terms', and invalid where any term is.

    Two rewards with a part of one name get a number behind it, in the order given.
    """

    name = "sum"

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float], constant: float = 0.0) -> None:
        if not rewards or len(rewards) != len(weights):
            raise ValueError(f"a weighted sum needs as many weights as rewards, got {len(weights)} and {len(rewards)}")
        super().__init__(rewards)
        self.weights, self.constant = tuple(map(float, weights)), float(constant)
        if not all(map(math.isfinite, (*self.weights, self.constant))):
            raise ValueError(f"weights and constant must be finite, got {self.weights} and {self.constant}")

    def combine(self, totals: Float[Tensor, "k b"]) -> Float[Tensor, " b"]:
        weighted = torch.stack([weight * total for weight, total in zip(self.weights, totals, strict=True)])
        return weighted.sum(0) + self.constant


class Minimum(Elementwise):
    """The least of several rewards, so that none can be bought with another; gradient runs through the least."""

    name = "minimum"

    def combine(self, totals: Float[Tensor, "k b"]) -> Float[Tensor, " b"]:
        return totals.amin(0)


class Product(Elementwise):
    """The product of several rewards, meant for rewards >= 0: of two negative ones it is positive."""

    name = "product"

    def combine(self, totals: Float[Tensor, "k b"]) -> Float[Tensor, " b"]:
        return totals.prod(0)


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

    It may return a tensor [b], a sequence of b numbers, or `Scores`. None and what is not finite are not valid.

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
        if isinstance(made, list | tuple):
            made = [math.nan if one is None else one for one in made]
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


def as_reward(reward: Reward | Callable[..., Any] | str) -> Reward:
    """The reward itself, a callable wrapped as one, or the reward that an expression such as "clip - 0.1*jpeg" names.

    Raises: ValueError for anything else, and as `rewards.expression.parse_reward` does.
    """
    if isinstance(reward, Reward):
        return reward
    what = "reward must be a Reward or a callable (media, prompts) -> scores, or an expression of rewards"
    if isinstance(reward, str):
        from rewards.expression import ExpressionError, parse_reward  # which is made of all that is here

        try:
            return parse_reward(reward)
        except ExpressionError as error:
            if names_code(reward):
                raise ValueError(f"{reward} is code {OUTSIDE}") from error
            raise ValueError(f"{what}: {error}") from error
    if isinstance(reward, type) or not callable(reward):
        raise ValueError(f"{what}, got {reward!r}")
    return FunctionReward(reward)

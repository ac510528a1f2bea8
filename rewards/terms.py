"""The terms of a weighted reward told apart, for credit that normalises each of them on its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from flowalign.records import Media, Prompts, Scores
from rewards.base import Reward, WeightedSum, masked, valid_totals

PREFIX = "term/"  # of the parts that hold the terms' totals


class Terms(WeightedSum):
    """The same weighted sum, with each term's own total among the scores' parts, as "term/<name>".

    A part that has a term's name may be something else: what a normaliser is of, for one. Two terms of one name get a
    number behind it.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float], constant: float = 0.0) -> None:
        super().__init__(rewards, weights, constant)
        names = [reward.name for reward in rewards]
        again = [names[:at].count(name) + 1 for at, name in enumerate(names)]
        self.names = tuple(name if n == 1 else f"{name}_{n}" for name, n in zip(names, again, strict=True))
        self.parts = tuple(f"{PREFIX}{name}" for name in self.names)

    def score(self, media: Media, prompts: Prompts) -> Scores:
        terms = [reward.score(media, prompts) for reward in self.rewards]
        totals, valid = valid_totals(terms)
        made = masked(self.combine(totals), terms, valid)
        apart = {name: total.where(made.valid, torch.nan) for name, total in zip(self.parts, totals, strict=True)}
        return replace(made, parts=made.parts | apart)


def with_terms(reward: Reward) -> Terms:
    """A reward as the weighted sum that it is, sums within sums opened; any other is a sum of one term."""
    opened = [*_opened(reward, 1.0)]
    return Terms([term for term, _ in opened], [weight for _, weight in opened], _constant(reward))


def _opened(reward: Reward, weight: float) -> Iterator[tuple[Reward, float]]:
    if not isinstance(reward, WeightedSum):
        yield reward, weight
        return
    for term, own in zip(reward.rewards, reward.weights, strict=True):
        yield from _opened(term, weight * own)


def _constant(reward: Reward) -> float:
    if not isinstance(reward, WeightedSum):
        return 0.0
    inner = sum(weight * _constant(term) for term, weight in zip(reward.rewards, reward.weights, strict=True))
    return reward.constant + inner

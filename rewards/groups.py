"""Rewards that compare the samples of a group, which is what a prompt's samples are to one another in GRPO.

A score depends on its own group alone: neither on other groups nor on the order. A group of one has nothing to compare
with, and its sample no score. Samples without a score of their own are left out of the comparisons of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, combinations
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, Reward, join_parts, simple_scores
from rewards.pixels import finite
from rewards.sets import Embedder, embeddings

Preference: TypeAlias = Callable[[Media, Media, Prompts], Tensor]


class WinRate(Reward):
    """The mean probability that a judge prefers a sample to the others of its group, in [0, 1]; not differentiable.

    Pref-GRPO (arXiv:2508.20751): scores of a reward model that hardly differ turn into large advantages once they are
    divided by their spread, and win rates do not. Costs n (n - 1) / 2 comparisons for a group of n, twice that with
    both orders.

    Args:
        judge: (first, second, prompts) -> the probability [n] in [0, 1] that the first is better for the prompt, for
            each of n pairs; 1/2 is a tie, nan where it cannot say. It must not depend on the other pairs.
        both_orders: asks for each pair again with its sides exchanged and takes the mean, since judges that are
            language models prefer a side; without it such a judge makes the order of samples matter.
        batch_size: pairs that the judge is given at once.

    Raises: ValueError where the judge returns another number of answers, or what is no probability.
    """

    name = "win_rate"
    card = Card(usual=(0.0, 1.0), modality="any", scope="group")

    def __init__(self, judge: Preference, both_orders: bool = True, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.judge, self.both_orders, self.batch_size = judge, both_orders, batch_size

    def score(self, media: Media, prompts: Prompts) -> Scores:
        pairs = [pair for group in groups_of(prompts) for pair in combinations(group, 2)]
        chances = self._judged(media, prompts, pairs)
        if self.both_orders:
            exchanged = self._judged(media, prompts, [(second, first) for first, second in pairs])
            chances = [(a + 1 - b) / 2 for a, b in zip(chances, exchanged, strict=True)]
        wins: list[list[float]] = [[] for _ in range(len(media))]
        for (first, second), chance in zip(pairs, chances, strict=True):
            wins[first].append(chance)
            wins[second].append(1 - chance)
        rates = torch.tensor([_mean_judged(own) for own in wins], device=media.pixels.device)
        return simple_scores(self.name, rates)

    def _judged(self, media: Media, prompts: Prompts, pairs: Sequence[tuple[int, int]]) -> list[float]:
        answers: list[float] = []
        for start in range(0, len(pairs), self.batch_size):
            part = pairs[start : start + self.batch_size]
            first, second = [pair[0] for pair in part], [pair[1] for pair in part]
            made = self.judge(media.rows(first), media.rows(second), prompts.rows(first)).tolist()
            if len(made) != len(part) or any(chance < 0 or chance > 1 for chance in made):
                raise ValueError(f"a judge of {len(part)} pairs returns as many probabilities, this one {made!r:.80}")
            answers += made
        return answers


class PairwiseWinRate(Reward):
    """The mean probability that a sample beats the others of its group by their own scores, in [0, 1].

        mean over j of 1 if r_i > r_j, 1/2 if r_i = r_j, else 0           without a temperature
        mean over j of sigmoid((r_i - r_j) / temperature)                 with one

    `WinRate` (Pref-GRPO, arXiv:2508.20751) with a judge that compares rewards, at the cost of the rewards alone. The
    gradient of the smooth one is the reward's; the other has none.

    Args:
        reward: what is compared; its parts stay parts.
        temperature: above 0, in units of the reward; for a reward that is the logit of a preference, 1.

    Raises: ValueError for another temperature, and for a reward that compares more than groups.
    """

    name = "pairwise_win_rate"

    def __init__(self, reward: Reward, temperature: float | None = None) -> None:
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be above 0, or None for wins and losses, got {temperature}")
        if reward.card.scope == "set":
            raise ValueError(f"{reward.name} scores a whole set at once: its scores in a group depend on other groups")
        self.reward, self.temperature = reward, temperature
        self.differentiable = temperature is not None and reward.differentiable
        self.card = replace(reward.card, usual=(0.0, 1.0), scope="group")

    def score(self, media: Media, prompts: Prompts) -> Scores:
        inner = self.reward.score(media, prompts)
        known = inner.valid & inner.total.detach().isfinite()
        rates = within_groups(prompts, inner.total.float(), known, self._rates)
        own = simple_scores(self.name, rates)
        return Scores(own.total, join_parts([own, inner]), own.valid)

    def _rates(self, scores: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        ahead = scores[:, None] - scores
        wins = (ahead.sign() + 1) / 2 if self.temperature is None else torch.sigmoid(ahead / self.temperature)
        return (wins.sum(1) - 0.5) / (len(scores) - 1)  # a sample ties with itself


class Rank(PairwiseWinRate):
    """A sample's rank in its group, from 0 for the lowest to 1 for the highest; ties share their mean rank.

    (rank - 1) / (n - 1), which is the win rate without a temperature. A group's ranks have the mean 1/2, and without
    ties the same spread whatever the reward.
    """

    name = "rank"

    def __init__(self, reward: Reward) -> None:
        super().__init__(reward)


class GroupDiversity(Reward):
    """What a sample adds to the diversity of its group: D(group) - D(group without it).

        D = mean over pairs of 1 - cos(e_i, e_j)

    of pictures' embeddings e, and 0 for one picture. It is positive for a sample that is farther from the others than
    they are from one another, negative for a duplicate. Alone it rewards whatever is odd: add it to a reward of
    quality. The gradient is the embedder's.

    Args:
        embedder: pictures [b, 3, h, w] in [0, 1] to embeddings [b, d], each picture on its own.
        batch_size: pictures that the embedder is given at once.
    """

    name = "group_diversity"
    differentiable = True
    card = Card(usual=(-0.2, 0.2), scope="group")

    def __init__(self, embedder: Embedder, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.embedder, self.batch_size = embedder, batch_size

    def score(self, media: Media, prompts: Prompts) -> Scores:
        features = embeddings(self.embedder, media, self.name, self.batch_size)
        known = finite(media.pixels) & features.detach().isfinite().all(1)
        with torch.autocast(features.device.type, enabled=False):
            added = within_groups(prompts, features, known, diversity_added)
        return simple_scores(self.name, added.to(media.pixels.device))


def diversity_added(features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Mean pairwise cosine distance of at least two features, less that of the others alone, for each of them."""
    count, units = len(features), F.normalize(features, dim=1)
    distances = 1 - units @ units.T
    distances = distances - distances.diag().diag()  # a feature is at 0 from itself, but for rounding
    own, whole = distances.sum(1), distances.sum()
    others = (whole - 2 * own) / max((count - 1) * (count - 2), 1)
    return whole / (count * (count - 1)) - others


def groups_of(prompts: Prompts) -> Iterator[list[int]]:
    """The rows of each group."""
    if prompts.groups is None:
        raise ValueError("samples are compared within groups: Prompts.groups is missing")
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(prompts.groups):
        rows.setdefault(group, []).append(row)
    yield from rows.values()


def within_groups(
    prompts: Prompts,
    values: Float[Tensor, b * d],
    known: Bool[Tensor, " b"],
    compare: Callable[[Tensor], Tensor],
) -> Float[Tensor, " b"]:
    """`compare` of the known values of each group; nan for what is not known, and for what is alone."""
    scored = known.tolist()
    rows = [[row for row in group if scored[row]] for group in groups_of(prompts)]
    rows = [group for group in rows if len(group) > 1]
    scores = values.new_full((len(values),), torch.nan)
    if not rows:
        return scores
    compared = torch.cat([compare(values[group]) for group in rows])
    return scores.index_put((torch.tensor([*chain(*rows)], device=values.device),), compared)


def _mean_judged(wins: Sequence[float]) -> float:
    """The mean of a sample's comparisons without those that are nan; nan if there are none."""
    judged = [chance for chance in wins if not math.isnan(chance)]
    return sum(judged) / len(judged) if judged else math.nan

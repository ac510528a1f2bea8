"""Rewards made of rewards: bounds, normalisers, gates and ensembles; sums, minima and products are in rewards/base.py.

Each is again a reward: it keeps the parts of what it is made of, with their own values, and is valid where all that it
needs is. It has a gradient where its terms have one, and it is exact: zero where a bound or a gate holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.records import Media, Prompts, Scores
from rewards.base import Combination, Elementwise, Reward, masked, valid_totals


class Clip(Elementwise):
    """min(max(reward, low), high); no gradient where the reward is below `low` or above `high`.

    Raises: ValueError without a bound, and for low >= high.
    """

    name = "clip"

    def __init__(self, reward: Reward, low: float | None = None, high: float | None = None) -> None:
        lowest, highest = -math.inf if low is None else low, math.inf if high is None else high
        if (low is None and high is None) or not lowest < highest:
            raise ValueError(f"a clip needs a bound, and low below high, got {low} and {high}")
        super().__init__([reward])
        self.low, self.high = lowest, highest
        if low is not None and high is not None:
            self.card = replace(self.card, usual=(low, high))

    def combine(self, totals: Float[Tensor, "1 b"]) -> Float[Tensor, " b"]:
        return totals[0].clamp(self.low, self.high)


class Normalise(Elementwise):
    """(reward - mean) / std, with numbers that are known beforehand.

    Raises: ValueError for numbers that are not finite, and for std <= 0.
    """

    name = "normalised"

    def __init__(self, reward: Reward, mean: float, std: float) -> None:
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(f"a normaliser needs a finite mean and a finite std > 0, got {mean} and {std}")
        super().__init__([reward])
        self.mean, self.std = mean, std

    def combine(self, totals: Float[Tensor, "1 b"]) -> Float[Tensor, " b"]:
        return (totals[0] - self.mean) / self.std


class GroupNormalise(Combination):
    """(reward - mean of its group) / (std of its group + eps), over the group's valid samples, so of scope "group".

    The statistics of Flow-GRPO's advantages (arXiv:2505.05470, eq. 5), of each term before they are added, as in GDPO
    (arXiv:2601.05242). Population std, in float64; a group of equal rewards, or of one, gets 0. The gradient is of the
    whole formula, the group's mean and std included.

    Args:
        eps: >= 0; with 0 the smallest difference counts in full, so a reward that is noisy in its last digits wants
            an eps above that noise.
    """

    name = "group_normalised"

    def __init__(self, reward: Reward, eps: float = 0.0) -> None:
        if not (math.isfinite(eps) and eps >= 0):
            raise ValueError(f"eps must be at least 0, got {eps}")
        super().__init__([reward])
        self.eps = eps
        if self.card.scope == "sample":
            self.card = replace(self.card, scope="group")

    def score(self, media: Media, prompts: Prompts) -> Scores:
        if prompts.groups is None:
            raise ValueError("GroupNormalise compares the samples of a group: it needs Prompts.groups")
        terms = [self.rewards[0].score(media, prompts)]
        totals, valid = valid_totals(terms)
        groups = torch.tensor(prompts.groups, device=valid.device)
        total = totals[0].clone()
        total[valid] = _standardised(totals[0][valid], groups[valid], self.eps)
        return masked(total, terms, valid)


def _standardised(values: Float[Tensor, " b"], groups: Int[Tensor, " b"], eps: float) -> Float[Tensor, " b"]:
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    a_member = index.argsort(stable=True)[counts.cumsum(0) - counts]
    exact = values.double()
    above = exact - exact[a_member][index]  # exactly 0 where all are equal, whatever their mean rounds to
    centred = above - _means(above, index, counts)
    std = _root(_means(centred.square(), index, counts))
    return (centred / (std + eps).where(std > 0, 1.0)).where(std > 0, 0.0).to(values.dtype)


def _means(values: Float[Tensor, " b"], index: Int[Tensor, " b"], counts: Int[Tensor, " g"]) -> Float[Tensor, " b"]:
    return (values.new_zeros(len(counts)).index_add(0, index, values) / counts)[index]


def _root(variance: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The square root, with gradient 0 rather than infinity at 0."""
    spread = variance > 0
    return variance.where(spread, 1.0).sqrt().where(spread, 0.0)


class RunningNormalise(Combination):
    """(reward - mean) / std, with the mean and the population std of all scores of the epochs before this one.

    Scores do not change the statistics: an epoch is scored in parts, on several processes, and what a sample gets may
    not depend on which part came first. At the end of each epoch the loop calls `update` with the scores of all
    processes in their common order, which every process does alike; `state_dict` goes into the checkpoint.

        n = n_a + n_b,  d = mean_b - mean_a,  mean = mean_a + d n_b / n,  M2 = M2_a + M2_b + d^2 n_a n_b / n

    (Chan, Golub and LeVeque 1979; Welford's update where n_b = 1), std = sqrt(M2 / n). Until there are scores that
    differ, the mean is what it is, 0 without any, and the std is 1.

    Args:
        name: of the statistics; by default the reward's. The reward's own total is the part "<name>/raw", which is
            what `update` reads, so that names must differ within one reward; see `running_normalisers`.
    """

    def __init__(self, reward: Reward, name: str | None = None) -> None:
        super().__init__([reward])
        self.name = reward.name if name is None else name
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        """The population std of what was seen, 1 where there is none."""
        return math.sqrt(self.squares / self.count) if self.squares > 0 else 1.0

    def score(self, media: Media, prompts: Prompts) -> Scores:
        term = self.rewards[0].score(media, prompts)
        totals, valid = valid_totals([term])
        raw = Scores(term.total, {f"{self.name}/raw": term.total.where(valid, torch.nan)}, valid)
        return masked((totals[0] - self.mean) / self.std, [term, raw], valid)

    def update(self, scores: Scores) -> None:
        """Take an epoch's scores in: those of all processes, of a reward that this one is part of, each sample once.

        Samples without a valid raw score are left out. Raises: ValueError where the scores have no part "<name>/raw".
        """
        if f"{self.name}/raw" not in scores.parts:
            raise ValueError(f"no part '{self.name}/raw' in these scores; they have {', '.join(scores.parts)}")
        raw = scores.parts[f"{self.name}/raw"].detach().double().cpu()
        new = raw[raw.isfinite()]
        if not len(new):
            return
        mean, count = float(new.mean()), self.count + len(new)
        apart = mean - self.mean
        self.squares += float((new - mean).square().sum()) + apart**2 * self.count * len(new) / count
        self.mean += apart * len(new) / count
        self.count = count

    def state_dict(self) -> dict[str, float]:
        """Count, mean and sum of squared deviations; as JSON they come back exactly."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a `state_dict`. Raises: ValueError where it is none."""
        whole = state.keys() == {"count", "mean", "squares"} and all(map(math.isfinite, state.values()))
        if not whole or state["count"] < 0 or state["squares"] < 0 or state["count"] != int(state["count"]):
            raise ValueError(f"the state of a running normaliser has count, mean and squares, got {dict(state)}")
        self.count, self.mean, self.squares = int(state["count"]), float(state["mean"]), float(state["squares"])


def running_normalisers(reward: Reward) -> dict[str, RunningNormalise]:
    """The running normalisers within a reward by name, for the loop that updates and saves them.

    Raises: ValueError where two of them share a name, whose raw scores could not be told apart.
    """
    found: dict[str, RunningNormalise] = {}
    for normaliser in _running(reward):
        if found.setdefault(normaliser.name, normaliser) is not normaliser:
            raise ValueError(f"two running normalisers are called {normaliser.name!r}: give one another name")
    return found


def _running(reward: Reward) -> Iterator[RunningNormalise]:
    if isinstance(reward, RunningNormalise):
        yield reward
    for term in reward.rewards if isinstance(reward, Combination) else ():
        yield from _running(term)


class Gate(Combination):
    """The reward where `condition` is above `threshold`, else `floor`: nothing counts before the condition holds.

    Where the gate is shut the reward is not needed, and may be invalid. The gradient is the reward's where the gate is
    open, and none where it is shut; the condition, a step, passes none, and so need not be differentiable. Part
    "gate/open" is 1 where it is open, else 0.
    """

    name = "gate"

    def __init__(self, reward: Reward, condition: Reward, threshold: float, floor: float = 0.0) -> None:
        if not (math.isfinite(threshold) and math.isfinite(floor)):
            raise ValueError(f"threshold and floor must be finite, got {threshold} and {floor}")
        super().__init__([reward, condition])
        self.differentiable = reward.differentiable
        self.threshold, self.floor = threshold, floor

    def score(self, media: Media, prompts: Prompts) -> Scores:
        with torch.no_grad():
            asked = self.rewards[1].score(media, prompts)
        term = self.rewards[0].score(media, prompts)
        known = asked.valid & asked.total.isfinite()
        is_open = known & (asked.total > self.threshold)
        totals, valid = valid_totals([term])
        total = totals[0].where(is_open, self.floor)
        shown = Scores(total, {"gate/open": is_open.float().where(known, torch.nan)}, known)
        return masked(total, [term, asked, shown], known & (valid | ~is_open))


class Mean(Combination):
    """The mean of several rewards of one thing: an ensemble. Part "<name>/std" is their population std.

    Ensembles against reward hacking: Coste et al. (arXiv:2310.02743), Eisenstein et al. (arXiv:2312.09244). Members
    should be on one scale, see `Normalise`.

    Args:
        rewards: at least two.
        name: of the ensemble, before "/std".
    """

    name = "ensemble"

    def __init__(self, rewards: Sequence[Reward], name: str = "ensemble") -> None:
        if len(rewards) < 2:
            raise ValueError(f"an ensemble needs at least two rewards, got {len(rewards)}")
        super().__init__(rewards)
        self.name = name

    def score(self, media: Media, prompts: Prompts) -> Scores:
        terms = [reward.score(media, prompts) for reward in self.rewards]
        totals, valid = valid_totals(terms)
        spread = population_std(totals.detach()).where(valid, torch.nan)
        shown = Scores(spread, {f"{self.name}/std": spread}, valid)
        return masked(self.reduce(totals), [*terms, shown], valid)

    def reduce(self, totals: Float[Tensor, "k b"]) -> Float[Tensor, " b"]:
        """One score of the members'."""
        return totals.mean(0)


class WorstCase(Mean):
    """The least of an ensemble: worst-case optimisation (WCO, arXiv:2310.02743); else as `Mean`."""

    def reduce(self, totals: Float[Tensor, "k b"]) -> Float[Tensor, " b"]:
        return totals.amin(0)


class MeanMinusStd(Mean):
    """mean - k std of an ensemble: what its members disagree on counts less; else as `Mean`.

    Coste et al. (arXiv:2310.02743, UWO) subtract a multiple of the variance, which has not the reward's unit; here it
    is the population std, whose gradient is 0 where all members agree.

    Args:
        k: >= 0; 0 is the mean.
    """

    def __init__(self, rewards: Sequence[Reward], k: float = 1.0, name: str = "ensemble") -> None:
        if not (math.isfinite(k) and k >= 0):
            raise ValueError(f"k must be at least 0, got {k}")
        super().__init__(rewards, name)
        self.k = k

    def reduce(self, totals: Float[Tensor, "k b"]) -> Float[Tensor, " b"]:
        return totals.mean(0) - self.k * population_std(totals)


class Spread(Elementwise):
    """The population std of several rewards, >= 0: how much they disagree, an uncertainty of each of them."""

    name = "spread"

    def combine(self, totals: Float[Tensor, "k b"]) -> Float[Tensor, " b"]:
        return population_std(totals)


def population_std(totals: Float[Tensor, "k b"]) -> Float[Tensor, " b"]:
    """sqrt(mean_k (r_k - mean)^2), exactly 0 and with gradient 0 where all are equal."""
    above = totals - totals[0]
    return _root((above - above.mean(0)).square().mean(0))

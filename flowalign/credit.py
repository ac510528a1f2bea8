"""Credit that reads more of a sample than its one reward: the terms of a weighted reward, or values on its way.

`flowalign.advantages` has the functions of rewards and groups that these are made of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.advantages import GroupIds, Rewards, Spread, gdpo_advantages, unbiased_global_std, unbiased_group_std


class TermCredit(ABC):
    """Advantages out of the terms of a weighted reward, of which a function of its sum could not tell.

    weights: of each term, or None for those that it has in the reward.
    """

    weights: tuple[float, ...] | None

    @abstractmethod
    def __call__(self, terms: Sequence[Rewards], weights: Sequence[float], group_ids: GroupIds) -> Rewards:
        """Advantages of samples, or of their steps, as the terms' shape has it."""


@dataclass(frozen=True)
class GDPO(TermCredit):
    """Each term normalised within its group, weighted and summed, and the sum divided by its std over the batch.

    GDPO (arXiv:2601.05242), with its authors' sample stds and 1e-4 added to them (NVlabs/GDPO); see `gdpo_advantages`.

    A weight says how much a term counts, whatever its scale: a divisor that was to bring a reward to the scale of the
    others has no place in it.

    weights: in the order of the reward's terms; None for the reward's own.
    std, batch_std, eps: see `gdpo_advantages`; batch_std None leaves the sum as it is.
    clip: largest magnitude, or None.
    """

    weights: tuple[float, ...] | None = None
    std: Spread = unbiased_group_std
    batch_std: Spread | None = unbiased_global_std
    eps: float = 1e-4
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.eps < 0 or (self.clip is not None and self.clip <= 0):
            raise ValueError(f"GDPO: eps must be at least 0 and clip positive or null, got {self.eps} and {self.clip}")
        if self.weights is not None and not any(self.weights):
            raise ValueError(f"GDPO.weights are all 0: {list(self.weights)}")

    def __call__(self, terms: Sequence[Rewards], weights: Sequence[float], group_ids: GroupIds) -> Rewards:
        found = gdpo_advantages(terms, weights, group_ids, self.std, self.batch_std, self.eps)
        return found if self.clip is None else found.clamp(-self.clip, self.clip)


@dataclass(frozen=True)
class GatedGains:
    """A step's reward is the outcome, and its own gain too where the outcome passes.

        r_t = outcome R(x_0) + [R(x_0) >= threshold] dR_t

    The gated accumulation of G-RA (arXiv:2508.10548), as the reward of each step: what looks good on the way counts
    for nothing if the end is not good. With outcome 0 the steps of a sample that fails have reward 0, more than a
    step of a passing one that has lost something.

    threshold: of the reward. outcome: its weight, at least 0.
    """

    threshold: float
    outcome: float = 1.0

    def __post_init__(self) -> None:
        if self.outcome < 0:
            raise ValueError(f"GatedGains.outcome must be at least 0, got {self.outcome}")

    def __call__(self, values: Float[Tensor, "b k"]) -> Float[Tensor, "b t"]:
        """Of the values before each step and the outcome's, as `trainers.dense_grpo.gains`."""
        exact = values.double()
        passed = values[:, -1:] >= self.threshold
        return self.outcome * exact[:, -1:] + torch.where(passed, exact.diff(dim=1), 0.0)

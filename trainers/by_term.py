"""Credit by the terms of a trainer's reward: which parts of the scores it reads, and with which weights."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor

from flowalign.credit import TermCredit
from rewards.terms import Terms


class ByTerm:
    """Credit of a reward whose terms are told apart.

    Raises: ValueError where the credit has weights for another number of terms.
    """

    def __init__(self, credit: TermCredit, reward: Terms) -> None:
        self.credit, self.reward = credit, reward
        self.weights = reward.weights if credit.weights is None else credit.weights
        if len(self.weights) != len(reward.names):
            raise ValueError(
                f"advantages: {type(credit).__name__}.weights has {len(self.weights)} values, and the reward "
                f"{len(reward.names)} terms: {', '.join(reward.names)}"
            )

    def __call__(
        self, rewards: Callable[[str | None], Float[Tensor, b * t]], group_ids: Int[Tensor, " b"]
    ) -> Float[Tensor, b * t]:
        """Advantages of what samples, or their steps, are rewarded with by each term, told by its part."""
        return self.credit([rewards(part) for part in self.reward.parts], self.weights, group_ids).float()

    def remarks(self) -> tuple[str, ...]:
        """What is told when a run starts."""
        name, told = type(self.credit).__name__, zip(self.reward.names, self.weights, strict=True)
        if len(self.weights) == 1:
            return (
                f"advantages: {name} of a reward with one term, {self.reward.names[0]}, is its z-score in each group "
                "but for the batch's std",
            )
        weighed = ", ".join(f"{weight:.3g} {term}" for term, weight in told)
        return (
            f"advantages: {name} brings each term to a std of 1 in its group, and then weighs it: {weighed}. A divisor "
            f"that was to bring rewards to one scale now says how little one counts; {name}.weights tells it otherwise",
        )

"""G2RPO, granular GRPO: each step's noise rewarded on its own, by ODE tails of several lengths (arXiv:2510.01982).

    x_k: ODE from a start noise that the group shares;   x^i_{k+1} = one SDE step from x_k with noise eps^i
    R^i_{k,l} = R(ODE_l(x^i_{k+1}, c), c), the ODE on a grid thinned by l
    A^i_k = clip( sum_l (R^i_{k,l} - mean over i) / (std over i + 1e-8), -5, 5 );   loss of Flow-GRPO with A_k for A

Members of a group differ in eps_k alone, so that a reward tells what this noise was worth and nothing else. One network
row at x_k serves the whole group, in the rollout and in the update. Of several rewards the z-scores are summed too, and
the sum is clipped, not its terms (github.com/bcmi/Granular-GRPO).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.advantages import group_advantages, unbiased_group_std
from flowalign.models.base import Model
from flowalign.prompts import PromptData
from flowalign.records import Scores
from flowalign.rollout import LogProb
from flowalign.schedules import FanOut
from flowalign.tracking import TrackerName
from flowalign.transitions import FlowSDE, Reduce, exact_kl, gaussian_log_prob, mean_of_elements
from rewards.base import Reward, as_reward
from rewards.terms import Terms, with_terms
from trainers.batch import OnInvalid, Sampling
from trainers.evaluation import Evaluation
from trainers.fanned import FannedCollection, fanned_rewards_of
from trainers.flow_grpo import KL, FlowGRPO
from trainers.keeper import Checkpoints
from trainers.optim import Optimizer
from trainers.ratio_guard import RatioCheck

if TYPE_CHECKING:
    from trainers.preflight.family import Family

FanCredit = Callable[[Tensor, Tensor], Tensor]  # rewards [b, t, m] and group ids [b] to advantages [b, t]


def summed_advantages(
    rewards: Float[Tensor, "b t m"], group_ids: Int[Tensor, " b"], clip: float = 5.0
) -> Float[Tensor, "b t"]:
    """The z-scores of each of m rewards over the group at each step, summed, then clipped.

    Their std is the unbiased one and 1e-8, as in `flowalign.advantages.dancegrpo_advantages`. The sum of m of them has
    a std of up to m.
    """
    scored = group_advantages(rewards.double(), group_ids, unbiased_group_std, eps=1e-8)
    return scored.sum(2).clamp(-clip, clip).to(rewards.dtype)


class G2RPO(FlowGRPO):
    """G2RPO with a LoRA policy.

    Args:
        model, reward, prompts, optimizer, evaluation, checkpoints, epochs, updates_per_epoch, clip_range, kl_coef, kl,
            log_prob, reduce, unconditional_grad, folder, seed, on_invalid, log_with, ratio_check: as of
            `trainers.FlowGRPO`.
        sampling: its plan is a `flowalign.schedules.FanOut`, all of whose steps are taken in every epoch: the steps k
            that are trained. `batch_size` counts groups.
        granularities: l of the tails; 1 is the grid itself.
        by_term: whether the terms of a weighted reward are z-scored each on its own, as the authors do, so that of
            their weights the signs alone count; else it is their weighted sum.
        advantages: function of rewards [b, t, m], m of each step's pictures, and of the group ids [b].

    Pictures, rewards and their curve are those of the first trained step, on the first granularity; in the logs
    `reward/fan_003_x2` is the reward of step 3's pictures on a grid thinned by 2.
    """

    collection: FannedCollection

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        sampling: Sampling = Sampling(FanOut(FlowSDE(0.7), (0, 1, 2, 3, 4)), batch_size=1),
        optimizer: Optimizer = Optimizer(),
        evaluation: Evaluation = Evaluation(),
        checkpoints: Checkpoints = Checkpoints(),
        epochs: int = 100,
        updates_per_epoch: int = 1,
        clip_range: float = 1e-4,
        kl_coef: float = 0.0,
        kl: KL = exact_kl,
        granularities: tuple[int, ...] = (1, 2),
        by_term: bool = True,
        advantages: FanCredit = summed_advantages,
        log_prob: LogProb = gaussian_log_prob,
        reduce: Reduce = mean_of_elements,
        unconditional_grad: bool = False,
        folder: str = "runs/g2rpo",
        seed: int = 0,
        on_invalid: OnInvalid = "stop",
        log_with: tuple[TrackerName, ...] = (),
        ratio_check: RatioCheck = "recompute",
    ) -> None:
        if not granularities or min(granularities) < 1 or len({*granularities}) < len(granularities):
            raise ValueError(f"granularities must be distinct numbers of at least 1, got {list(granularities)}")
        self.granularities = granularities
        self.terms: Terms | None = None
        if by_term and len((terms := with_terms(as_reward(reward))).parts) > 1:
            reward = self.terms = terms
        super().__init__(
            model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch,
            clip_range, kl_coef, kl, advantages, 1.0, log_prob, reduce, unconditional_grad, folder, seed, on_invalid,
            log_with, ratio_check=ratio_check,
        )  # fmt: skip

    @property
    def parts(self) -> tuple[str, ...]:
        """The reward's terms, where there are several and they are told apart."""
        return () if self.terms is None else self.terms.parts

    def collector(self, reward: Reward) -> FannedCollection:
        return FannedCollection(
            self.model, reward, self.prompts, self.sampling, self.policy, self.seed, self.granularities, self.parts,
            self.reward,
        )  # fmt: skip

    def credit(self, scores: Scores, group_ids: Int[Tensor, " b"]) -> Float[Tensor, "b t"]:
        """A_k of each sample."""
        steps = self.collection.path(0).stochastic
        rewards = fanned_rewards_of(scores, steps, self.granularities, self.parts)
        if self.terms is not None:
            signs = rewards.new_tensor(self.terms.weights).sign().repeat(len(self.granularities))
            rewards = rewards * signs
        return self.advantages(rewards, group_ids)

    def preflight(self) -> Family:
        from trainers.preflight.fanned import FannedFamily

        return FannedFamily(self)

    def check_sampling(self, sampling: Sampling) -> None:
        super().check_sampling(sampling)
        if not isinstance(sampling.plan, FanOut):
            raise ValueError(
                f"sampling.plan is {type(sampling.plan).__name__}: with noise in several steps of one sample no reward "
                "tells what one step's noise was worth. G2RPO takes FanOut, with the steps that are to be trained"
            )
        if len({*sampling.plan.steps}) < len(sampling.plan.steps):
            raise ValueError(f"FanOut.steps names a step twice: {list(sampling.plan.steps)}")

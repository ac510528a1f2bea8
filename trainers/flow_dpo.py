"""Flow-DPO: preferences between pairs, on flow and diffusion models, offline and online (arXiv:2501.13918, Liu et al.).

    L = -log sigmoid( r(x^w) - r(x^l) ),   r(x) = -(beta_t / 2) ( ||v* - v(x_t, t)||^2 - ||v* - v_ref(x_t, t)||^2 )

with v* = e - x_0, and the same t and e for the preferred x^w and the other x^l. beta_t is constant, which its authors
found to work better, or beta (1 - t)^2: that is Diffusion-DPO (arXiv:2311.12908), of flow and of eps models, as on the
same x_t (1 - t)^2 ||v* - v||^2 = ||e - e_hat||^2. With other objectives' rewards g, and the weight w of the objective
that preferences tell, MODPO (arXiv:2310.03708) asks for a margin:

    L = -log sigmoid( [ r(x^w) - r(x^l) - (1 - w) (g(x^w) - g(x^l)) ] / w )
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.models.base import Model
from flowalign.prompts import PromptData
from flowalign.tracking import TrackerName
from flowalign.transitions import Reduce, mean_of_elements
from rewards.base import Reward
from trainers.batch import OnInvalid, Sampling
from trainers.evaluation import Evaluation
from trainers.forward_source import SCORE, Pairs
from trainers.forward_steps import Noised
from trainers.forward_times import LogitNormalTimes, Times
from trainers.keeper import Checkpoints
from trainers.optim import Optimizer
from trainers.pair_trainer import Pairing, PairTrainer, best_and_worst_unless_equal

PerSample = Float[Tensor, " b"]


def constant(sigma: PerSample) -> PerSample:
    """beta_t = beta: errors of velocities count alike at every t."""
    return torch.ones_like(sigma)


def of_noise(sigma: PerSample) -> PerSample:
    """beta_t = beta (1 - t)^2: errors of the noise count alike at every t, as in Diffusion-DPO."""
    return (1 - sigma).square()


@dataclass(frozen=True)
class Margin:
    """MODPO's: weight w in (0, 1] of the objective that preferences tell, 1 for no margin; part g, the other ones'.

    part: of the reward's parts online; of stored pairs their "score", which may be another reward's than made labels.
    """

    weight: float = 0.5
    part: str = SCORE

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"margin.weight must lie in (0, 1], got {self.weight}")


def implicit_rewards(
    noised: Noised, beta: float, weighting: Callable[[Tensor], Tensor], reduce: Reduce
) -> Float[Tensor, " b"]:
    """r of each sample: by how much the policy's error is below the reference's."""
    assert noised.reference is not None
    error, known = (reduce((one - noised.target).square()) for one in (noised.velocity, noised.reference))
    return -beta / 2 * weighting(noised.sigma) * (error - known)


def dpo_loss(lead: Float[Tensor, " u"], gap: Float[Tensor, " u"], weight: float = 1.0) -> Float[Tensor, " u"]:
    """-log sigmoid((lead - (1 - weight) gap) / weight): log 2 for policies that are their reference, without a margin.

    Args:
        lead: r(x^w) - r(x^l). gap: g(x^w) - g(x^l), no gradient. weight: w.
    """
    return -logsigmoid((lead - (1 - weight) * gap) / weight)


class FlowDPO(PairTrainer):
    """Flow-DPO and Diffusion-DPO with a LoRA policy, from stored preferences or from samples of its own.

    Args:
        model, optimizer, evaluation, checkpoints, epochs, folder, seed, log_with: as of `trainers.FlowGRPO`.
        pairs: preferences to learn from, offline. sampling.groups is then how many an epoch takes, group_size 2, and
            batch_size counts samples, two of each pair; its steps and guidance are the evaluation's.
        reward, prompts: instead of pairs, online: of each group of `sampling` the best and the worst sample are a pair.
        updates_per_epoch: optimizer steps made of an epoch's pairs.
        beta: of what `reduce` makes of squared errors. Means over elements take the authors' values (flow_grpo 100,
            Diffusion-DPO 5000); for sums divide them by the elements of a latent.
        weighting: what beta_t is over beta: `constant` or `of_noise`. reduce: over a sample's elements.
        times: the law of t, and how many t and e a pair gets in an optimizer step.
        pairing: which samples of a group are a pair: its best and its worst, if they differ, or flow_grpo's
            `flowalign.advantages.best_and_worst`, which makes a pair of equals too.
        margin: MODPO's; none by default.
        refresh: epochs after which the reference becomes the policy; 0 for never.
        sample_reference: draw samples by the reference, as flow_grpo does, and not by the policy.
        guidance_scale: of the velocities that are compared, 1 for none; a network that is told its guidance is told it.
        on_invalid: what to do about samples whose score is not valid: stop, or leave them, or their whole groups, out
            and count them.

    Ties and what is not valid teach nothing, and are counted.
    """

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        pairs: Pairs | None = None,
        reward: Reward | Callable[..., Any] | str | None = None,
        prompts: PromptData | None = None,
        sampling: Sampling = Sampling(group_size=2),
        optimizer: Optimizer = Optimizer(),
        evaluation: Evaluation = Evaluation(),
        checkpoints: Checkpoints = Checkpoints(),
        epochs: int = 100,
        updates_per_epoch: int = 1,
        beta: float = 100.0,
        weighting: Callable[[Tensor], Tensor] = constant,
        reduce: Reduce = mean_of_elements,
        times: Times = LogitNormalTimes(),
        pairing: Pairing = best_and_worst_unless_equal,
        margin: Margin | None = None,
        refresh: int = 0,
        sample_reference: bool = False,
        guidance_scale: float = 1.0,
        folder: str = "runs/flow_dpo",
        seed: int = 0,
        on_invalid: OnInvalid = "stop",
        log_with: tuple[TrackerName, ...] = (),
    ) -> None:
        if not beta > 0 or refresh < 0:
            raise ValueError(f"beta must be positive and refresh at least 0, got {beta} and {refresh}")
        self.beta, self.weighting, self.reduce, self.refresh = beta, weighting, reduce, refresh
        self.weight, self.sample_reference = 1.0 if margin is None else margin.weight, sample_reference
        self.pairing, self.part = pairing, None if margin is None else margin.part
        super().__init__(
            model, reward, prompts, pairs, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch,
            times, guidance_scale, folder, seed, on_invalid, log_with,
        )  # fmt: skip

    def lead(self, noised: Noised) -> Float[Tensor, " u"]:
        """r(x^w) - r(x^l) of each pair."""
        best, worst = implicit_rewards(noised, self.beta, self.weighting, self.reduce).chunk(2)
        return best - worst

    def loss(self, noised: Noised) -> Float[Tensor, " u"]:
        """-log sigmoid(r(x^w) - r(x^l)) of each pair, with the margin if there is one."""
        return dpo_loss(self.lead(noised), noised.credit, self.weight)

    def needs_reference(self) -> bool:
        return True

    def as_reference(self) -> AbstractContextManager[None]:
        return self.as_older()

    def looks_back(self) -> tuple[bool, bool]:
        return self.needs_reference(), self.refresh > 0

    def sampler(self) -> AbstractContextManager[None]:
        return self.as_reference() if self.sample_reference else nullcontext()

    def renewed(self) -> dict[str, Tensor] | None:
        due = self.refresh and (self.state.epoch + 1) % self.refresh == 0
        return self.optimizer.snapshot() if due else None

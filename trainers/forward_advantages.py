"""Trainers of the forward process by advantages, beside an older policy that follows the policy epoch by epoch.

    older <- d older + (1 - d) policy   after each epoch, d = decay(optimizer steps so far)

With d = 0 an epoch starts where both are the same weights. They stay so until its first optimizer step is made, and as
the same call gives the same velocity, the older policy's is asked for from the second step on only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from flowalign.models.base import Model
from flowalign.prompts import PromptData
from flowalign.tracking import Run, TrackerName
from flowalign.transitions import mean_of_elements
from rewards.base import Reward
from trainers.batch import OnInvalid, Sampling
from trainers.evaluation import Evaluation
from trainers.forward_process import ForwardProcessTrainer
from trainers.forward_steps import Noised
from trainers.forward_times import Times
from trainers.keeper import Checkpoints, Keeper
from trainers.optim import Optimizer

Advantages = Callable[[Tensor, Tensor], Tensor]
Decay = Callable[[int], float]
Latents = Float[Tensor, "b *d"]
PerSample = Float[Tensor, " b"]


def on_policy(step: int) -> float:
    """0: the older policy is the policy that an epoch starts with. DiffusionNFT's decay type 0."""
    return 0.0


def rising_to_half(step: int) -> float:
    """.001 a step up to .5: DiffusionNFT's decay type 1, of all its published runs but those on text."""
    return min(0.001 * step, 0.5)


def rising_late(step: int) -> float:
    """0 for 75 steps, then .0075 a step up to .999, reached at step 209: DiffusionNFT's decay type 2."""
    return min(0.0075 * max(step - 75, 0), 0.999)


def rising_to_three_tenths(step: int) -> float:
    """.001 a step up to .3: AWM's "linear" one, of all its published runs."""
    return min(0.001 * step, 0.3)


class ForwardAdvantageTrainer(ForwardProcessTrainer):
    """A trainer by advantages of clean samples; see the subclasses.

    Args:
        advantages: function of rewards [b] and group ids [b].
        kl_coef: of mean (v - v_ref)^2; 0 leaves the reference's calls out.
        decay: d, a function of the optimizer steps made so far (epochs times `updates_per_epoch`), in [0, 1].
        sample_older: whether samples are drawn by the older policy.
        Others: as of `ForwardProcessTrainer`.
    """

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        sampling: Sampling,
        optimizer: Optimizer,
        evaluation: Evaluation,
        checkpoints: Checkpoints,
        epochs: int,
        updates_per_epoch: int,
        advantages: Advantages,
        kl_coef: float,
        decay: Decay,
        sample_older: bool,
        times: Times,
        guidance_scale: float,
        folder: str,
        seed: int,
        on_invalid: OnInvalid,
        log_with: Sequence[TrackerName],
    ) -> None:
        if kl_coef < 0:
            raise ValueError(f"kl_coef must be at least 0, got {kl_coef}")
        self.advantages, self.kl_coef, self.decay, self.sample_older = advantages, kl_coef, decay, sample_older
        super().__init__(
            model, reward, prompts, None, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch,
            times, guidance_scale, folder, seed, on_invalid, log_with,
        )  # fmt: skip

    def decay_before(self, epoch: int) -> float:
        """d of the mixture that an epoch starts with; 0 for the first, whose older policy is the policy itself.

        Raises: ValueError for one outside [0, 1].
        """
        steps = epoch * self.updates_per_epoch
        found = self.decay(steps) if epoch else 0.0
        if not 0 <= found <= 1:
            raise ValueError(f"decay must lie in [0, 1], and is {found} after {steps} optimizer steps")
        return found

    def reads_older(self, epoch: int, part: int) -> bool:
        return part > 0 or self.decay_before(epoch) > 0

    def sampler(self) -> AbstractContextManager[None]:
        older = self.sample_older and self.decay_before(self.state.epoch) > 0
        return self.as_older() if older else nullcontext()

    def prepare(self, run: Run, keeper: Keeper) -> None:
        """The older policy is the start, at first."""
        self.state.older = self.state.older or self.optimizer.snapshot()

    def renewed(self) -> dict[str, Tensor]:
        now, kept = self.optimizer.snapshot(), self.decay_before(self.state.epoch + 1)
        if not kept:
            return now
        return {name: kept * self.state.older[name] + (1 - kept) * value for name, value in now.items()}

    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    def looks_back(self) -> tuple[bool, bool]:
        return self.needs_reference(), True

    def penalty(self, noised: Noised) -> PerSample | float:
        """kl_coef times the distance to the reference."""
        return 0.0 if noised.reference is None else self.kl_coef * distance(noised.velocity, noised.reference)

    def watched(self) -> tuple[str, ...]:
        return ("loss", "older_distance", *(["kl"] if self.needs_reference() else []))

    def watch(self, noised: Noised, losses: PerSample) -> dict[str, PerSample]:
        seen = {"loss": losses, "older_distance": distance(noised.velocity, older_velocity(noised))}
        if noised.reference is not None:
            seen["kl"] = distance(noised.velocity, noised.reference)
        return {name: value.detach() for name, value in seen.items()}

    def check_sampling(self, sampling: Sampling) -> None:
        super().check_sampling(sampling)
        if sampling.group_size < 2:
            raise ValueError("sampling.group_size must be at least 2: an advantage compares the samples of a group")

    def _check(self) -> None:
        super()._check()
        for epoch in (1, self.epochs):  # a schedule that leaves [0, 1] should not do so amid a run
            self.decay_before(epoch)


def older_velocity(noised: Noised) -> Latents:
    """The older policy's; where it is not there the two are the same, and it is the policy's own without gradient."""
    return noised.velocity.detach() if noised.older is None else noised.older


def distance(one: Latents, other: Latents) -> PerSample:
    """Mean squared difference of each sample."""
    return mean_of_elements((one - other).square())

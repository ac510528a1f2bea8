"""Trainers that fit the velocity to weighted samples of a policy: fine-tuning on what it has made, by its worth.

    L = E[ w c(t) ||v* - v(x_t, t)||^2 ],   x_t = (1 - t) x_0 + t e,   v* = e - x_0

c makes it the loss that the network was trained with (`Model.training_weights`), 1 of flow models. With samples x_0 of
a law p the best velocity is that of the law w p / E_p[w], whatever c is: the weights alone say where training leads. A
method gives them as its `credit`. A sample of weight 0 takes no call, and is not counted.
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
from flowalign.records import Scores
from flowalign.tracking import TrackerName
from flowalign.transitions import mean_of_elements
from rewards.base import Reward
from trainers.batch import OnInvalid, Sampling
from trainers.collection import Epoch
from trainers.evaluation import Evaluation
from trainers.forward_process import ForwardProcessTrainer
from trainers.forward_steps import Noised, Units
from trainers.forward_times import Times
from trainers.keeper import Checkpoints
from trainers.optim import Optimizer

FEW = 0.1  # of the samples: fewer that count, and a few of them decide an epoch


def effective(weights: Float[Tensor, " n"]) -> float:
    """(sum w)^2 / sum w^2: of how many samples of equal weight a weighted mean is as good as; 0 without any."""
    squares = float(weights.double().square().sum())
    return float(weights.double().sum()) ** 2 / squares if squares else 0.0


class RegressionTrainer(ForwardProcessTrainer):
    """A trainer by weighted regression; see the subclasses, whose `credit` is the weights, at least 0.

    Args:
        passes: how often an epoch's samples are taken in its optimizer steps, with new noise and sigma each time.
        refresh: epochs after which samples are drawn by the policy as it is then; 1 for the present one, 0 for the
            policy that the run starts from, for good.
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
        passes: int,
        refresh: int,
        times: Times,
        guidance_scale: float,
        folder: str,
        seed: int,
        on_invalid: OnInvalid,
        log_with: Sequence[TrackerName],
    ) -> None:
        if passes < 1 or refresh < 0:
            raise ValueError(f"passes must be at least 1 and refresh at least 0, got {passes} and {refresh}")
        self.passes, self.refresh = passes, refresh
        super().__init__(
            model, reward, prompts, None, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch,
            times, guidance_scale, folder, seed, on_invalid, log_with,
        )  # fmt: skip

    def loss(self, noised: Noised) -> Float[Tensor, " u"]:
        """w c(t) ||v* - v(x_t, t)||^2 of each sample, averaged over elements."""
        errors = mean_of_elements((noised.velocity - noised.target).square())
        return noised.credit * self.model.training_weights(noised.sigma) * errors

    def units(self, epoch: Epoch, scores: Scores) -> Units:
        """The samples that count, each `passes` times in a row, so that no optimizer step has one of them often."""
        every = super().units(epoch, scores)
        counted = (every.weights > 0) & (every.credit > 0)
        chosen = counted.nonzero().flatten().repeat_interleave(self.passes)
        return Units(every.samples[chosen], every.weights[chosen], every.credit[chosen])

    def units_per_epoch(self) -> int:
        return self.passes * super().units_per_epoch()

    def looks_back(self) -> tuple[bool, bool]:
        return self.needs_reference() or self.refresh != 1, self.refresh > 1

    def sampler(self) -> AbstractContextManager[None]:
        return nullcontext() if self.refresh == 1 else self.as_older()

    def renewed(self) -> dict[str, Tensor] | None:
        due = self.refresh > 1 and (self.state.epoch + 1) % self.refresh == 0
        return self.optimizer.snapshot() if due else None

    def told(self, units: Units, scores: Scores) -> dict[str, float]:
        """ess, the effective share of the valid samples, and the mean reward of the law that they are weighted to."""
        total = float(units.credit.sum())
        aimed = float((units.credit * scores.total[units.samples[:, 0]]).sum()) / total if total else float("nan")
        return {"ess": self.effective_share(units, scores), "reward_aimed_at": aimed}

    def headline(self) -> tuple[str, ...]:
        return ("reward", "ess")

    def effective_share(self, units: Units, scores: Scores) -> float:
        """How many samples of equal weight the weights are as good as, over the valid samples."""
        return effective(units.credit) / self.passes / int(scores.valid.sum())

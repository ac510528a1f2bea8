"""Trainers by the forward process: clean latents are noised anew, and the loss compares velocities there.

    x_t = (1 - t) x_0 + t e,   v(x_t, t) of the policy and, if the loss reads them, of a reference and an older policy

No step of a rollout is replayed: what counts is where samples have ended, whichever sampler made them. A method says
what a unit is (`members`: a sample, or a pair), what its samples' scores make of it (`credit`, or `units`), and its
loss; the order of things stands in `trainers.forward_steps`, where latents come from in `trainers.forward_source`.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.distributed import check_started, rank
from flowalign.gradient_plans import GradientPlan
from flowalign.models import as_model
from flowalign.models.base import Model
from flowalign.prompts import PromptData
from flowalign.randomness import key_generator
from flowalign.records import Condition, Scores
from flowalign.rollout import Policy
from flowalign.schedules import Path
from flowalign.tracking import TrackerName
from rewards.base import Reward
from trainers.base import Trainer, Worked
from trainers.batch import OnInvalid, Sampling, parts_of, valid_rows
from trainers.collection import Epoch
from trainers.evaluation import Evaluation
from trainers.forward_source import NoReward, Pairs, PolicySamples, Source, StoredPairs
from trainers.forward_steps import ForwardSteps, Noised, Units
from trainers.forward_times import Times
from trainers.keeper import Checkpoints, Keeper
from trainers.optim import Optimizer
from trainers.regularisers import older_policy

if TYPE_CHECKING:
    from trainers.preflight.family import Family

Latents = Float[Tensor, "b *d"]


class ForwardProcessTrainer(Trainer):
    """A trainer whose loss reads velocities at clean latents that are noised anew; see the subclasses.

    members: samples of a unit: 1, or 2 for pairs.

    Args:
        pairs: preferences to learn from; without them latents are samples of the policy, of prompts, and have a reward.
        times: the law of t, and how often a unit is noised in the optimizer step that takes it.
        guidance_scale: of the velocities that are compared, 1 for the conditional ones. Samples have `sampling`'s own.
        Others: as of `Trainer`.
    """

    members: int = 1
    source: Source

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str | None,
        prompts: PromptData | None,
        pairs: Pairs | None,
        sampling: Sampling,
        optimizer: Optimizer,
        evaluation: Evaluation,
        checkpoints: Checkpoints,
        epochs: int,
        updates_per_epoch: int,
        times: Times,
        guidance_scale: float,
        folder: str,
        seed: int,
        on_invalid: OnInvalid,
        log_with: Sequence[TrackerName],
    ) -> None:
        check_started()
        self.times, self.guidance_scale, self.stored = times, guidance_scale, pairs is not None
        self.doubted = False
        if (prompts is None) != (reward is None) or (pairs is None) == (prompts is None):
            raise ValueError(
                f"{type(self).__name__} learns from pairs, or from samples of prompts that a reward scores: give it "
                "either pairs, or prompts and reward (what an evaluation scores by is evaluation.reward)"
            )
        self.check_sampling(sampling)
        if self.stored and evaluation.prompts is not None and evaluation.reward is None:
            raise ValueError("samples of evaluation.prompts need a reward to be scored by: give evaluation.reward")
        model = as_model(model)
        self.source = PolicySamples(self) if pairs is None else StoredPairs(pairs.latents(model))
        self.held_out_pairs = None if pairs is None else pairs.held_out_latents(model)
        super().__init__(
            model, NoReward() if reward is None else reward, self.source.prompts(prompts), sampling,
            Policy(sampling.guidance_scale), optimizer, evaluation, checkpoints, epochs, updates_per_epoch, folder,
            seed, on_invalid, log_with,
        )  # fmt: skip

    @abstractmethod
    def loss(self, noised: Noised) -> Float[Tensor, " u"]:
        """The objective of each unit, not yet averaged."""

    def credit(self, scores: Scores, group_ids: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """What the loss is told of each of an epoch's valid samples (an advantage, a weight); nothing by default."""
        return torch.zeros(len(scores))

    def units(self, epoch: Epoch, scores: Scores) -> Units:
        """What the update takes of an epoch's samples; by default each that has a valid score, with its credit."""
        size = self.sampling.group_size
        group_ids, known = torch.arange(len(scores)) // size, scores.valid
        credit = torch.zeros(len(scores))
        credit[known] = self.credit(valid_rows(scores), group_ids[known]).float()
        weights = known * self.source.weights(epoch).repeat_interleave(size)
        return Units(torch.arange(len(scores))[:, None], weights, credit)

    def reads_older(self, epoch: int, part: int) -> bool:
        """Whether the loss reads the older policy's velocity in this optimizer step of an epoch; no pass otherwise."""
        return False

    def as_reference(self) -> AbstractContextManager[None]:
        """While entered, the network is the reference."""
        return self.model.reference()

    def as_older(self) -> AbstractContextManager[None]:
        """While entered, the network is the policy that `renewed` has given last, at first what the run starts from."""
        return older_policy(self)

    def renewed(self) -> dict[str, Tensor] | None:
        """The older policy from the next epoch on, asked for when all of an epoch's steps are made; None: as before."""
        return None

    def told(self, units: Units, scores: Scores) -> dict[str, float]:
        """What to log of an epoch's units, and of the scores that they were made of."""
        return {}

    def idle(self, credit: Float[Tensor, " u"]) -> bool:
        """Whether units with this credit teach nothing, so that no gradient is to be expected of them."""
        return False

    def doubt(self, units: Units, scores: Scores) -> str | None:
        """Why an epoch's units may teach little, if they may: a check tells it, and a run when it is so at first."""
        return None

    def watched(self) -> tuple[str, ...]:
        return ("loss",)

    def watch(self, noised: Noised, losses: Float[Tensor, " u"]) -> dict[str, Float[Tensor, " u"]]:
        """What is `watched`, of each unit."""
        return {"loss": losses.detach()}

    def see(
        self,
        clean: Latents,
        noise: Latents,
        sigmas: Float[Tensor, " b"],
        condition: Condition,
        credit: Float[Tensor, " u"],
    ) -> Noised:
        """Clean latents noised by noise at sigmas, in double precision, and all velocities that the loss reads."""
        sigma = sigmas.to(clean.device, clean.dtype)
        column = sigma.view(-1, *(1,) * (clean.ndim - 1))
        noised = (1 - column) * clean + column * noise
        velocity = partial(self.model.velocity_rows, noised, sigmas, condition, self.guidance_scale)
        with torch.no_grad():  # first: the policy's weights may be changed and put back
            reference = _within(self.as_reference, velocity) if self.needs_reference() else None
            lags = self.reads_older(self.state.epoch, self.state.part)
            older = _within(self.as_older, velocity) if lags else None
        return Noised(velocity(), noise - clean, noised, sigma, credit, reference, older)

    def units_per_call(self, batch_size: int | None = None) -> int:
        """Units in a call with gradient, of which each sample is a row."""
        return (batch_size or self.sampling.batch_size) // self.members

    def units_per_epoch(self) -> int:
        """How many `units` gives: one of each sample, or a pair of each group."""
        return self.sampling.groups * (self.sampling.group_size if self.members == 1 else 1)

    def most_updates(self) -> int:
        return self.units_per_epoch()

    def work(self, keeper: Keeper) -> Worked:
        epoch = self.collection.epoch(self.state.epoch)
        scores = self.source.draw(epoch, keeper)
        units = self.units(epoch, scores)
        self._tell_once(self.doubt(units, scores))
        metrics = ForwardSteps(self, epoch, units, keeper).run()
        older = self.renewed()
        if older is not None:
            self.state.older = older
        return Worked(self.source.summary(scores) | self.told(units, scores) | metrics, scores)

    def _tell_once(self, doubt: str | None) -> None:
        if doubt is not None and not self.doubted and rank() == 0:
            print(f"flowalign: epoch {self.state.epoch}: {doubt}", file=sys.stderr, flush=True)
        self.doubted = self.doubted or doubt is not None

    def needed(self, epoch: Epoch) -> Rows:
        parts = parts_of(self.units_per_epoch(), self.updates_per_epoch, self.seed, epoch.number)
        made = [self.update_rows(len(rows), self.reads_older(epoch.number, part)) for part, rows in enumerate(parts)]
        return sum(made, self.source.needed(epoch))

    def update_rows(self, units: int, older: bool = False) -> Rows:
        """The network rows of noising so many units as often as `times` says.

        Args:
            older: whether the older policy's velocity is read.
        """
        rows = units * self.members * self.times.draws
        calls = self.model.calls(self.guidance_scale, self.sigmas[0])
        return Rows(rows * (calls - 1 + calls * (self.needs_reference() + older)), rows)

    def mine(self, epoch: Epoch) -> Sequence[int]:
        """Of rollouts, if there are any."""
        return range(0) if self.stored else super().mine(epoch)

    def trained_steps(self, path: Path) -> tuple[int, ...]:
        """None: no step of a rollout is trained."""
        return ()

    def preflight(self) -> Family:
        from trainers.preflight.forward_process import ForwardProcessFamily

        return ForwardProcessFamily(self)

    def check_sampling(self, sampling: Sampling) -> None:
        if isinstance(sampling.plan, GradientPlan):
            raise ValueError(
                f"sampling.plan is {type(sampling.plan).__name__}, which says where a reward's gradient flows; "
                f"{type(self).__name__} looks at where rollouts end alone: choose Deterministic, AllSteps or the like"
            )
        if self.stored and sampling.overlap:
            raise ValueError(f"sampling.overlap is {sampling.overlap}, but stored pairs are not scored: leave it out")
        if sampling.batch_size % self.members:
            raise ValueError(f"sampling.batch_size counts samples, two of each pair: {sampling.batch_size} is odd")
        if self.stored and sampling.group_size != 2:
            raise ValueError(
                f"sampling.group_size is {sampling.group_size}, but pairs are groups of two; set it to 2 "
                "(sampling.groups is how many of them an epoch takes)"
            )

    def _check(self) -> None:
        super()._check()
        for sigmas in self.collection.grids.values():  # raises where a grid has too few points for `times`
            self.times.draw(key_generator(self.seed, "look"), self.model.train_sigmas(), sigmas[:-1])
        whole = self.sampling.batch_size % self.sampling.group_size == 0
        if self.reward.card.scope == "group" and not whole:
            raise ValueError(
                f"the reward compares the samples of a group, so that sampling.batch_size has to be a multiple of "
                f"group_size {self.sampling.group_size}, not {self.sampling.batch_size}"
            )


def _within(entered: Callable[[], AbstractContextManager[None]], velocity: Callable[[], Tensor]) -> Tensor:
    with entered():
        return velocity()

"""The loop that all trainers share: epochs, evaluations, checkpoints and the log; what an epoch is, a family tells.

Policy gradients (`trainers.policy_gradient`) collect scored rollouts and replay them; rewards' own gradients
(`trainers.reward_gradient`) go back through the rollouts themselves.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Int
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.distributed import check_started, on_main, split_calls, telling, world_size
from flowalign.interrupt import StopRequest
from flowalign.models import as_model
from flowalign.models.base import Model
from flowalign.prompts import PromptData, as_prompts
from flowalign.records import Scores
from flowalign.rollout import Policy
from flowalign.schedules import Path
from flowalign.tracking import Run, TrackerName
from rewards.algebra import running_normalisers
from rewards.base import Reward, as_reward
from rewards.process import ending
from trainers.alarms import over
from trainers.batch import OnInvalid, Sampling
from trainers.collection import Collection, Epoch
from trainers.evaluated import due, evaluate
from trainers.evaluation import Asked, Evaluation, Evaluator
from trainers.keeper import Checkpoints, Keeper
from trainers.long_prompts import long_prompts
from trainers.named_files import LOOKED_AT
from trainers.optim import Optimizer, PolicyOptimizer
from trainers.overlap import fill
from trainers.resampling import grown
from trainers.state import Collected, State

if TYPE_CHECKING:
    from trainers.preflight.family import Family


@dataclass(frozen=True)
class Worked:
    """What an epoch has come to: numbers to log, its samples' scores, and histograms over [-limit, limit] by name."""

    metrics: dict[str, float]
    scores: Scores
    histograms: Mapping[str, tuple[float, Sequence[int]]] = field(default_factory=dict)


class Trainer(ABC):
    """See the subclasses; `train()` runs all epochs and leaves a run folder."""

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        sampling: Sampling,
        policy: Policy,
        optimizer: Optimizer,
        evaluation: Evaluation,
        checkpoints: Checkpoints,
        epochs: int,
        updates_per_epoch: int,
        folder: str,
        seed: int,
        on_invalid: OnInvalid,
        log_with: Sequence[TrackerName],
    ) -> None:
        check_started()
        self.check_sampling(sampling)
        self.model, self.reward, self.prompts = as_model(model), as_reward(reward), as_prompts(prompts)
        self.sampling, self.policy, self.evaluation, self.checkpoints = sampling, policy, evaluation, checkpoints
        self.epochs, self.updates_per_epoch, self.seed = epochs, updates_per_epoch, seed
        self.folder, self.on_invalid, self.log_with = FilePath(folder), on_invalid, tuple(log_with)
        self.collection = self.collector(self.reward)
        self.evaluator = Evaluator(self.model, self.reward, evaluation, sampling, seed)
        model = self.model
        self.optimizer = PolicyOptimizer(model.trainable(), optimizer, model.scale_loss, model.backward)
        self.state, self.stop = State(), StopRequest()
        model.keep(*self.looks_back(), lambda: self.state.older)
        self.normalisers = running_normalisers(self.reward)
        self._check()

    @abstractmethod
    def work(self, keeper: Keeper) -> Worked:
        """Sample, score and update for the epoch `state.epoch`, from its optimizer step `state.part` on."""

    @abstractmethod
    def needed(self, epoch: Epoch) -> Rows:
        """The fewest network rows that the maths of an epoch can do with."""

    @abstractmethod
    def trained_steps(self, path: Path) -> tuple[int, ...]:
        """The steps at which the loss reads the policy's velocity."""

    @abstractmethod
    def preflight(self) -> Family:
        """How `flowalign check` tries trainers of this kind."""

    @abstractmethod
    def check_sampling(self, sampling: Sampling) -> None:
        """Raises: ValueError for what this kind of trainer cannot learn from; called before the model is loaded."""

    def collector(self, reward: Reward) -> Collection:
        """Makes an epoch's rollouts and scores them by this reward."""
        return Collection(self.model, reward, self.prompts, self.sampling, self.policy, self.seed)

    def prepare(self, run: Run, keeper: Keeper) -> None:
        """What comes before the first epoch, or is taken up again where a run is gone on with; nothing by default."""
        return

    def sampler(self) -> AbstractContextManager[None]:
        """While entered, the network is what samples are drawn by: the policy as it is."""
        return nullcontext()

    def evaluates(self) -> bool:
        """Whether there is anything held out to evaluate on."""
        return self.evaluator.prompts is not None

    def judge(self, run: Run, asked: Asked) -> dict[str, float] | None:
        """Log an evaluation and return its numbers, "held-out" among them; None where a stop was asked for."""
        return self.evaluator.run(run, self.state.epoch, asked)

    def held_out(self) -> str:
        """Tells what is evaluated on from anything else."""
        held = self.evaluator.prompts
        return "none" if held is None else held.fingerprint()

    def epoch_of(self, number: int, rounds: Sequence[Sequence[int]]) -> Epoch:
        """An epoch with all its rounds: of groups that are sampled again, those of each further one."""
        size = self.sampling.group_size
        return reduce(lambda made, groups: grown(made, groups, size), rounds, self.collection.epoch(number))

    def mine(self, epoch: Epoch) -> Sequence[int]:
        """The micro-batches of `state.buffer` that are this process's."""
        return [index for held in self.collection.shares(epoch) for index in held]

    def needs_reference(self) -> bool:
        """Whether the loss reads the reference model; its pass is left out otherwise."""
        return False

    def looks_back(self) -> tuple[bool, bool]:
        """Whether what the run starts from, and the record's older policy, are ever called: see `Model.keep`."""
        return self.needs_reference(), False

    def watched(self) -> tuple[str, ...]:
        """The names of the numbers of each sample to log the mean of."""
        return ()

    def headline(self) -> tuple[str, ...]:
        """The numbers of an epoch that its progress shows."""
        return ("reward",)

    def most_updates(self) -> int:
        """How many optimizer steps an epoch can have, each of which has something to learn from."""
        return len(self.collection.epoch(0).rows)

    def remarks(self) -> tuple[str, ...]:
        """What is told when a run starts, a line each: settings that may not do what they seem to."""
        return ()

    def _check(self) -> None:
        self.model.check_prompts(self.prompts.some(LOOKED_AT))
        most = self.most_updates()
        if not 1 <= self.updates_per_epoch <= most:
            raise ValueError(
                f"updates_per_epoch must lie in 1 ... {most} (what an epoch has to learn from), not "
                f"{self.updates_per_epoch}"
            )
        if self.reward.card.scope == "set":
            raise ValueError("the reward scores a whole set of samples at once: it is for evaluation, not for training")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")

    def usable(self, scores: Scores, epoch: int, group_ids: Int[Tensor, " b"] | None = None) -> Scores:
        """The same scores, of which those that may be learned from are valid: with `drop_group` those of whole groups.

        Raises: ValueError where scores are not valid, and `on_invalid` says stop or none is left.
        """
        invalid, valid = int((~scores.valid).sum()), scores.valid
        if invalid and self.on_invalid == "drop_group" and group_ids is not None:
            valid = ~torch.isin(group_ids, group_ids[~valid])
        if invalid and (self.on_invalid == "stop" or not valid.any()):
            raise ValueError(
                f"{invalid} of {len(scores)} scores of epoch {epoch} are not valid"
                + (", and no group is whole" if 0 < invalid < len(scores) and self.on_invalid == "drop_group" else "")
                + "; mend the reward, or set on_invalid: drop"
            )
        return replace(scores, valid=valid)

    def fill(self, epoch: Epoch, keeper: Keeper | None, clean: bool = False) -> list[Collected]:
        """This process's micro-batches of rollouts; see `trainers.overlap.fill`."""
        return fill(self, epoch, keeper, clean)

    def ahead(self) -> int:
        """Micro-batches that may wait for their scores while others are rolled out."""
        asked = self.sampling.overlap
        return self.reward.ahead if asked is None else asked

    @property
    def sigmas(self) -> list[float]:
        """The grid of the rollouts."""
        return self.collection.sigmas

    def train(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        resume: bool = False,
        allow_change: Sequence[str] = (),
        report: bool = True,
    ) -> FilePath:
        """Run all epochs; returns the run folder. The best policy's weights are left in its `lora/`.

        Args:
            config: the resolved config, plain data, for the run folder.
            resume: go on where a run in the same folder has stopped; without one, start.
            allow_change: config keys that may differ from those of the run that is gone on with.
            report: write `report.html` in the end.

        Raises: Stopped where a signal asked for it, all being saved; ValueError for a folder of another run.
        """
        split_calls(self.model.callers)
        ended = ending(*vars(self).values(), self.evaluator.reward)
        with ended, telling(), self.stop, Run(self.folder, resume=resume, log_with=self.log_with) as run:
            keeper = Keeper(self, run, config, self.checkpoints)
            keeper.resume(allow_change)
            run.note("start", f"epoch {self.state.epoch} of {self.epochs} on {world_size()} processes")
            on_main(lambda: self._remark(keeper))
            self.evaluator.encode()
            self.prepare(run, keeper)
            while True:
                evaluate(self, run, keeper)
                done = self.state.epoch >= self.epochs and not self.state.part
                if done or over(self.evaluation.watch, self.state.history):
                    break
                metrics = self._run_epoch(run, keeper)
                judged = {"held-out": self._last("held-out"), "best": self.state.best}
                shown = {name: metrics[name] for name in self.headline()} | judged
                keeper.progress.update(self.sampling.groups * self.sampling.group_size, shown)
            keeper.progress.close()
            keeper.finish()
        if report:
            on_main(self._report)
        return self.folder

    def _remark(self, keeper: Keeper) -> None:
        if long := long_prompts(self):
            keeper.tell("prompts", long)
        for line in self.remarks():
            print(f"flowalign: {line}", file=sys.stderr, flush=True)

    def _report(self) -> None:
        """Write the run's report; a run that has been made is not lost for a page that cannot be."""
        from flowalign.report import write_report

        try:
            write_report(self.folder)
        except (ValueError, OSError) as error:
            print(f"flowalign: no report: {error}; try flowalign report {self.folder}", file=sys.stderr)

    def _last(self, name: str) -> float | None:
        return self.state.history[-1][name] if self.state.history else None

    def _run_epoch(self, run: Run, keeper: Keeper) -> dict[str, float]:
        worked = self.work(keeper)
        for normaliser in self.normalisers.values():
            normaliser.update(worked.scores)
        needed = self.needed(self.epoch_of(self.state.epoch, self.state.rounds))
        metrics = worked.metrics | self.state.costs(needed)
        self.state.epoch += 1
        self.state.part, self.state.buffer, self.state.seen, self.state.rounds = 0, {}, [], []
        self.state.rows, self.state.seconds = Rows(), {}
        run.log(self.state.epoch, metrics)
        for name, (limit, counts) in worked.histograms.items():
            run.log_histogram(self.state.epoch, name, -limit, limit, list(counts))
        if not due(self):
            keeper.poll()
        return metrics

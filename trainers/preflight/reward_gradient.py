"""How trainers by a reward's gradient are tried: one micro-batch forward and back, as an optimizer step makes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.distributed import share
from flowalign.records import Scores, intervals
from flowalign.transitions import ODE
from trainers.batch import Batch, parts_of
from trainers.collection import Epoch
from trainers.path_steps import PathSteps
from trainers.preflight.costs import Phases, Trial
from trainers.preflight.family import Family, Lines
from trainers.preflight.findings import spread
from trainers.preflight.geometry import Geometry, PlannedStep, looked_at, padded
from trainers.preflight.policy import share_of
from trainers.preflight.problems import Found, error, warning
from trainers.preflight.trial import Learning, Rollouts, Seen, caption, gradient_norm, same
from trainers.watch import Watch

if TYPE_CHECKING:
    from trainers.preflight.memory import Passing, Switches
    from trainers.reward_gradient import RewardGradientTrainer


@dataclass(frozen=True)
class Tried(Rollouts):
    """With what its gradient was, and the seconds of the micro-batch by phase."""

    learning: Learning
    phases: Phases


class RewardGradientFamily(Family):
    """Of trainers that go back through their rollouts."""

    def __init__(self, trainer: RewardGradientTrainer) -> None:
        self.trainer = trainer

    def geometry(self, processes: int, batch_size: int) -> Geometry:
        trainer, sampling, epoch = self.trainer, self.trainer.sampling, self.trainer.collection.epoch(0)
        parts = parts_of(len(epoch.rows), trainer.updates_per_epoch, trainer.seed, 0)
        many = [len(PathSteps(trainer, epoch, None).micro_batches(rows, batch_size)) for rows in parts]
        shares = tuple(sum(len(share(one, process, processes)) for one in many) for process in range(processes))
        return Geometry(
            sampling.groups, sampling.group_size, 1, len(epoch.rows), batch_size, len(parts), shares, shares
        )

    def planned_steps(self, epochs: tuple[Epoch, ...]) -> tuple[PlannedStep, ...]:
        found = []
        for interval in intervals(self.trainer.sigmas)[self.trainer.first_step() :]:
            at, noise, weights, trained = interval.index, 0.0, [0.0], 0
            for epoch in epochs:
                grid = intervals(epoch.path.grid(self.trainer.sigmas))
                if at >= len(grid):
                    continue
                mean, std = epoch.path.transitions[at](torch.zeros(1, 1), torch.ones(1, 1), grid[at])
                noise = max(noise, std)
                if at in self.trainer.trained_steps(epoch.path):
                    trained += 1
                    weights.append(abs(float(mean)))
            kinds = [epoch.path.transitions[at : at + 1] for epoch in epochs]
            noisy = sum(any(not isinstance(one, ODE) for one in kind) for kind in kinds)
            found.append(PlannedStep(interval, noise, max(weights), noisy / len(epochs), trained / len(epochs)))
        return tuple(found)

    def spent_rows(self, epoch: Epoch, cut: Geometry) -> Rows:
        """See `Family`. With activation checkpointing all rows with gradient are made once without it too."""
        made = self.trainer.needed(padded(epoch, sum(cut.shares) * cut.batch_size))
        return made + Rows(made.gradient) if self.trainer.recompute else made

    def of_settings(self, cut: Geometry, steps: tuple[PlannedStep, ...]) -> list[Found]:
        return [warning(remark) for remark in self.trainer.remarks()]

    def of_trial(self, trial: Trial) -> list[Found]:
        if trial.learning.grad_norm != 0:
            return []
        if trial.learning.flat:
            told = "these samples teach nothing (with ReFL: all of them have reached the margin; raise it)"
            return [warning(f"the first losses and their gradient are exactly 0: {told}")]
        return [
            error(
                "the gradient is exactly 0: none reaches the policy from the reward. Look at the LoRA's targets, and "
                "at whether the reward is flat where these pictures are"
            )
        ]

    def roll_out(self) -> Tried:
        """The first micro-batch of the first optimizer step, twice, forward and back; the second is measured."""
        trainer, real = self.trainer, self.trainer.reward
        model, epoch = trainer.model, trainer.collection.epoch(0)
        steps, seen = PathSteps(trainer, epoch, None), Seen(real, model.meter)
        rows = parts_of(len(epoch.rows), trainer.updates_per_epoch, trainer.seed, 0)[0]
        first, made = steps.micro_batches(rows)[0], list[Scores]()
        trainer.reward = seen
        try:
            for _ in range(2):
                seen.pixels.clear()
                trainer.optimizer.discard()
                model.meter.take()
                watch = Watch(trainer.watched(), 1.0, model.device)
                with model.meter.phase("update"):
                    made.append(steps.micro_batch(first, 0, len(first), watch))
                _, spent, seconds = model.meter.take()
        finally:
            trainer.reward = real
        losses, norm = [loss for _, _, loss in watch.every()], gradient_norm(trainer)
        trainer.optimizer.discard()
        loss, flat = fmean(losses) if losses else 0.0, norm == 0 and not any(losses)
        phases = Phases(*(seconds[name] for name in Phases._fields))
        learning = Learning(loss, norm, math.nan, math.nan, sum(phases), flat)
        return self._tried(epoch, first, made, seen, spent, learning, phases)

    def _tried(
        self,
        epoch: Epoch,
        rows: Tensor,
        made: list[Scores],
        seen: Seen,
        spent: Rows,
        learning: Learning,
        phases: Phases,
    ) -> Tried:
        trainer, scores, count = self.trainer, made[1], len(rows)
        told = trainer.collection.told_rows(epoch, rows.tolist())
        batch = Batch(
            epoch.path, rows, told.text, (), scores, torch.zeros(count, dtype=torch.int64), scores.total.nan_to_num(),
            scores.valid.float(),
        )  # fmt: skip
        size = trainer.sampling.batch_size * trainer.views
        return Tried(
            batch,
            batch.advantages,
            f"the first {count} samples",
            tuple(caption(f"{text[:48]}\n", scores, i) for i, text in enumerate(told.text)),
            torch.cat(seen.pixels)[:: trainer.views][:count].float() / 255,
            seen.first[0],
            same(*made),
            phases.rollout / max(spent.forward, 1),
            phases.decode / size,
            phases.reward / size,
            learning,
            phases,
        )

    def learn(self, rollouts: Rollouts) -> Learning:
        """What `roll_out` has seen: its samples cannot be had without their gradient."""
        assert isinstance(rollouts, Tried)
        return rollouts.learning

    def phases(self, cut: Geometry, trial: Trial) -> Phases:
        """Of each phase as many times the trial's as there are micro-batches; the network's follow the plan's steps."""
        first, *_ = epochs = looked_at(self.trainer)
        costs = [self.spent_rows(epoch, cut).cost for epoch in epochs]
        network = fmean(costs) / self.spent_rows(first, cut).cost
        assert isinstance(trial.rollouts, Tried)
        turns, taken = max(cut.shares), trial.rollouts.phases
        return Phases(
            turns * taken.rollout * network, turns * taken.decode, turns * taken.reward, turns * taken.update * network
        )

    def kept_bytes(self, cut: Geometry) -> int:
        """Nothing outlives its optimizer step."""
        return 0

    def learning_bytes(self, choice: Switches, passing: Passing) -> int:
        """Of one call where steps are made anew, of all with gradient where they are not; or of decoder and reward."""
        rows = choice.batch_size * self.trainer.views
        many = max(self.trainer.kept_calls(epoch.path) for epoch in looked_at(self.trainer))
        call = passing.activations(rows, choice.gradient_checkpointing, choice.precision)
        seeing = passing.seeing(rows, self.trainer.picture_loss)
        latents = 3 * many * rows * self.trainer.collection.largest * 4
        if self.trainer.recompute:
            return max(call.peak, seeing) + latents
        return many * call.saved + max(call.peak - call.saved, seeing) + latents

    def plan_lines(self, steps: tuple[PlannedStep, ...]) -> Lines:
        first, sigmas = self.trainer.first_step(), self.trainer.sigmas
        many = f"the first {first} of {len(sigmas) - 1} steps are"
        apart = f"{many} not made: the chain starts from real media, noised to sigma {sigmas[first]:.4f}"
        shown: Lines = [("", apart)] if first else []
        shown += [("", "sigma                noise     gradient  scaled by")] if steps else []
        for step in steps:
            span = f"{step.interval.sigma:.4f} to {step.interval.sigma_next:.4f}"
            noise = f"{step.std:<9.4g}" if step.std else "no       "
            scale = f"{step.leverage:.3g}" if step.trained else ""
            line = f"{span}     {noise} {share_of(step.trained):<9} {scale}".rstrip()
            shown.append((f"step {step.interval.index}", line))
        meant = "scaled by: how much the latents move where the velocity moves by 1, and so the gradient of that step"
        return [*shown, *([("", meant)] if shown else [])]

    def step_lines(self, trial: Trial, cut: Geometry) -> Lines:
        learning = trial.learning
        return [
            ("scores", spread(trial.rollouts.scores.total[trial.rollouts.scores.valid])),
            ("loss", f"{learning.loss:.4g}"),
            ("gradient's norm", f"{learning.grad_norm:.4g}, of one micro-batch"),
        ]

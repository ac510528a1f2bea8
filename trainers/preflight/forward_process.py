"""How trainers of the forward process are tried: the first group or pairs, and one call with gradient of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch

from flowalign.accounting import Rows
from flowalign.media import shown
from flowalign.pictures import to_bytes
from flowalign.randomness import key_generator
from flowalign.records import Scores
from flowalign.videos import stills
from rewards.joined import join_scores
from trainers.batch import Batch, no_steps, parts_of
from trainers.collection import Epoch
from trainers.forward_source import StoredPairs
from trainers.forward_steps import ForwardSteps, Units
from trainers.held_out_pairs import held_out_samples
from trainers.preflight.costs import Phases, Trial
from trainers.preflight.family import Family, Lines
from trainers.preflight.findings import spread
from trainers.preflight.geometry import Geometry, PlannedStep, looked_at, padded, steps_of_paths
from trainers.preflight.policy import share_of, waited
from trainers.preflight.problems import Found, error, warning
from trainers.preflight.trial import Learning, Rollouts, caption, gradient_norm, sample_first, timed
from trainers.state import Collected
from trainers.watch import Watch

if TYPE_CHECKING:
    from trainers.forward_process import ForwardProcessTrainer
    from trainers.preflight.memory import Passing, Switches

LOOKED_AT = 2000  # sigmas drawn to say where they lie
PAIRS = 6  # shown on the sheet


@dataclass(frozen=True)
class Tried(Rollouts):
    """With the epoch's units and scores as far as they are known, and the micro-batches whose latents these need."""

    units: Units
    known: Scores
    parts: tuple[Collected, ...]


class ForwardProcessFamily(Family):
    """Of trainers that noise clean latents anew."""

    def __init__(self, trainer: ForwardProcessTrainer) -> None:
        self.trainer = trainer

    def geometry(self, processes: int, batch_size: int) -> Geometry:
        trainer, sampling, epoch = self.trainer, self.trainer.sampling, self.trainer.collection.epoch(0)
        homes = trainer.source.shares(epoch, processes, batch_size)
        calls = self._update_calls(epoch, processes, batch_size)
        updates = tuple(map(sum, zip(*calls, strict=True)))
        rolled = tuple(sum(start in held for start in self._starts(epoch, batch_size)) for held in homes)
        return Geometry(
            sampling.groups, sampling.group_size, epoch.members, len(epoch.rows), batch_size, len(calls),
            updates if trainer.stored else rolled, updates, self.units_as_such().samples.numel(), not trainer.stored,
        )  # fmt: skip

    def _update_calls(self, epoch: Epoch, processes: int, batch_size: int) -> list[list[int]]:
        """Micro-batches of each optimizer step, of each process."""
        trainer, units = self.trainer, self.units_as_such()
        steps = ForwardSteps(trainer, epoch, units, None)
        parts = parts_of(len(units), trainer.updates_per_epoch, trainer.seed, epoch.number)
        homes = trainer.source.shares(epoch, processes, batch_size)
        return [[len(steps.micro_batches(rows, held, batch_size)) for held in homes] for rows in parts]

    def _starts(self, epoch: Epoch, batch_size: int) -> list[int]:
        return [row * epoch.members for row in epoch.cuts(batch_size)[:-1]]

    def units_as_such(self) -> Units:
        """As many as an epoch has, if all of them count: of the first samples of even shares of it."""
        trainer, sampling = self.trainer, self.trainer.sampling
        count = trainer.units_per_epoch()
        first = torch.arange(count) * sampling.groups * sampling.group_size // count
        return Units(first[:, None] + torch.arange(trainer.members), torch.ones(count), torch.zeros(count))

    def planned_steps(self, epochs: tuple[Epoch, ...]) -> tuple[PlannedStep, ...]:
        """Of rollouts; the loss reads no step's density."""
        made = () if self.trainer.stored else steps_of_paths(epochs, self.trainer.sigmas, no_steps)
        return tuple(replace(step, leverage=0.0) for step in made)

    def spent_rows(self, epoch: Epoch, cut: Geometry) -> Rows:
        """See `Family`; fewer where pairs are ties, for which no call is made."""
        trainer = self.trainer
        total = trainer.source.needed(padded(epoch, sum(cut.shares) * cut.batch_size))
        each = trainer.units_per_call(cut.batch_size)
        for part, calls in enumerate(self._update_calls(epoch, len(cut.update_shares), cut.batch_size)):
            total += trainer.update_rows(sum(calls) * each, trainer.reads_older(epoch.number, part))
        return total

    def of_settings(self, cut: Geometry, steps: tuple[PlannedStep, ...]) -> list[Found]:
        return [warning(remark) for remark in self.trainer.remarks()]

    def of_trial(self, trial: Trial) -> list[Found]:
        told = trial.learning
        if told.flat:
            return [warning("the first group has nothing to learn from: all its scores are equal; look at the sheet")]
        if told.grad_norm == 0:
            return [error("the gradient is exactly 0: none reaches the policy. Look at the LoRA's targets")]
        doubt = self._doubt(trial.rollouts)
        return [] if doubt is None else [warning(f"in the first group {doubt}")]

    def _doubt(self, rollouts: Rollouts) -> str | None:
        assert isinstance(rollouts, Tried)
        return None if self.trainer.stored else self.trainer.doubt(rollouts.units, rollouts.known)

    def roll_out(self) -> Tried:
        source = self.trainer.source
        return self._first_pairs(source) if isinstance(source, StoredPairs) else self._first_group()

    def _first_group(self) -> Tried:
        trainer, sampling = self.trainer, self.trainer.sampling
        made = sample_first(trainer, clean=True)
        scores, size = join_scores([part.scores for part in made.parts]), sampling.group_size
        known, first = _padded(scores, sampling.groups * size), scores.rows(range(size))
        return Tried(
            self._batch(first, range(size)),
            first.total.nan_to_num(),
            trainer.collection.told_rows(trainer.collection.epoch(0), [0]).text[0],
            tuple(caption("", first, i) for i in range(size)),
            made.pixels,
            made.medium,
            made.repeatable,
            made.seconds_per_row,
            made.seconds_per_decode,
            made.seconds_per_score,
            trainer.units(trainer.collection.epoch(0), known),
            known,
            tuple(made.parts),
        )

    def _first_pairs(self, source: StoredPairs) -> Tried:
        """The first decided pairs of the first epoch, as their latents decode."""
        trainer, epoch = self.trainer, self.trainer.collection.epoch(0)
        scores = source.draw(epoch, None)
        units = trainer.units(epoch, scores)
        some = units.samples[units.weights > 0][:PAIRS].flatten().tolist()
        pixels = trainer.collection.decode(source.latents(epoch, some))
        told = trainer.collection.told_rows(epoch, some)
        media = shown(pixels, told, trainer.model.fps).pixels
        named = [f"{'the other' if i % 2 else 'preferred'}: {text[:48]}" for i, text in enumerate(told.text)]
        chosen = scores.rows(some)
        return Tried(
            self._batch(Scores(chosen.total, {}, chosen.valid), some),
            -torch.arange(len(some)).float(),
            "the first pairs, each with the preferred one first",
            tuple(named),
            to_bytes(stills(media)).float() / 255,
            to_bytes(media[0]),
            True,
            0.0,
            0.0,
            0.0,
            units,
            scores,
            (),
        )

    def _batch(self, scores: Scores, samples: Sequence[int]) -> Batch:
        collection, together = self.trainer.collection, torch.zeros(len(scores), dtype=torch.int64)
        epoch = collection.epoch(0)
        told = collection.told_rows(epoch, [sample // epoch.members for sample in samples])
        return Batch(
            epoch.path, torch.arange(len(scores)), told.text, (), scores, together, scores.total.nan_to_num(),
            scores.valid.float(),
        )  # fmt: skip

    def learn(self, rollouts: Rollouts) -> Learning:
        """Gradients of the first units that count, twice; the second is measured, and both are discarded."""
        assert isinstance(rollouts, Tried)
        trainer, units, optimizer = self.trainer, rollouts.units, self.trainer.optimizer
        epoch, counted = trainer.collection.epoch(0), (units.weights > 0).nonzero().flatten()
        flat = not len(counted) or trainer.idle(units.credit[counted])
        if flat:
            units = replace(self.units_as_such(), credit=torch.ones(len(units)))
            counted = torch.zeros(1, dtype=torch.int64)
        steps = ForwardSteps(trainer, epoch, units, None)
        size, micro = steps.micro_batches(counted, range(len(epoch.rows) * epoch.members))[0]
        trainer.state.buffer = dict(enumerate(rollouts.parts))
        try:
            for _ in range(2):
                optimizer.discard()
                watch = Watch(trainer.watched(), 1.0, trainer.model.device)
                total = float(units.weights[micro].sum()) * trainer.times.draws
                with trainer.model.sized(size):
                    seconds = timed(trainer.model, partial(steps.micro_batch, size, micro, total, watch))
        finally:
            trainer.state.buffer = {}
        norm, losses = gradient_norm(trainer), [loss for _, _, loss in watch.every()]
        optimizer.discard()
        return Learning(fmean(losses), norm, math.nan, math.nan, seconds, flat)

    def phases(self, cut: Geometry, trial: Trial) -> Phases:
        trainer, made = self.trainer, trial.rollouts
        update = max(cut.update_shares) * trial.learning.seconds_per_step * self._dearer()
        if trainer.stored:
            return Phases(0.0, 0.0, 0.0, update)
        turns = max(cut.shares)
        rows = trainer.source.needed(padded(trainer.collection.epoch(0), turns * cut.batch_size)).forward
        samples = min(turns * cut.batch_size, cut.rows) * cut.members
        rollout, decode = rows * made.seconds_per_row, samples * made.seconds_per_decode
        reward = waited(samples * made.seconds_per_score, rollout + decode, turns if trainer.ahead() else 1)
        return Phases(rollout, decode, reward, update)

    def judged_beside(self, trial: Trial, groups: int) -> float:
        """Of held-out pairs, whose rows take what those of the update do, a row with gradient counted as 3."""
        trainer, pairs = self.trainer, self.trainer.held_out_pairs
        if pairs is None:
            return 0.0
        one, units = trainer.update_rows(1), trainer.units_per_call()
        networks = (one.forward + one.gradient) / (trainer.members * trainer.times.draws)
        each = trial.learning.seconds_per_step / trainer.update_rows(units).cost
        return held_out_samples(trainer, pairs, groups) * networks * each

    def _dearer(self) -> float:
        """What an optimizer step costs on average over what the first one does, which needs no older policy."""
        trainer = self.trainer
        steps = [(epoch.number, part) for epoch in looked_at(trainer) for part in range(trainer.updates_per_epoch)]
        costs = [trainer.update_rows(1, trainer.reads_older(*step)).cost for step in steps]
        return fmean(costs) / costs[0]

    def kept_bytes(self, cut: Geometry) -> int:
        """The latents of a process's samples, float32."""
        if self.trainer.stored:
            return 0
        return min(max(cut.shares) * cut.batch_size, cut.rows) * cut.members * self.trainer.collection.largest * 4

    def learning_bytes(self, choice: Switches, passing: Passing) -> int:
        """Of one call with gradient, and the latents, noise and velocities beside it."""
        call = passing.activations(choice.batch_size, choice.gradient_checkpointing, choice.precision)
        last = self.trainer.epochs - 1, self.trainer.updates_per_epoch - 1
        beside = 6 + self.trainer.needs_reference() + self.trainer.reads_older(*last)
        return call.peak + beside * choice.batch_size * self.trainer.collection.largest * 4

    def plan_lines(self, steps: tuple[PlannedStep, ...]) -> Lines:
        shown: Lines = [("", "sigma                stochastic  std")] if steps else []
        for step in steps:
            span = f"{step.interval.sigma:.4f} to {step.interval.sigma_next:.4f}"
            std = f"{step.std:.4g}" if step.stochastic else ""
            shown.append((f"step {step.interval.index}", f"{span}     {share_of(step.stochastic):<11} {std}".rstrip()))
        trainer = self.trainer
        table, grid = trainer.model.train_sigmas(), trainer.sigmas[:-1]
        drawn = [trainer.times.draw(key_generator(0, "look", i), table, grid) for i in range(LOOKED_AT)]
        low, middle, high = np.quantile(np.array(drawn), (0.05, 0.5, 0.95))
        told = f"{trainer.times.draws} times a unit, at sigma {low:.3f}, {middle:.3f}, {high:.3f} (5, 50, 95 %)"
        return [*shown, ("noised anew", told)]

    def step_lines(self, trial: Trial, cut: Geometry) -> Lines:
        rollouts, learning = trial.rollouts, trial.learning
        assert isinstance(rollouts, Tried)
        samples = "" if self.trainer.stored else spread(rollouts.scores.total[rollouts.scores.valid])
        return [
            ("scores", samples),
            ("loss", f"{learning.loss:.4g}{', of units as such: none counts' if learning.flat else ''}"),
            ("gradient's norm", f"{learning.grad_norm:.4g}, of one micro-batch"),
        ]


def _padded(scores: Scores, total: int) -> Scores:
    """An epoch's scores, of which only the first are known."""
    more = total - len(scores)
    parts = {name: torch.cat([value, value.new_zeros(more)]) for name, value in scores.parts.items()}
    valid = torch.cat([scores.valid, scores.valid.new_zeros(more)])
    return Scores(torch.cat([scores.total, scores.total.new_zeros(more)]), parts, valid)

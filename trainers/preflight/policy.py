"""How trainers by policy gradient are tried: whole groups rolled out, and one micro-batch of their replay."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from flowalign.accounting import Rows
from flowalign.distributed import share
from flowalign.report.formats import percent
from rewards.joined import join_scores
from trainers.batch import Batch, Bucket, join_steps_of, no_steps, rows_of_step
from trainers.collection import Epoch
from trainers.preflight import policy_findings as findings
from trainers.preflight.costs import Phases, Trial
from trainers.preflight.family import Family, Lines
from trainers.preflight.findings import spread
from trainers.preflight.geometry import Geometry, PlannedStep, looked_at, padded, steps_of_paths
from trainers.preflight.problems import Found, warning
from trainers.preflight.trial import Learning, Rollouts, caption, gradient_norm, sample_first, timed
from trainers.resampling import learnt_of
from trainers.state import Collected
from trainers.update import Update
from trainers.watch import Watch

if TYPE_CHECKING:
    from trainers.policy_gradient import PolicyTrainer
    from trainers.preflight.memory import Passing, Switches


class PolicyFamily(Family):
    """Of trainers that replay stored steps."""

    def __init__(self, trainer: PolicyTrainer) -> None:
        self.trainer = trainer

    def geometry(self, processes: int, batch_size: int) -> Geometry:
        trainer, sampling, epoch = self.trainer, self.trainer.sampling, self.trainer.collection.epoch(0)
        cuts = epoch.cuts(batch_size)
        parts = [share(len(cuts) - 1, process, processes) for process in range(processes)]
        shares = [range(cuts[part.start], cuts[part.stop]) for part in parts]
        held = [[len(bucket.among(rows_held)) for bucket in epoch.buckets] for rows_held in shares]
        each, taken = trainer.updates_per_epoch, self._taken(epoch)
        held = [[count * taken // len(epoch.rows) for count in counts] for counts in held]
        updates = tuple(sum(_update_calls(count, each, batch_size) for count in counts) for counts in held)
        return Geometry(
            sampling.groups, sampling.group_size, epoch.members, len(epoch.rows), batch_size, each,
            tuple(len(part) for part in parts), updates, 0 if taken == len(epoch.rows) else taken,
        )  # fmt: skip

    def _taken(self, epoch: Epoch) -> int:
        """Rows that the update takes, where no group is left out."""
        return sum(rows for _, rows in learnt_of(epoch, self.trainer.selection, self.trainer.sampling).paths)

    def planned_steps(self, epochs: tuple[Epoch, ...]) -> tuple[PlannedStep, ...]:
        return steps_of_paths(epochs, self.trainer.sigmas, self.trainer.trained_steps)

    def spent_rows(self, epoch: Epoch, cut: Geometry) -> Rows:
        """See `Family`. The update takes fewer where all samples of a micro-batch have advantage 0: it is left out."""
        trainer = self.trainer
        trained, reference = trainer.trained_steps, trainer.needs_reference()
        rolled = padded(epoch, sum(cut.shares) * cut.batch_size)
        updated = padded(epoch, sum(cut.update_shares) * cut.batch_size)
        needed = trainer.collection.needed
        both, rollouts = needed(updated, trained, reference), needed(updated, no_steps, False)
        update = Rows(both.forward - rollouts.forward, both.gradient - rollouts.gradient)
        update += self._imitated(cut)
        return needed(rolled, no_steps, False) + update + trainer.collection.scoring_rows(epoch)

    def _imitated(self, cut: Geometry) -> Rows:
        """Of the supervised branch, with the padding of one process."""
        each = -(-cut.groups // cut.updates)
        return self.trainer.supervised_rows(cut.updates * -(-each // cut.batch_size) * cut.batch_size)

    def of_settings(self, cut: Geometry, steps: tuple[PlannedStep, ...]) -> list[Found]:
        return [
            findings.no_noise(steps),
            findings.last_step(steps),
            findings.clipping(self.trainer),
            findings.small_groups(self.trainer),
            *(warning(remark) for remark in self.trainer.remarks()),
        ]

    def of_trial(self, trial: Trial) -> list[Found]:
        return [
            findings.no_spread(trial.rollouts),
            findings.no_gradient(trial.learning),
            findings.off_policy(trial.learning),
        ]

    def roll_out(self) -> Rollouts:
        """The micro-batches that hold the first group."""
        made = sample_first(self.trainer)
        batch = self.first_groups(made.parts)
        advantages = batch.advantages.reshape(len(batch.advantages), -1).mean(1)
        return Rollouts(
            batch,
            advantages,
            batch.texts[0],
            tuple(caption(f"advantage {float(one):+.2f}   ", batch.scores, i) for i, one in enumerate(advantages)),
            made.pixels,
            made.medium,
            made.repeatable,
            made.seconds_per_row,
            made.seconds_per_decode,
            made.seconds_per_score,
        )

    def first_groups(self, parts: list[Collected]) -> Batch:
        """The epoch's whole groups among these micro-batches as a batch; scores that are not valid are left out."""
        trainer, collection, size = self.trainer, self.trainer.collection, self.trainer.sampling.group_size
        epoch = collection.epoch(0)
        scores = join_scores([part.scores for part in parts])
        groups = len(scores) // size
        kept, rows = groups * size, groups * size // epoch.members
        scores = scores.rows(range(kept))
        group_ids, known = torch.arange(groups).repeat_interleave(size), scores.valid
        advantages = trainer.credited(scores, group_ids, epoch.path) if known.any() else torch.zeros(kept)
        sampled = sum(len(part.scores) for part in parts) // epoch.members
        steps = tuple(rows_of_step(step, rows, sampled) for step in join_steps_of(parts))
        told, ends = collection.told_rows(epoch, range(rows)), [one.latents for one in parts if one.latents is not None]
        return Batch(
            epoch.path, torch.arange(rows), told.text, steps, scores, group_ids, advantages, known.float(),
            told.negatives(), (Bucket(epoch.buckets[0].size, range(rows)),), trainer.model.images(told),
            (torch.cat(ends)[:kept],) if ends else (),
        )  # fmt: skip

    def learn(self, rollouts: Rollouts) -> Learning:
        """Gradients of the first micro-batch, twice; the second is measured, and both are discarded."""
        trainer, batch = self.trainer, rollouts.batch
        flat = not (batch.advantages.reshape(len(batch.weights), -1) * batch.weights[:, None]).any()
        if flat:
            batch = replace(batch, advantages=torch.ones_like(batch.advantages), weights=torch.ones_like(batch.weights))
        rows = batch.rows[: trainer.sampling.batch_size]
        update, optimizer = Update(trainer, batch, None), trainer.optimizer
        for _ in range(2):
            optimizer.discard()
            watch = Watch(trainer.watched(), trainer.ratio_limit(), trainer.model.device)
            seconds = timed(trainer.model, partial(update._accumulate, rows, watch))
        norm = gradient_norm(trainer)
        optimizer.discard()
        seen, losses = watch.means(), [loss for _, _, loss in watch.every()]
        return Learning(
            sum(losses) / max(len(losses), 1),
            norm,
            seen.get("ratio_max", math.nan),
            seen.get("clip_fraction", math.nan),
            seconds / max(len(update.trained), 1),
            flat,
        )

    def phases(self, cut: Geometry, trial: Trial) -> Phases:
        trainer, made, epochs = self.trainer, trial.rollouts, looked_at(self.trainer)
        size, turns, update_turns = trainer.sampling.batch_size, max(cut.shares), max(cut.update_shares)
        rolled = [padded(epoch, turns * size) for epoch in epochs]
        needed, scoring = trainer.collection.needed, trainer.collection.scoring_rows
        rows = fmean((needed(epoch, no_steps, False) + scoring(epoch)).cost for epoch in rolled)  # padding included
        trained = fmean(len(trainer.trained_steps(epoch.path)) for epoch in epochs)
        samples = min(turns * size, cut.rows) * cut.members  # a sample's completions are among its seconds
        rollout, decode = rows * made.seconds_per_row, samples * made.seconds_per_decode
        reward = waited(samples * made.seconds_per_score, rollout + decode, turns if trainer.ahead() else 1)
        return Phases(rollout, decode, reward, update_turns * trained * trial.learning.seconds_per_step)

    def kept_bytes(self, cut: Geometry) -> int:
        """Latents before and after every stochastic step and their log-probs, float32; those at the end if kept too."""
        rows, numbers = min(max(cut.shares) * cut.batch_size, cut.rows), self.trainer.collection.largest
        found = [0]
        for epoch in looked_at(self.trainer):
            for path, _ in epoch.paths:
                widths = [path.width(at, cut.members) for step in path.stochastic for at in (step, step + 1)]
                before, after = sum(widths[::2]), sum(widths[1::2])
                ends = cut.members * numbers if self.trainer.supervised is not None else 0
                found.append(rows * ((before + after) * numbers + after + ends) * 4)
        return max(found)

    def learning_bytes(self, choice: Switches, passing: Passing) -> int:
        """Of the step with most rows: samples that share their start are each a row of their own later on."""
        members, rows = self.trainer.collection.epoch(0).members, [1]
        for epoch in looked_at(self.trainer):
            for path, _ in epoch.paths:
                rows += [path.width(step, members) for step in self.trainer.trained_steps(path)]
        size = choice.batch_size * max(rows)
        return passing.activations(size, choice.gradient_checkpointing, choice.precision).peak

    def plan_lines(self, steps: tuple[PlannedStep, ...]) -> Lines:
        shown: Lines = [("", "sigma                stochastic  std       leverage  trained")] if steps else []
        for step in steps:
            span = f"{step.interval.sigma:.4f} to {step.interval.sigma_next:.4f}"
            if not step.stochastic:
                shown.append((f"step {step.interval.index}", f"{span}     no"))
                continue
            part, trained = (share_of(value) for value in (step.stochastic, step.trained))
            line = f"{span}     {part:<11} {step.std:<9.4g} {step.leverage:<9.3g} {trained}"
            shown.append((f"step {step.interval.index}", line))
        meant = "leverage: by how many stds the step's mean moves where the velocity moves by 1"
        return [*shown, *([("", meant)] if shown else [])]

    def step_lines(self, trial: Trial, cut: Geometry) -> Lines:
        rollouts, learning = trial.rollouts, trial.learning
        equal, groups = findings.equal_groups(rollouts)
        whole = groups == cut.groups
        ratio = "exactly 1, as it has to be" if learning.off == 0 else f"off 1 by {learning.off:.2g} at most"
        credit = rollouts.advantages[rollouts.first]
        balanced = " (a group's advantages add up to 0)" if abs(learning.loss) < 1e-6 else ""
        measured = ", measured with advantages of 1, as all are 0" if learning.flat else balanced
        return [
            ("scores", spread(rollouts.scores.total[rollouts.first & rollouts.scores.valid])),
            ("advantages", f"{float(credit.amin()):+.2f} to {float(credit.amax()):+.2f}"),
            ("", "" if whole else f"over {groups} of {cut.groups} groups: a std over the batch will be another"),
            ("equal scores", f"in {equal} of {groups} groups sampled"),
            ("loss", f"{learning.loss:.4g}{measured}"),
            ("gradient's norm", f"{learning.grad_norm:.4g}, of one micro-batch"),
            ("first ratio", ratio if learning.off == learning.off else ""),
        ]


def waited(reward: float, beside: float, calls: int) -> float:
    """Seconds of an epoch that its rewards are waited for, where all but the last call are made beside the rollouts."""
    return max(reward - beside * (calls - 1) / calls, reward / calls)


def share_of(value: float) -> str:
    """Of the epochs."""
    return {0.0: "no", 1.0: "yes"}.get(value, percent(value))


def _update_calls(rows: int, updates: int, size: int) -> int:
    """Micro-batches of so many rows in so many optimizer steps, each of which has as many rows or one more."""
    each, more = divmod(rows, updates)
    return more * -(-(each + 1) // size) + (updates - more) * -(-each // size)

"""An epoch's update: the optimizer steps that a trainer's loss makes of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.distributed import data_size, largest
from flowalign.models.base import Model
from flowalign.records import Condition, Step, expand_rows, intervals
from flowalign.rollout import Policy, Replay, replay
from flowalign.schedules import Path
from flowalign.step_weights import StepWeights
from flowalign.transitions import Transition
from trainers.batch import Batch, Part, parts_of
from trainers.ratio_guard import recompute
from trainers.steps import OptimizerSteps
from trainers.supervised import Imitation
from trainers.watch import Watch, save_bad

if TYPE_CHECKING:
    from trainers.collection import Epoch
    from trainers.keeper import Keeper
    from trainers.policy_gradient import PolicyTrainer


@dataclass(frozen=True)
class Call:
    """One step of a micro-batch as the update calls the network for it, padding included.

    at: the step's number among those of its part. rows: of that step's latents. advantages, weights: of `samples`.
    """

    at: int
    rows: Int[Tensor, " p"]
    step: Step
    transition: Transition
    condition: Condition
    advantages: Float[Tensor, b * k]
    weights: Float[Tensor, " b"]
    samples: Int[Tensor, " b"]

    def replay(self, model: Model, policy: Policy) -> Replay:
        """The step under the present policy."""
        return replay(model, self.step, self.transition, self.condition, policy)


class Update(OptimizerSteps):
    """One pass over a batch in `updates_per_epoch` optimizer steps.

    Each step's loss is divided by its weighted number of samples times trained steps.
    """

    trainer: PolicyTrainer

    def __init__(self, trainer: PolicyTrainer, batch: Batch, keeper: Keeper | None) -> None:
        super().__init__(trainer, keeper)
        branch = trainer.supervised
        self.imitation = None if branch is None else Imitation(trainer, batch, branch)
        self.counted = batch.weights.reshape(-1, batch.members).ne(0).any(1)  # rows with a sample that does
        self.batch, self.trained = batch, trainer.trained_steps(batch.path)
        weigh = trainer.step_weights if self.counted.any() else None
        self.step_weights = {} if weigh is None else self._step_weights(weigh)
        self.parts: Sequence[Tensor] = ()  # the rows of each optimizer step, once it is known

    def run(self, order: Int[Tensor, " p"] | None = None) -> dict[str, float]:
        """All steps; returns the means of what was seen.

        Args:
            order: the order in which rows are taken, cut into as many equal parts; by default drawn from the seed and
                the epoch, so that each optimizer step has an equal share of each group and of each process's rows.
        """
        steps = self.trainer.updates_per_epoch
        self.parts = self._parts(steps) if order is None else [*order.tensor_split(steps)]
        means = self._run(self.parts)
        anew = [row["first_ratio"][0] for row in self.trainer.state.seen if "first_ratio" in row]
        return means | ({"ratio_before_recompute": anew[0]} if anew else {})

    def _parts(self, steps: int) -> list[Tensor]:
        """The rows of each optimizer step, of those with a sample that counts."""
        taken = self.counted.nonzero().flatten()
        return [taken[part] for part in parts_of(len(taken), steps, self.trainer.seed, self.trainer.state.epoch)]

    def _watch(self) -> Watch:
        return Watch(self.trainer.watched(), self.trainer.ratio_limit(), self.trainer.model.device)

    def _save_bad(self, folder: FilePath, name: str, watch: Watch) -> None:
        save_bad(folder, name, watch, self.batch)

    def _accumulate(self, rows: Int[Tensor, " p"], watch: Watch) -> dict[str, Any]:
        total = self._terms(rows)
        if total == 0:
            return self._imitate()
        guard, first = self.trainer.ratio_guard, len(self.parts) > 0 and self.trainer.state.part == 0
        gap = self._add_up(rows, total, watch, guard.limit if guard is not None and first else math.inf)
        if gap is None:
            return self._imitate()
        self.trainer.optimizer.discard()
        recompute(self, gap)
        watch.clear()
        self._add_up(rows, total, watch, math.inf)
        return self._imitate() | {"first_ratio": [gap]}

    def _add_up(self, rows: Int[Tensor, " p"], total: Tensor, watch: Watch, limit: float) -> float | None:
        """The gradient of rows; or, as soon as a ratio is further from 1 than the limit, how far it is."""
        for one in self.each(rows):
            if one is not None:
                with self.trainer.model.sized(one[0].size):
                    for call in self.calls(*one):
                        self._backward(call, total, watch)
            furthest = largest([watch.furthest()])[0] if limit < math.inf else 0.0
            if furthest > limit:
                return furthest
        return None

    def each(self, rows: Tensor) -> Iterator[tuple[Part, Tensor] | None]:
        """This process's micro-batches of rows, turn by turn with the others, None for a turn that it has none in."""
        mine = self._micro_batches(rows)
        turns = self._turns(rows, len(mine))
        for turn in range(turns):
            self._stop_if_asked(turn, turns)
            yield mine[turn] if turn < len(mine) else None

    def _imitate(self) -> dict[str, float]:
        return {} if self.imitation is None else self.imitation.add()

    def _terms(self, rows: Int[Tensor, " p"]) -> Tensor:
        """Weighted samples of rows, counted for each of their trained steps."""
        batch, total = self.batch, torch.zeros(())
        for bucket in batch.cut:
            among = rows[(rows >= bucket.rows.start) & (rows < bucket.rows.stop)]
            trained = self.trainer.trained_steps(batch.path_of(bucket))
            total = total + batch.weights[expand_rows(among, batch.members)].sum() * len(trained)
        return total

    def _step_weights(self, weigh: StepWeights) -> dict[tuple[Path, int], float]:
        """What each trained step weighs, over the rows that count. Of several sizes the largest one's grid is meant."""
        batch, sigmas = self.batch, self.trainer.collection.sigmas
        found: dict[tuple[Path, int], int] = {}
        for bucket in batch.cut:
            path, counted = batch.path_of(bucket), int(self.counted[bucket.rows.start : bucket.rows.stop].sum())
            for step in self.trainer.trained_steps(path) if counted else ():
                found[path, step] = found.get((path, step), 0) + counted
        steps = [(path.transitions[step], intervals(path.grid(sigmas))[step]) for path, step in found]
        return dict(zip(found, weigh(steps, [*found.values()]), strict=True))

    def _micro_batches(self, rows: Int[Tensor, " p"]) -> list[tuple[Part, Int[Tensor, " m"]]]:
        """Those of the rows that this process holds, in calls of one size each; none for rows that do not count."""
        found, rows = [], rows[self.counted[rows]]
        for part in self.batch.parts:
            held = rows[torch.isin(rows, part.rows)]
            found += [(part, micro) for micro in held.split(self.trainer.sampling.batch_size) if len(micro)]
        return found

    def _turns(self, rows: Int[Tensor, " p"], mine: int) -> int:
        """The micro-batches of the process that has most."""
        collection, world = self.trainer.collection, data_size()
        if world == 1:
            return mine
        epoch, size = self.epoch(), self.trainer.sampling.batch_size
        most, rows = 0, rows[self.counted[rows]]
        for process in range(world):
            held = [collection.rows_of(epoch, part) for part in collection.shares(epoch, process)]
            alike = [bucket.among(at) for at in held for bucket in epoch.buckets]
            counts = [int(((rows >= one.start) & (rows < one.stop)).sum()) for one in alike]
            most = max(most, sum(-(-count // size) for count in counts))
        return most

    def epoch(self) -> Epoch:
        return self.trainer.epoch_of(self.trainer.state.epoch, self.trainer.state.rounds)

    def calls(self, part: Part, micro: Tensor) -> Iterator[Call]:
        """The steps of a micro-batch that there is something to learn from, padded to the shape of all others."""
        trainer, batch = self.trainer, self.batch
        padded = torch.cat([micro, micro[-1:].expand(trainer.sampling.batch_size - len(micro))])
        samples = expand_rows(padded, batch.members)
        weights = batch.weights[samples].clone()
        weights[len(micro) * batch.members :] = 0
        if not weights.any():
            return  # none of these samples has a valid score
        condition = batch.condition(trainer.model, padded.tolist())
        places = padded - part.rows[0]  # a process's rows follow one another
        trained = trainer.trained_steps(part.path)
        for at, step in enumerate(part.steps):
            if step.interval.index not in trained:
                continue
            advantages = batch.advantages[samples]
            advantages = advantages if advantages.ndim == 1 else advantages[:, at]
            if not trainer.needs_reference() and not advantages[weights > 0].any():
                continue  # nothing to learn from: no call
            if self.step_weights:
                advantages = advantages * self.step_weights[part.path, step.interval.index]
            apart = len(step.latents) // len(part.rows)  # rows of this call for each of the batch's
            rows = expand_rows(places, apart)
            taken = step.rows(rows.to(step.latents.device)).to(trainer.model.device)
            told = condition.rows(torch.arange(len(padded)).repeat_interleave(apart)) if apart > 1 else condition
            transition = part.path.transitions[step.interval.index]
            yield Call(at, rows, taken, transition, told, advantages, weights, samples)

    def _backward(self, call: Call, total: Tensor, watch: Watch) -> None:
        """Add the gradient of one step of a micro-batch."""
        trainer, step, samples, weights = self.trainer, call.step, call.samples, call.weights
        leaves = len(samples) // len(step.log_probs)  # of a step that samples share: it counts once for each of them
        reference = self._reference(call, leaves)
        new = call.replay(trainer.model, trainer.policy).repeated(leaves)
        if trainer.needs_old_mean():
            old_mean = self._old_mean(step, new.std, samples[::leaves])
            new = replace(new, old_mean=old_mean.repeat_interleave(leaves, 0))
        old, device = step.log_probs.repeat_interleave(leaves), new.log_probs.device
        losses = trainer.loss(new, old, call.advantages.to(device), reference, step.interval)
        trainer.optimizer.backward((losses * weights.to(device)).sum() / total.to(device))
        trainer.model.meter.count("backward")
        with torch.no_grad():
            numbers = trainer.watch(new, old, reference, step.interval)
            watch.add(numbers, losses, weights, samples, step.interval.index)

    def _old_mean(self, step: Step, std: float, samples: Tensor) -> Tensor:
        """The step's end less its noise, which is drawn again: a mean need not be kept. Right to float32's rounding.

        Args:
            samples: the first that has come of each row of `step.latents_next`.
        """
        collection, epoch, members = self.trainer.collection, self.epoch(), self.batch.members
        owners = [(epoch.rows[at // members], at % members) for at in samples.tolist()]
        drawn = [(group, first + member) for (group, first), member in owners]
        noise = collection.noise(epoch, drawn, "step", step.interval.index)
        return step.latents_next - std * noise.to(step.latents_next.device)

    @torch.no_grad()
    def _reference(self, call: Call, leaves: int) -> Replay | None:
        if not self.trainer.needs_reference():
            return None
        with self.trainer.as_reference():
            made = call.replay(self.trainer.model, self.trainer.policy)
        return made.repeated(leaves)

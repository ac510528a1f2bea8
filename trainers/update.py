"""An epoch's update: the optimizer steps that a trainer's loss makes of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from flowalign.distributed import world_size
from flowalign.records import Condition, Step, expand_rows
from flowalign.rollout import Replay, replay
from flowalign.transitions import Transition
from trainers.batch import Batch, Part, parts_of
from trainers.steps import OptimizerSteps
from trainers.watch import Watch, save_bad

if TYPE_CHECKING:
    from trainers.keeper import Keeper
    from trainers.policy_gradient import PolicyTrainer


class Update(OptimizerSteps):
    """One pass over a batch in `updates_per_epoch` optimizer steps.

    Each step's loss is divided by its weighted number of samples times trained steps.
    """

    trainer: PolicyTrainer

    def __init__(self, trainer: PolicyTrainer, batch: Batch, keeper: Keeper | None) -> None:
        super().__init__(trainer, keeper)
        self.batch, self.trained = batch, trainer.trained_steps(batch.path)

    def run(self, order: Int[Tensor, " p"] | None = None) -> dict[str, float]:
        """All steps; returns the means of what was seen.

        Args:
            order: the order in which rows are taken, cut into as many equal parts; by default drawn from the seed and
                the epoch, so that each optimizer step has an equal share of each group and of each process's rows.
        """
        steps = self.trainer.updates_per_epoch
        return self._run(self._parts(steps) if order is None else [*order.tensor_split(steps)])

    def _parts(self, steps: int) -> list[Tensor]:
        """The rows of each optimizer step."""
        return parts_of(len(self.batch.texts), steps, self.trainer.seed, self.trainer.state.epoch)

    def _watch(self) -> Watch:
        return Watch(self.trainer.watched(), self.trainer.ratio_limit(), self.trainer.model.device)

    def _save_bad(self, folder: Path, name: str, watch: Watch) -> None:
        save_bad(folder, name, watch, self.batch)

    def _accumulate(self, rows: Int[Tensor, " p"], watch: Watch) -> dict[str, Any]:
        trainer, batch = self.trainer, self.batch
        total = batch.weights[expand_rows(rows, batch.members)].sum() * len(self.trained)
        if total == 0:
            return {}
        mine = self._micro_batches(rows)
        turns = self._turns(rows, len(mine))
        for turn in range(turns):
            self._stop_if_asked(turn, turns)
            if turn < len(mine):
                part, micro = mine[turn]
                with trainer.model.sized(part.size):
                    self._micro_batch(part, micro, total, watch)
        return {}

    def _micro_batches(self, rows: Int[Tensor, " p"]) -> list[tuple[Part, Int[Tensor, " m"]]]:
        """Those of the rows that this process holds, in calls of one size each."""
        found = []
        for part in self.batch.parts:
            held = rows[torch.isin(rows, part.rows)]
            found += [(part, micro) for micro in held.split(self.trainer.sampling.batch_size) if len(micro)]
        return found

    def _turns(self, rows: Int[Tensor, " p"], mine: int) -> int:
        """The micro-batches of the process that has most."""
        collection, world = self.trainer.collection, world_size()
        if world == 1:
            return mine
        epoch, size = collection.epoch(self.trainer.state.epoch), self.trainer.sampling.batch_size
        shares = [collection.rows_of(epoch, collection.mine(epoch, process)) for process in range(world)]
        most = 0
        for at in shares:
            alike = [bucket.among(at) for bucket in epoch.buckets]
            counts = [int(((rows >= one.start) & (rows < one.stop)).sum()) for one in alike]
            most = max(most, sum(-(-count // size) for count in counts))
        return most

    def _micro_batch(self, part: Part, micro: Int[Tensor, " p"], total: Tensor, watch: Watch) -> None:
        trainer, batch = self.trainer, self.batch
        padded = torch.cat([micro, micro[-1:].expand(trainer.sampling.batch_size - len(micro))])
        samples = expand_rows(padded, batch.members)
        weights = batch.weights[samples].clone()
        weights[len(micro) * batch.members :] = 0
        if not weights.any():
            return  # none of these samples has a valid score
        condition = batch.condition(trainer.model, padded.tolist())
        places = padded - part.rows[0]  # a process's rows follow one another
        for at, step in enumerate(part.steps):
            if step.interval.index not in self.trained:
                continue
            advantages = batch.advantages[samples]
            advantages = advantages if advantages.ndim == 1 else advantages[:, at]
            if not trainer.needs_reference() and not (advantages * weights).any():
                continue  # nothing to learn from: no call
            apart = batch.members // step.members  # rows of this call for each of the batch's
            taken = step.rows(expand_rows(places, apart).to(step.latents.device)).to(trainer.model.device)
            told = condition.rows(torch.arange(len(padded)).repeat_interleave(apart)) if apart > 1 else condition
            self._backward(taken, told, advantages, weights, total, watch, samples)

    def _backward(
        self,
        step: Step,
        condition: Condition,
        advantages: Tensor,
        weights: Tensor,
        total: Tensor,
        watch: Watch,
        samples: Tensor,
    ) -> None:
        """Add the gradient of one step of a micro-batch."""
        trainer, transition = self.trainer, self.batch.path.transitions[step.interval.index]
        reference = self._reference(step, transition, condition)
        new = replay(trainer.model, step, transition, condition, trainer.policy)
        device = new.log_probs.device
        losses = trainer.loss(new, step.log_probs, advantages.to(device), reference, step.interval)
        trainer.optimizer.backward((losses * weights.to(device)).sum() / total.to(device))
        trainer.model.meter.count("backward")
        with torch.no_grad():
            numbers = trainer.watch(new, step.log_probs, reference, step.interval)
            watch.add(numbers, losses, weights, samples, step.interval.index)

    @torch.no_grad()
    def _reference(self, step: Step, transition: Transition, condition: Condition) -> Replay | None:
        if not self.trainer.needs_reference():
            return None
        with self.trainer.model.reference():
            return replay(self.trainer.model, step, transition, condition, self.trainer.policy)

"""An epoch's update: the optimizer steps that a trainer's loss makes of a batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from flowalign.distributed import rank, together, world_size
from flowalign.randomness import key_generator
from flowalign.records import Condition, Step, expand_rows
from flowalign.rollout import Replay, replay
from flowalign.transitions import Transition
from trainers.batch import Batch, Part
from trainers.watch import Watch, save_bad

if TYPE_CHECKING:
    from trainers.base import Trainer
    from trainers.keeper import Keeper


class Update:
    """One pass over a batch in `updates_per_epoch` optimizer steps, those before the record's `part` left out.

    Each step's loss is divided once, by its weighted number of samples times trained steps over all processes.
    """

    def __init__(self, trainer: Trainer, batch: Batch, keeper: Keeper | None) -> None:
        self.trainer, self.batch, self.keeper = trainer, batch, keeper
        self.trained = trainer.trained_steps(batch.path)

    def run(self, order: Int[Tensor, " p"] | None = None) -> dict[str, float]:
        """All steps; returns the means of what was seen.

        Args:
            order: the order in which rows are taken, cut into as many equal parts; by default drawn from the seed and
                the epoch, so that each optimizer step has an equal share of each group and of each process's rows.
        """
        trainer, state = self.trainer, self.trainer.state
        steps = trainer.updates_per_epoch
        parts = self._parts(steps) if order is None else [*order.tensor_split(steps)]
        for rows in parts[state.part :]:
            watch = Watch(trainer.watched(), trainer.ratio_limit(), trainer.model.device)
            with trainer.model.meter.phase("update"):
                self._accumulate(rows, watch)
                norm = trainer.optimizer.step(watch.sums())
            state.seen.append(watch.means() | {"grad_norm": norm, "counts": watch.counts()})
            state.spend(trainer.model.meter)
            self._count_skipped(norm, watch)
            state.part += 1
            if self.keeper is not None and state.part < steps:
                self.keeper.poll()
        return self._means()

    def _parts(self, steps: int) -> list[Tensor]:
        """The rows of each optimizer step: of so many neighbours one for each, drawn from the seed and the epoch."""
        rows = len(self.batch.texts)
        generator = key_generator(self.trainer.seed, "update_order", self.trainer.state.epoch)
        turns = torch.from_numpy(generator.permuted([[*range(steps)]] * -(-rows // steps), axis=1).flatten())
        return [(turns[:rows] == step).nonzero().flatten() for step in range(steps)]

    def _means(self) -> dict[str, float]:
        """Over the epoch's optimizer steps that were made."""
        seen = self.trainer.state.seen
        made = [row for row in seen if math.isfinite(row["grad_norm"])]
        names = [name for name in (made[0] if made else ()) if name != "counts"]
        means = {name: sum(row[name] for row in made) / len(made) for name in names}
        return means | {"skipped": float(len(seen) - len(made)), "lr": self.trainer.optimizer.learning_rate}

    def _count_skipped(self, norm: float, watch: Watch) -> None:
        """The decision is the same on every process: it is made of numbers that have been summed over them."""
        state, optimizer = self.trainer.state, self.trainer.optimizer
        if math.isfinite(norm):
            state.skipped = 0
            return
        if not watch.any_bad() and optimizer.scaling_down():
            return
        state.skipped += 1
        folder = self.trainer.folder / "non_finite"
        name = f"epoch-{state.epoch:06d}-step-{state.part}-process-{rank()}"
        together(lambda: save_bad(folder, name, watch, self.batch))
        if state.skipped > optimizer.settings.max_skipped:
            raise ValueError(
                f"{state.skipped} optimizer steps in a row had a loss or gradient that is not finite, last in epoch "
                f"{state.epoch}; their samples are in {folder}: look at the reward, lower the learning rate, or train "
                "in higher precision"
            )

    def _accumulate(self, rows: Int[Tensor, " p"], watch: Watch) -> None:
        trainer, batch = self.trainer, self.batch
        total = batch.weights[expand_rows(rows, batch.members)].sum() * len(self.trained)
        if total == 0:
            return
        mine = self._micro_batches(rows)
        turns = self._turns(rows, len(mine))
        for turn in range(turns):
            if self.keeper is not None and self.keeper.asked("update", turn, turns):
                trainer.optimizer.discard()  # the step is made anew when the run goes on
                trainer.model.meter.take()
                self.keeper.stop()
            if turn < len(mine):
                part, micro = mine[turn]
                with trainer.model.sized(part.size):
                    self._micro_batch(part, micro, total, watch)

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
            advantages = batch.advantages[samples]
            advantages = advantages if advantages.ndim == 1 else advantages[:, at]
            if step.interval.index not in self.trained:
                continue
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

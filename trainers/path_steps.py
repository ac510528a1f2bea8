"""The optimizer steps of trainers by a reward's gradient: draw samples, decode and score them, and go back through all.

Each step draws its own samples with the policy of that step, shares them out over processes, and divides the gradient
by their number; so its result depends neither on processes nor on how they are cut into calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.differentiate import Drawn, Visit, reference_velocity
from flowalign.distributed import data_rank, data_size, share
from flowalign.media import shown
from flowalign.randomness import keyed_globals
from flowalign.records import Condition, Maps, Prompts, Scores
from rewards.joined import join_scores
from trainers.batch import detached, parts_of
from trainers.collection import Epoch
from trainers.gathering import gather_scores
from trainers.steps import OptimizerSteps
from trainers.watch import Watch, write_bad

if TYPE_CHECKING:
    from trainers.keeper import Keeper
    from trainers.reward_gradient import RewardGradientTrainer

KEPT = 16  # latents of samples that went wrong


@dataclass(frozen=True)
class Scored:
    """What a loss is made of: the reward of each picture, 0 where it has none, and the steps with gradient.

    references: the reference's velocity at each of those steps; none where the loss does not read it.
    maps: what the reward has seen at each pixel, where it tells.
    """

    rewards: Float[Tensor, " b"]
    visits: tuple[Visit, ...]
    references: tuple[Tensor, ...] = ()
    maps: Maps | None = None


class PathSteps(OptimizerSteps):
    """An epoch's optimizer steps, each on samples of its own that the policy of that step draws."""

    trainer: RewardGradientTrainer

    def __init__(self, trainer: RewardGradientTrainer, epoch: Epoch, keeper: Keeper | None) -> None:
        super().__init__(trainer, keeper)
        self.epoch, self._latents = epoch, dict[int, Tensor]()

    def run(self) -> dict[str, float]:
        """All steps; returns the means of what was seen."""
        trainer = self.trainer
        return self._run(parts_of(len(self.epoch.rows), trainer.updates_per_epoch, trainer.seed, self.epoch.number))

    def micro_batches(self, rows: Int[Tensor, " p"], batch_size: int | None = None) -> list[Tensor]:
        """The rows of one optimizer step, in calls of one size each, over all processes."""
        alike = [rows[(rows >= one.rows.start) & (rows < one.rows.stop)] for one in self.epoch.buckets]
        size = batch_size or self.trainer.sampling.batch_size
        return [micro for held in alike if len(held) for micro in held.split(size)]

    def _watch(self) -> Watch:
        return Watch(self.trainer.watched(), 1.0, self.trainer.model.device)

    def _accumulate(self, rows: Int[Tensor, " p"], watch: Watch) -> dict[str, Any]:
        batches = self.micro_batches(rows)
        mine = share(len(batches), data_rank(), data_size())
        turns, scores = -(-len(batches) // data_size()), list[Scores]()
        self._latents.clear()
        for turn in range(turns):
            self._stop_if_asked(turn, turns)
            if turn < len(mine):
                scores.append(self.micro_batch(batches[mine[turn]], mine[turn], len(rows), watch))
        before = sum(len(one) for one in batches[: mine.start])
        held = range(before, before + sum(len(one) for one in batches[mine.start : mine.stop]))
        made = gather_scores(scores, held, len(rows))
        self._leave_out_invalid(made)
        return {"scores": made}

    def _leave_out_invalid(self, scores: Scores) -> None:
        """The gradient is a mean over all samples so far: make it one over those with a valid score."""
        optimizer, known = self.trainer.optimizer, int(scores.valid.sum())
        try:
            self.trainer.usable(scores, self.epoch.number)
        except ValueError:
            optimizer.discard()
            raise
        if known < len(scores):
            for value in optimizer.parameters.values():
                if value.grad is not None:
                    value.grad.mul_(len(scores) / known)

    def micro_batch(self, rows: Int[Tensor, " m"], number: int, total: int, watch: Watch) -> Scores:
        """Add the gradient of a micro-batch, padded to the shape of all others; returns its samples' scores.

        Args:
            number: of the micro-batch in its optimizer step. total: samples of that step over all processes.
        """
        trainer, size = self.trainer, self.epoch.size_of(int(rows[0]))
        padded = torch.cat([rows, rows[-1:].expand(trainer.sampling.batch_size - len(rows))])
        with trainer.model.sized(size), torch.enable_grad():
            with trainer.model.meter.phase("rollout"):
                draw = trainer.collection.draw(self.epoch, padded.tolist())
                drawn = trainer.rollout(self.epoch, draw, trainer.collection.grids[size])
                references = self._references(drawn, draw.condition)
                beside = trainer.beside(self.epoch, draw)
            scores = self._score(drawn, draw.told, number)
            known = valid_samples(scores, trainer.views)
            known[len(rows) :] = False
            scored = self._scored(drawn, references, scores, known)
            self._backward(scored, beside, known, padded, total, watch)
        self._latents |= dict(zip(rows.tolist(), drawn.latents.detach()[:: trainer.views], strict=False))
        return samples_of(detached(scores), trainer.views, len(rows))

    def _references(self, drawn: Drawn, condition: Condition) -> tuple[Tensor, ...]:
        trainer = self.trainer
        if not trainer.needs_reference():
            return ()
        told = repeated(condition, trainer.views)
        return tuple(
            reference_velocity(trainer.model, visit, told, trainer.policy, trainer.recompute) for visit in drawn.visits
        )

    def _score(self, drawn: Drawn, told: Prompts, number: int) -> Scores:
        trainer, model = self.trainer, self.trainer.model
        with model.meter.phase("decode"):
            pixels = model.decode(drawn.latents)
            model.meter.count("decode")
        told = told.rows([row for row in range(len(told)) for _ in range(trainer.views)])
        key = (self.epoch.number, trainer.state.part, number)
        with model.meter.phase("reward"), keyed_globals(trainer.seed, "reward", *key):
            return trainer.reward(shown(pixels, told, model.fps), told, grad=True)

    def _scored(self, drawn: Drawn, references: tuple[Tensor, ...], scores: Scores, known: Tensor) -> Scored:
        counted = known.repeat_interleave(self.trainer.views).to(scores.total.device)
        rewards = scores.total.where(counted, 0.0)
        if not rewards.requires_grad:
            raise ValueError(
                f"{self.trainer.reward.name} says that it is differentiable, but its scores carry no gradient to the "
                "pixels"
            )
        return Scored(rewards, drawn.visits, references, scores.maps)

    def _backward(
        self, scored: Scored, beside: Tensor | None, known: Tensor, samples: Tensor, total: int, watch: Watch
    ) -> None:
        trainer, views = self.trainer, self.trainer.views
        weights = known.float().repeat_interleave(views)
        losses = trainer.loss(scored)
        if beside is not None:
            losses = losses + beside.repeat_interleave(views).to(losses.device)
        trainer.optimizer.backward((losses * weights.to(losses.device)).sum() / (total * views))
        trainer.model.meter.count("backward")
        with torch.no_grad():
            places = samples.repeat_interleave(views)
            watch.add(trainer.watch(scored, losses), losses, weights, places, self.epoch.path.gradient_from)

    def _save_bad(self, folder: Path, name: str, watch: Watch) -> None:
        """The samples' prompts and rewards, and what of them was decoded."""
        told = self.trainer.collection.told_rows(self.epoch, range(len(self.epoch.rows))).text
        held = {str(row): self._latents[row].cpu() for row in sorted(watch.worst())[:KEPT]}
        write_bad(folder, name, watch, lambda sample: {"prompt": told[sample]}, held)


def valid_samples(scores: Scores, views: int) -> Tensor:
    """Which samples have a valid score of each of their pictures."""
    return scores.valid.view(-1, views).all(1).cpu()


def samples_of(scores: Scores, views: int, count: int) -> Scores:
    """The scores of the first so many samples, each the mean of its pictures'."""
    parts = {name: value.view(-1, views).mean(1)[:count] for name, value in scores.parts.items()}
    return Scores(scores.total.view(-1, views).mean(1)[:count], parts, valid_samples(scores, views)[:count])


def scores_of(seen: Sequence[dict[str, Any]]) -> Scores:
    """Those of an epoch's samples, from the record of its optimizer steps."""
    kept = [row["scores"] for row in seen]
    return join_scores([one if isinstance(one, Scores) else Scores(**one) for one in kept])


def in_turn(first: Tensor, second: Tensor) -> Tensor:
    """The rows of both, the first of one next to the first of the other."""
    return torch.stack([first, second], 1).flatten(0, 1)


def repeated(condition: Condition, times: int) -> Condition:
    """Each row so many times, next to one another."""
    return condition.rows(torch.arange(len(condition)).repeat_interleave(times)) if times > 1 else condition

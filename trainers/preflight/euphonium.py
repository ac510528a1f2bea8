"""How Euphonium is tried: as all policy gradients are, with the gradient that its rollouts take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from flowalign.guidance import Backpropagation
from flowalign.records import Scores
from trainers.preflight.family import Lines
from trainers.preflight.geometry import PlannedStep, looked_at
from trainers.preflight.policy import PolicyFamily
from trainers.preflight.seeing import seeing

if TYPE_CHECKING:
    from trainers.euphonium import Euphonium
    from trainers.preflight.memory import Passing, Switches


class EuphoniumFamily(PolicyFamily):
    """Some steps of a rollout have a gradient in their latents."""

    trainer: Euphonium

    def plan_lines(self, steps: tuple[PlannedStep, ...]) -> Lines:
        trainer, guided = self.trainer, self.trainer.guided
        if not trainer.guides():
            return [*super().plan_lines(steps), ("guidance", "none: no step is guided")]
        lengths = [guided.length(step.interval) for step in steps if step.interval.index in guided.steps]
        spread = " to ".join(dict.fromkeys(f"{length:.3g}" for length in (min(lengths), max(lengths))))
        moved = f"{spread} times the gradient of {trainer.process_reward.name}"
        how = f"steps {sorted(guided.steps)}, by {moved} ({guided.slope})"
        return [
            *super().plan_lines(steps),
            ("guidance", how if guided.scale else "scale 0: rewards are looked at only"),
        ]

    def learning_bytes(self, choice: Switches, passing: Passing) -> int:
        """Of the update, or of a guided step where that takes more: a call with gradient, decoder and reward."""
        trainer, slope = self.trainer, self.trainer.guided.slope
        update = super().learning_bytes(choice, passing)
        if not trainer.guides() or not trainer.guided.scale or not isinstance(slope, Backpropagation):
            return update
        widths = [
            path.width(step, epoch.members)
            for epoch in looked_at(trainer)
            for path, _ in epoch.paths
            for step in trainer.guided.steps
        ]
        rows = choice.batch_size * max(widths)
        seen = self._seeing(passing, rows)
        if not slope.network:
            return max(update, seen)
        call = passing.activations(rows, choice.gradient_checkpointing, choice.precision)
        return max(update, call.saved + max(call.peak - call.saved, seen))

    def _seeing(self, passing: Passing, rows: int) -> int:
        trainer = self.trainer
        if trainer.process_reward is trainer.reward:
            return passing.seeing(rows, _total)
        prompts = trainer.collection.told_rows(trainer.collection.epoch(0), [0])
        found = seeing(passing.model, trainer.process_reward, prompts, rows, _total)
        passing.with_reward = passing.with_reward and found.with_reward
        return found.peak


def _total(scores: Scores) -> Tensor:
    return scores.total

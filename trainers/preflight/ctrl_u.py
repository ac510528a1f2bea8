"""How Ctrl-U is tried: as trainers by a reward's gradient are, though no step of a grid is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainers.collection import Epoch
from trainers.preflight.family import Lines
from trainers.preflight.geometry import PlannedStep
from trainers.preflight.reward_gradient import RewardGradientFamily

if TYPE_CHECKING:
    from trainers.ctrl_u import CtrlU
    from trainers.preflight.memory import Passing, Switches


class CtrlUFamily(RewardGradientFamily):
    """One call of two rows for each sample, and one of a row beside it."""

    trainer: CtrlU

    def planned_steps(self, epochs: tuple[Epoch, ...]) -> tuple[PlannedStep, ...]:
        return ()

    def plan_lines(self, steps: tuple[PlannedStep, ...]) -> Lines:
        trainer = self.trainer
        count, largest = trainer.rewarded(), float(trainer.table[trainer.rewarded() - 1])
        lines = [("", "no rollout: pictures are made in one step, from real ones with noise")]
        lines.append(("scored", f"at the first {count} of {len(trainer.table)} points, up to sigma {largest:.4f}"))
        lines.append(("reward", f"{trainer.rising():.4g} of its weight in the first step, all from {trainer.ramp} on"))
        return lines

    def learning_bytes(self, choice: Switches, passing: Passing) -> int:
        """Of the larger call where calls are made anew, of both where they are not; or of decoder and reward."""
        trainer = self.trainer
        calls = [choice.batch_size * trainer.views, *([choice.batch_size] if trainer.pretraining else [])]
        made = [passing.activations(rows, choice.gradient_checkpointing, choice.precision) for rows in calls]
        seeing, size = passing.seeing(calls[0], trainer.picture_loss), trainer.collection.order[0]
        pictures = 2 * 3 * (size.height or 0) * (size.width or 0)  # the control picture, and as the network takes it
        gradients = sum(one.nbytes for one in trainer.model.trainable().values())  # of the smaller call, by then
        held = 4 * sum(calls) * (3 * trainer.collection.largest + pictures) + gradients
        if trainer.recompute:
            return max(made[0].peak, seeing) + held
        return sum(one.saved for one in made) + max(made[0].peak - made[0].saved, seeing) + held

"""How G2RPO is tried: as all policy gradients are; what its steps are followed by stands beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowalign.completions import calls_of
from trainers.preflight.family import Lines
from trainers.preflight.geometry import Geometry, PlannedStep
from trainers.preflight.policy import PolicyFamily

if TYPE_CHECKING:
    from trainers.g2rpo import G2RPO


class FannedFamily(PolicyFamily):
    """Each step has samples of its own, that start from one row."""

    trainer: G2RPO

    def __init__(self, trainer: G2RPO) -> None:
        super().__init__(trainer)

    def kept_bytes(self, cut: Geometry) -> int:
        """Of every step the latents that a group starts from, and its members' with their log-probs, float32."""
        rows, numbers = min(max(cut.shares) * cut.batch_size, cut.rows), self.trainer.collection.largest
        steps = len(self.trainer.collection.path(0).stochastic)
        return rows * steps * ((1 + cut.members) * numbers + cut.members) * 4

    def plan_lines(self, steps: tuple[PlannedStep, ...]) -> Lines:
        collection, size = self.trainer.collection, self.trainer.sampling.group_size
        trained = collection.path(0).stochastic
        made = sum(len(calls_of(collection.routes(step))) for step in trained)
        strides = " and ".join(map(str, self.trainer.granularities))
        told = f"{size} members part from one ODE path at each of {len(trained)} steps, and go on by every {strides}"
        return [
            *super().plan_lines(steps),
            ("fans", f"{told} points of the grid"),
            ("", f"{trained[-1] + 1} + {size} x {made} rows of the network for a group, {len(trained)} in the update"),
        ]

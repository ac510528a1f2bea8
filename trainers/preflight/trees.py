"""How trainers on trees are tried: as all policy gradients are; what their tree is stands beside its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowalign.trees import nodes_of
from trainers.preflight.family import Lines
from trainers.preflight.geometry import PlannedStep
from trainers.preflight.policy import PolicyFamily

if TYPE_CHECKING:
    from trainers.tree_grpo import TreeGRPO


class TreeFamily(PolicyFamily):
    """Nodes, not samples, are rolled out and replayed."""

    trainer: TreeGRPO

    def plan_lines(self, steps: tuple[PlannedStep, ...]) -> Lines:
        epoch, size = self.trainer.collection.epoch(0), self.trainer.sampling.group_size
        path = epoch.path
        parted = [(step, path.children(step, epoch.members)) for step in path.stochastic]
        told = ", ".join(f"step {step} into {children}" for step, children in parted if children > 1)
        nodes, flat = nodes_of(path, size)
        roots = size // epoch.members
        trees = f"{roots} trees of {epoch.members} leaves" if roots > 1 else f"a tree of {size} leaves"
        lines = [("tree", f"{trees} for each prompt; rows part at {told}")]
        lines.append(("nodes", f"{nodes} rows of the network for a group, where samples apart take {flat}"))
        pruned = [*path.skipped]
        lines += [("pruned", f"steps {pruned} are left out of the first epoch's update")] if pruned else []
        return [*super().plan_lines(steps), *lines]

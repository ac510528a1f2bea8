"""Trees of samples: plans that part rows at several steps, and what each edge of a tree is worth.

A node is latents at a point of the grid, an edge one stochastic step to it, a leaf a sample. What leaves share is made
once: a rollout has as many network rows as nodes, and so has its replay. A node's value is the mean reward of the
leaves below it, so that an edge is compared with its like by what it has led to on average.

Dynamic-TreeRPO (arXiv:2509.23352) and BranchGRPO (arXiv:2509.06040; github.com/Fredreic1849/BranchGRPO). We have not
seen the first one's formulas: the bounds of its ratio that move with the reward are not here, and its supervised loss
along the best path is that of `trainers.supervised`, of where the path ends. Of the second, noise at branchings is not
scaled beyond the density that is then read (the code does so, by 4), and a node's value is not weighted by the
densities of its children: they are drawn from these already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowalign.schedules import Path, Plan, Window
from flowalign.transitions import CPS, ODE, DanceSDE, FlowSDE, Transition

LEVELLED = (FlowSDE, DanceSDE, CPS)  # rules with a noise_level


@dataclass(frozen=True)
class DepthPruning:
    """Stochastic steps that the update leaves out: `length` of them from `first` on; BranchGRPO's depth pruning.

    every: epochs after which they move one step towards the noise, until `first` has come to `stop`; 0 for never.
    """

    first: int
    length: int
    every: int = 0
    stop: int = 0

    def __post_init__(self) -> None:
        if self.length < 1 or self.every < 0 or not 0 <= self.stop <= self.first:
            raise ValueError(
                f"DepthPruning needs a length of at least 1, every of at least 0 and stop among 0 ... first; got {self}"
            )

    def steps(self, epoch: int) -> range:
        """Those of an epoch."""
        moved = min(epoch // self.every, self.first - self.stop) if self.every else 0
        return range(self.first - moved, self.first - moved + self.length)


@dataclass(frozen=True)
class Tree:
    """At each of `steps` every row parts into as many as `children` says; BranchGRPO (arXiv:2509.06040).

    A group is `roots` trees, each from a start noise of its own; roots times the product of `children` is its size.
    Steps before the first branching are the ODE's: their noise would be all samples' and could not be told apart.

    between: whether steps after the first branching that part nothing are stochastic too, or the ODE's.
    last_step: as of `flowalign.schedules.AllSteps`.
    pruning: steps that are left out of the update; None for none.
    """

    transition: Transition
    steps: tuple[int, ...]
    children: tuple[int, ...]
    between: bool = True
    last_step: bool = True
    roots: int = 1
    pruning: DepthPruning | None = None

    def __post_init__(self) -> None:
        _check_tree("Tree", self.children, self.roots)
        if len(self.steps) != len(self.children) or any(a >= b for a, b in pairwise(self.steps)):
            raise ValueError(
                f"Tree.steps must rise, and Tree.children name a number for each of them; got {list(self.steps)} and "
                f"{list(self.children)}"
            )

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        end = steps if self.last_step else steps - 1
        if not 0 <= self.steps[0] <= self.steps[-1] < end:
            raise ValueError(
                f"Tree.steps {list(self.steps)} must be stochastic steps of a rollout of {steps}: 0 to {end - 1}"
            )
        chosen = range(self.steps[0], end) if self.between else self.steps
        rules = tuple(self.transition if step in chosen else ODE() for step in range(steps))
        pruned = set() if self.pruning is None else {*self.pruning.steps(epoch)} & {*chosen}
        if len(pruned) == len(chosen):
            raise ValueError(f"Tree.pruning leaves no step to train on in epoch {epoch}")
        branchings = tuple(zip(self.steps, self.children, strict=True))
        return Path(rules, branchings=branchings, roots=self.roots, skipped=tuple(sorted(pruned)))


@dataclass(frozen=True)
class TreeWindow:
    """Every stochastic step of a plan, its window, parts each row into `children`; Dynamic-TreeRPO (arXiv:2509.23352).

    The paper has a window of four steps that slides as MixGRPO's (`flowalign.windows.SlidingWindow`) and two children,
    the ODE elsewhere, and noise that grows linearly with the depth of the tree:

        noise_level of the window's k-th step = noise_level + slope k,    k = 0, 1, ...

    (linear is what the paper says; its own constants we have not seen).

    window: its stochastic steps, and their rule; samples share their start whether it says so or not.
    slope: per depth; other than 0 it needs a rule with a noise_level. roots: as of `Tree`.
    """

    window: Plan = Window(FlowSDE(0.7), 0, 4)
    children: int = 2
    slope: float = 0.0
    roots: int = 1

    def __post_init__(self) -> None:
        _check_tree("TreeWindow", (self.children,), self.roots)

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        path = self.window.resolve(steps, epoch, seed)
        if path.branchings or not path.stochastic:
            raise ValueError("TreeWindow.window must be a plan with stochastic steps that is no tree itself")
        rules = [*path.transitions]
        for depth, step in enumerate(path.stochastic):
            rules[step] = self._at(rules[step], depth)
        branchings = tuple((step, self.children) for step in path.stochastic)
        return replace(path, transitions=tuple(rules), branch=None, branchings=branchings, roots=self.roots)

    def _at(self, rule: Transition, depth: int) -> Transition:
        if self.slope == 0:
            return rule
        if not isinstance(rule, LEVELLED):
            raise ValueError(f"TreeWindow.slope adds to a rule's noise_level, and {rule} has none: FlowSDE has one")
        return replace(rule, noise_level=rule.noise_level + self.slope * depth)


def _check_tree(name: str, children: Sequence[int], roots: int) -> None:
    if not children or min(children) < 2 or roots < 1:
        raise ValueError(f"{name} needs at least 2 children at a branching and 1 root, got {[*children]} and {roots}")


@dataclass(frozen=True)
class Generation:
    """The nodes that one stochastic step leads to; those of a group stand next to one another, as do all siblings.

    leaves: below each node. siblings: nodes that have come of one at the latest branching, all of the group where none
    was. cousins: of a group. parts: whether the step is a branching.
    """

    leaves: int
    siblings: int
    cousins: int
    parts: bool


def generations(path: Path, group_size: int) -> tuple[Generation, ...]:
    """Of each stochastic step in order. Raises: ValueError for a tree that has another number of leaves."""
    members = path.members(group_size)
    found = []
    for step in path.stochastic:
        after = path.width(step + 1, members)
        parted = [at for at in range(step + 1) if path.children(at, members) > 1]
        cousins = after * (group_size // members)
        siblings = after // path.width(parted[-1], members) if parted else cousins
        found.append(Generation(members // after, siblings, cousins, step in parted))
    return tuple(found)


Rewards = Float[Tensor, " b"]
Known = Bool[Tensor, " b"]
Compare = Callable[[Generation], int]
Advantages = Callable[[Tensor, Tensor], Tensor]
Weighting = Callable[[Tensor, Sequence[Generation]], Tensor]


def siblings(generation: Generation) -> int:
    """An edge is compared with those that part from the same node: TreeRPO's and Dynamic-TreeRPO's credit.

    Between branchings a chain of edges is compared with the chains that part where it does. All that was shared until
    then is the same for both, so that none of its luck is credited. A z-score of two siblings is +1 and -1 whatever
    the two values; a std over the whole batch (`flow_grpo_advantages`) keeps what lies between them.
    """
    return generation.siblings


def depths(generation: Generation) -> int:
    """An edge is compared with all of its group at the same depth: BranchGRPO's credit (arXiv:2509.06040).

    An edge is thus credited for where its branch stood before it too.
    """
    return generation.cousins


def node_values(rewards: Rewards, valid: Known, leaves: int) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """The mean reward of the valid leaves below each node, in double precision, and which nodes have such leaves.

    Args:
        rewards: of all leaves, those of a node next to one another. valid: which of them count.
        leaves: below each node.
    """
    known = valid.view(-1, leaves)
    sums = rewards.double().view(-1, leaves).where(known, 0.0).sum(1)
    return sums / known.sum(1).clamp(min=1), known.any(1)


def edge_advantages(
    rewards: Rewards, valid: Known, tree: Sequence[Generation], compare: Compare, advantages: Advantages
) -> Float[Tensor, "b t"]:
    """The advantage of the edge that each leaf has come by, at each stochastic step; 0 where no leaf below it is valid.

    Args:
        rewards, valid: as of `node_values`, of all groups. tree: as of `generations`.
        compare: `siblings` or `depths`: how many neighbours are compared with one another.
        advantages: function of values [n] and the number [n] of what each is compared among, as those of
            `flowalign.advantages`; called once for each step, with every node counted once.
    """
    columns = []
    for generation in tree:
        values, known = node_values(rewards, valid, generation.leaves)
        among = torch.arange(len(values)) // compare(generation)
        column = torch.zeros(len(values))
        column[known] = advantages(values[known], among[known]).float()
        columns.append(column.repeat_interleave(generation.leaves))
    return torch.stack(columns, 1)


@dataclass(frozen=True)
class Extremes:
    """Of a group's leaves the best and the worst, which alone teach after the last branching; BranchGRPO's mode 2.

    Until then all edges count. The code's mode 1 keeps one half of the steps of every leaf's own last chain: as they
    all have one reward there, that is left out. Pruning by width changes what is learned from, not what it costs: the
    calls of an update keep the shape of the rollout's, or rounding alone would move the ratios.

    share: of the leaves that are kept, at least two.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"Extremes.share must lie in (0, 1], got {self.share}")

    def __call__(self, rewards: Rewards, group_ids: Int[Tensor, " b"]) -> Known:
        """Which leaves are kept, of valid ones."""
        kept = torch.zeros(len(rewards), dtype=torch.bool)
        for group in group_ids.unique():
            members = (group_ids == group).nonzero().flatten()
            ranked = members[rewards[members].argsort(descending=True, stable=True)]
            count = min(max(2, int(len(ranked) * self.share)), len(ranked))
            kept[ranked[: count // 2]] = True
            kept[ranked[len(ranked) - (count - count // 2) :]] = True
        return kept


def by_leaves(kept: Float[Tensor, "b t"], tree: Sequence[Generation]) -> Float[Tensor, "b t"]:
    """Each step's loss is the mean over its kept edges: an edge counts once for every leaf below it. The exact one.

    A leaf is a sample as any other, so that the mean over leaves of sum_t A_t grad log p_t is the gradient of the
    expected reward; the leaves below an edge have that edge's density in common.

    Args:
        kept: 1 for the edges that count, 0 for those pruned, by leaf and step.
    """
    return kept / kept.mean(0).clamp(min=1 / max(len(kept), 1))


def by_edges(kept: Float[Tensor, "b t"], tree: Sequence[Generation]) -> Float[Tensor, "b t"]:
    """Every kept edge of the tree counts once, as in BranchGRPO's code: late steps, which have more, count for more."""
    each = kept / torch.tensor([float(generation.leaves) for generation in tree])
    trained = kept.any(0)
    return each / each[:, trained].mean() if trained.any() else each


def nodes_of(path: Path, group_size: int) -> tuple[int, int]:
    """Network rows of a group's rollout, and what they would be if its samples shared nothing."""
    members = path.members(group_size)
    rows = sum(path.width(step, members) for step in range(len(path.transitions)))
    return rows * (group_size // members), len(path.transitions) * group_size


def trees_fit(plan: Plan, steps: int, group_size: int, epochs: int, seed: int) -> None:
    """Raises: ValueError where in some epoch the trees of a plan have other leaves than a group has samples."""
    for epoch in range(epochs):
        path = plan.resolve(steps, epoch, seed)
        if not path.branches:
            raise ValueError(
                f"sampling.plan is {type(plan).__name__}, on which samples share nothing: credit by trees compares "
                "what parts from a common node. Choose flowalign.trees.Tree or TreeWindow, or train with "
                "trainers.FlowGRPO"
            )
        path.members(group_size)

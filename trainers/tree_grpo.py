"""Policy gradients on trees of samples: Dynamic-TreeRPO (arXiv:2509.23352) and BranchGRPO (arXiv:2509.06040).

    V(n) = mean of R over the leaves below n;    A_e = (V(child) - mean) / std  over the nodes e is compared with
    loss = mean over leaves of sum over their edges of  max(-A_e rho_e, -A_e clip(rho_e))          (Flow-GRPO's, A_e)

Rows part at several steps (`flowalign.trees.Tree`, `TreeWindow`), and what samples share is rolled out, and replayed,
once. An edge is compared with its siblings (Dynamic-TreeRPO), or with all of its group's at its depth (BranchGRPO).
`supervised` draws the policy to a group's best leaf too, as Dynamic-TreeRPO's LayerTuning-RL does along its path.
Where the only branching is at the first stochastic step, both are Flow-GRPO with a shared start, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.advantages import group_advantages
from flowalign.credit import TermCredit
from flowalign.models.base import Model
from flowalign.prompts import PromptData
from flowalign.records import Scores
from flowalign.rollout import LogProb
from flowalign.schedules import Path
from flowalign.tracking import TrackerName
from flowalign.transitions import FlowSDE, Reduce, exact_kl, gaussian_log_prob, mean_of_elements
from flowalign.trees import (
    Compare,
    Extremes,
    Tree,
    Weighting,
    by_leaves,
    edge_advantages,
    generations,
    siblings,
    trees_fit,
)
from rewards.base import Reward
from trainers.batch import OnInvalid, Sampling
from trainers.evaluation import Evaluation
from trainers.flow_grpo import KL, Advantages, FlowGRPO
from trainers.keeper import Checkpoints
from trainers.optim import Optimizer
from trainers.ratio_guard import RatioCheck
from trainers.supervised import Supervised

if TYPE_CHECKING:
    from trainers.preflight.family import Family

BINARY = Tree(FlowSDE(0.7), (0, 1, 2, 3), (2, 2, 2, 2))


class TreeGRPO(FlowGRPO):
    """GRPO on trees, with a LoRA policy.

    Args:
        model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch, clip_range,
            kl_coef, kl, step_fraction, log_prob, reduce, unconditional_grad, folder, seed, on_invalid, log_with,
            supervised, ratio_check: as of `trainers.FlowGRPO`. sampling.batch_size counts trees: a call late in a tree
            has as many rows for each as the tree has leaves.
        compare: which edges are compared with one another: `flowalign.trees.siblings` or `depths`.
        advantages: function of the values [n] of one step's nodes and the number [n] of what each is compared among.
            BranchGRPO's code has `flowalign.advantages.dancegrpo_advantages`.
        weighting: what an edge counts that several leaves share: `flowalign.trees.by_leaves`, the exact gradient, or
            `by_edges`, BranchGRPO's code.
        width_pruning: leaves that alone teach after the last branching (`flowalign.trees.Extremes`), None for all.
    """

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        sampling: Sampling = Sampling(BINARY, group_size=16, batch_size=1),
        optimizer: Optimizer = Optimizer(),
        evaluation: Evaluation = Evaluation(),
        checkpoints: Checkpoints = Checkpoints(),
        epochs: int = 100,
        updates_per_epoch: int = 2,
        clip_range: float = 1e-4,
        kl_coef: float = 0.0,
        kl: KL = exact_kl,
        compare: Compare = siblings,
        advantages: Advantages = group_advantages,
        weighting: Weighting = by_leaves,
        width_pruning: Extremes | None = None,
        step_fraction: float = 1.0,
        log_prob: LogProb = gaussian_log_prob,
        reduce: Reduce = mean_of_elements,
        unconditional_grad: bool = False,
        folder: str = "runs/tree_grpo",
        seed: int = 0,
        on_invalid: OnInvalid = "stop",
        log_with: tuple[TrackerName, ...] = (),
        supervised: Supervised | None = None,
        ratio_check: RatioCheck = "recompute",
    ) -> None:
        if isinstance(advantages, TermCredit):
            raise ValueError(
                f"advantages: {type(advantages).__name__} reads the terms of a reward, and credit by trees the values "
                "of nodes, one number each: take a function of flowalign.advantages"
            )
        self.compare, self.weighting, self.width_pruning = compare, weighting, width_pruning
        trees_fit(sampling.plan, sampling.steps, sampling.group_size, epochs, seed)
        super().__init__(
            model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch,
            clip_range, kl_coef, kl, advantages, step_fraction, log_prob, reduce, unconditional_grad, folder, seed,
            on_invalid, log_with, supervised=supervised, ratio_check=ratio_check,
        )  # fmt: skip

    def credited(self, scores: Scores, group_ids: Int[Tensor, " b"], path: Path) -> Float[Tensor, "b t"]:
        """A_e of the edge that each leaf has come by at each stochastic step, times what the edge counts."""
        tree = generations(path, self.sampling.group_size)
        found = edge_advantages(scores.total, scores.valid, tree, self.compare, self.advantages)
        kept = self._kept(scores, group_ids, path)
        weights = torch.zeros_like(found)
        weights[scores.valid] = self.weighting(kept[scores.valid], tree)
        return found * weights

    def _kept(self, scores: Scores, group_ids: Int[Tensor, " b"], path: Path) -> Float[Tensor, "b t"]:
        """1 for the edges that teach."""
        tree, trained = generations(path, self.sampling.group_size), self.trained_steps(path)
        kept = torch.tensor([float(step in trained) for step in path.stochastic]).repeat(len(scores), 1)
        if self.width_pruning is not None:
            chosen = torch.zeros(len(scores), dtype=torch.bool)
            chosen[scores.valid] = self.width_pruning(scores.total[scores.valid], group_ids[scores.valid])
            after = torch.tensor([one.leaves == 1 and not one.parts for one in tree])
            kept[~chosen[:, None] & after] = 0
        return kept

    def trained_steps(self, path: Path) -> tuple[int, ...]:
        """Those of `FlowGRPO` that are not pruned."""
        return tuple(step for step in super().trained_steps(path) if step not in path.skipped)

    def preflight(self) -> Family:
        from trainers.preflight.trees import TreeFamily

        return TreeFamily(self)

    def check_sampling(self, sampling: Sampling) -> None:
        super().check_sampling(sampling)
        path = sampling.plan.resolve(sampling.steps, 0, 0)
        after = [one for one in generations(path, sampling.group_size) if one.leaves == 1 and not one.parts]
        if self.width_pruning is not None and not after:
            raise ValueError(
                "width_pruning acts on stochastic steps after the last branching, and the plan has none: leave it out"
            )

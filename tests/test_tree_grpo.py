"""Trees: shared prefixes made once, values and credit by hand, the gradient edge by edge, credit against its noise."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.advantages import dancegrpo_advantages, group_advantages
from flowalign.credit import GDPO
from flowalign.models.gaussian import GaussianModel
from flowalign.objectives import clipped_policy_loss
from flowalign.records import Media, Prompts
from flowalign.rollout import replay, rollout
from flowalign.schedules import AllSteps, FanOut, Path, Window
from flowalign.transitions import DanceSDE, FlowSDE, TableSDE, sum_of_elements
from flowalign.trees import (
    DepthPruning,
    Extremes,
    Generation,
    Tree,
    TreeWindow,
    by_edges,
    by_leaves,
    depths,
    edge_advantages,
    generations,
    node_values,
    nodes_of,
    siblings,
)
from flowalign.windows import RollingWindow, SlidingWindow
from tests.jobs import job, rows, tree_job
from trainers import Evaluation, FlowGRPO, Sampling
from trainers.preflight import inspect, page
from trainers.preflight.geometry import floor_rows, geometry, spent_rows
from trainers.tree_grpo import TreeGRPO
from trainers.update import Update
from trainers.watch import Watch

SDE = FlowSDE(0.7)
STEPS = 10
BINARY = Tree(SDE, (1, 3, 4), (2, 3, 2))
VALUES = torch.tensor([1.0, 3.0, 2.0, 6.0])  # leaves of a binary tree of two levels


def level(media: Media, prompts: Prompts) -> Tensor:
    return media.pixels[:, 0, 0, 0]


def trainer(folder: FilePath, plan: Any = BINARY, size: int = 12, kind: Any = TreeGRPO, **changes: Any) -> Any:
    """On the closed form, where the reward is the sample itself."""
    settings: dict[str, Any] = {
        "sampling": Sampling(plan, 4, size, 2, 64, STEPS, 1.0), "kl_coef": 0.0, "updates_per_epoch": 1, "epochs": 1,
        "folder": str(folder),
    }  # fmt: skip
    return kind(GaussianModel(), level, ["x", "y"], **settings | changes)


def test_a_tree_has_a_row_for_every_node(tmp_path):
    """Steps 0 and 1 have one row for each prompt, then 2, 2, 6 and 12."""
    run = trainer(tmp_path / "run")
    batch = run.collect(0)
    nodes = 1 + 1 + 2 + 2 + 6 + 12 * 5
    assert nodes_of(batch.path, 12) == (nodes, 120)
    assert run.state.rows.forward == 4 * nodes
    assert [len(step.latents) for step in batch.steps] == [4 * n for n in (1, 2, 2, 6, 12, 12, 12, 12, 12)]
    assert run.update(batch)["ratio_max"] == 0
    assert run.state.rows.gradient == 4 * (nodes - 1)  # the ODE step has no density
    assert run.model.bias.detach()[1:10].all(), "each stochastic step has learned"
    assert run.model.bias.detach()[0] == 0


def test_siblings_share_their_past_to_the_last_bit():
    model, path = GaussianModel(dims=3), BINARY.resolve(STEPS, 0, 0)
    noise = {step: torch.randn(2 * path.width(step + 1, 12), 3) for step in path.stochastic}
    start = torch.randn(2, 3)
    grid = model.sigmas(STEPS)
    made = rollout(model, model.encode(["", ""]), start, grid, path, step_noise=noise.get, members=12, keep_path=True)
    flat = Path(path.transitions)
    spread = {step: value.repeat_interleave(24 // len(value), 0) for step, value in noise.items()}
    told = model.encode([""] * 24)
    alone = rollout(
        model, told, start.repeat_interleave(12, 0), grid, flat, step_noise=spread.get, keep_path=True
    )  # fmt: skip
    for shared, own in zip(made.path, alone.path, strict=True):
        assert torch.equal(shared.repeat_interleave(24 // len(shared), 0), own)
    assert len(made.latents.unique(dim=0)) == 24


def test_the_noise_of_a_node_does_not_depend_on_what_is_sampled_with_it(tmp_path):
    """The same trees in calls of 1 and of 4, and two roots that have each a start of its own."""
    one, four = (trainer(tmp_path / str(n), sampling=Sampling(BINARY, 4, 12, n, 64, STEPS, 1.0)) for n in (1, 4))
    first, second = one.collect(0), four.collect(0)
    for a, b in zip(first.steps, second.steps, strict=True):
        assert torch.equal(a.latents_next, b.latents_next)
    plan = Tree(SDE, (0,), (3,), roots=4)
    (step, *_) = trainer(tmp_path / "roots", plan).collect(0).steps
    assert len(step.latents.unique()) == 16
    assert step.members == 3


ROOT = [
    (Tree(SDE, (0,), (6,)), AllSteps(SDE, shared_noise=True)),
    (Tree(SDE, (2,), (6,), between=False), FanOut(SDE, (2,))),
    (TreeWindow(Window(SDE, 2, 1), 6), FanOut(SDE, (2,))),
]


@pytest.mark.parametrize("compare", [siblings, depths])
@pytest.mark.parametrize(("tree", "flat"), ROOT, ids=["all", "one", "window"])
def test_branching_at_the_root_alone_is_flat_grpo_bit_for_bit(tree, flat, compare, tmp_path):
    ends = []
    for name, kind, plan in (("tree", TreeGRPO, tree), ("flat", FlowGRPO, flat), ("other", TreeGRPO, flat)):
        own = {"compare": compare} if kind is TreeGRPO else {"advantages": group_advantages}
        run = trainer(tmp_path / name, plan, 6, kind, updates_per_epoch=2, **own)
        for number in range(2):
            run.update(run.collect(number))
        ends.append(torch.cat([run.model.gain.detach(), run.model.bias.detach()]))
    assert ends[0].any()
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_values_and_advantages_by_hand():
    """Leaves 1, 3, 2, 6: the branches are worth 2 and 4."""
    tree = generations(Tree(SDE, (0, 1), (2, 2)).resolve(3, 0, 0), 4)
    assert tree == (Generation(2, 2, 2, True), Generation(1, 2, 4, True), Generation(1, 2, 4, False))
    valid = torch.ones(4, dtype=torch.bool)
    assert node_values(VALUES, valid, 2)[0].tolist() == [2, 4]
    found = edge_advantages(VALUES, valid, tree, siblings, group_advantages)
    assert found.tolist() == [[-1, -1, -1], [-1, 1, 1], [1, -1, -1], [1, 1, 1]]
    found = edge_advantages(VALUES, valid, tree, depths, group_advantages)
    expected = (VALUES - 3) / 3.5**0.5
    torch.testing.assert_close(found[:, 1], expected)
    torch.testing.assert_close(found[:, 2], expected)
    assert found[:, 0].tolist() == [-1, -1, 1, 1]
    of_branch = edge_advantages(VALUES, valid, tree, depths, dancegrpo_advantages)
    torch.testing.assert_close(of_branch[:, 0], torch.tensor([-1.0, -1, 1, 1]) / 2**0.5, atol=1e-6, rtol=0)


def test_a_leaf_without_a_score_is_no_part_of_any_value():
    tree = generations(Tree(SDE, (0, 1), (2, 2), between=False).resolve(2, 0, 0), 4)
    values, known = node_values(VALUES, torch.tensor([True, False, False, False]), 2)
    assert (values[0], known.tolist()) == (1, [True, False])
    valid = torch.tensor([True, True, False, True])
    found = edge_advantages(VALUES.where(valid, torch.nan), valid, tree, siblings, group_advantages)
    assert found.tolist() == [[-1, -1], [-1, 1], [1, 0], [1, 0]]  # the branches are worth 2 and 6


def test_what_an_edge_counts():
    tree = generations(Tree(SDE, (0, 1), (2, 2)).resolve(3, 0, 0), 4)
    kept = torch.ones(4, 3)
    assert torch.equal(by_leaves(kept, tree), kept)
    each = by_edges(kept, tree)  # 2, 4 and 4 edges
    torch.testing.assert_close(each, torch.tensor([[0.5, 1, 1]]).expand(4, 3) * 3 / 2.5)
    kept[:2, 2], kept[:, 0] = 0, 0
    assert by_leaves(kept, tree)[:, 2].tolist() == [0, 0, 2, 2]
    assert by_leaves(kept, tree)[:, 0].tolist() == [0] * 4
    assert by_edges(kept, tree)[:, 1:].sum() == pytest.approx(8)


@pytest.mark.parametrize("weighting", [by_leaves, by_edges])
def test_the_gradient_is_the_sum_over_edges(weighting, tmp_path):
    """Each edge once, by its own replay, times the advantage and the number of leaves (or 1), over all of them."""
    run = trainer(tmp_path / "run", compare=depths, weighting=weighting, reduce=sum_of_elements)
    batch = run.collect(0)
    tree = generations(batch.path, 12)
    found = edge_advantages(batch.scores.total, batch.scores.valid, tree, depths, group_advantages)
    total, edges = torch.zeros(()), 0.0
    for at, (step, one) in enumerate(zip(batch.steps, tree, strict=True)):
        rule, told = batch.path.transitions[step.interval.index], run.model.encode([""] * len(step.latents))
        new = replay(run.model, step, rule, told, run.policy)
        loss = clipped_policy_loss(new.log_probs, step.log_probs, found[:: one.leaves, at], run.clip_range)
        counts = one.leaves if weighting is by_leaves else 1
        total, edges = total + counts * loss.sum(), edges + counts * len(loss)
    expected = torch.autograd.grad(total / edges, [run.model.gain, run.model.bias])
    watch = Watch(run.watched(), run.ratio_limit(), run.model.device)
    Update(run, batch, None)._accumulate(torch.arange(4), watch)
    assert expected[1].abs().max() > 0.02
    for value, gradient in zip((run.model.gain, run.model.bias), expected, strict=True):
        torch.testing.assert_close(value.grad, gradient, rtol=1e-4, atol=1e-6)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


def test_an_edge_s_credit_tells_its_own_noise_better_than_the_outcome(tmp_path):
    """On a linear sampler with the reward linear in the end: sibling credit has none of the luck that was shared."""
    plan = TreeWindow(Window(DanceSDE(0.6), 0, 4), 2)
    found: dict[str, list[float]] = {}
    for name, compare in (("siblings", siblings), ("depths", depths)):
        sampling = Sampling(plan, 64, 16, 8, 64, STEPS, 1.0)
        run = trainer(tmp_path / name, plan, 16, compare=compare, advantages=raw, sampling=sampling)
        batch = run.collect(0)
        found[name] = [_of_noise(run, batch, at, batch.advantages[:, at]) for at in range(4)]
        flat = raw(batch.scores.total, batch.group_ids)
        found["outcome"] = [_of_noise(run, batch, at, flat) for at in range(4)]
    for at in range(4):
        assert found["siblings"][at] > found["outcome"][at] + 0.1, found
    assert found["siblings"][3] == pytest.approx(1.0, abs=1e-4)  # nothing but this noise tells the last siblings apart
    assert found["siblings"][1] > found["depths"][1]


def raw(rewards: Tensor, group_ids: Tensor) -> Tensor:
    return group_advantages(rewards, group_ids, std=lambda r, g: torch.ones_like(r))


def _of_noise(run: Any, batch: Any, at: int, credit: Tensor) -> float:
    """Correlation of what each leaf's edge is credited with that edge's noise, held against its siblings'."""
    step, rule = batch.steps[at], batch.path.transitions[at]
    with torch.no_grad():
        velocity = run.model.velocity(step.latents, step.interval.sigma, run.model.encode([""] * len(step.latents)))
    mean, std = rule(step.latents, velocity, step.interval)
    noise = ((step.latents_next - mean.repeat_interleave(step.members, 0)) / std)[:, 0].view(-1, step.members)
    own = (noise - noise.mean(1, keepdim=True)).flatten()
    return correlation(credit, own.repeat_interleave(len(credit) // len(own)))


def test_noise_grows_with_the_depth_of_a_window_that_moves():
    plan = TreeWindow(SlidingWindow(FlowSDE(0.5), 3, every=2), 2, slope=0.1)
    first, later = (plan.resolve(STEPS, epoch, 0) for epoch in (1, 4))
    assert (first.stochastic, later.stochastic) == ((0, 1, 2), (2, 3, 4))
    assert later.branchings == ((2, 2), (3, 2), (4, 2))
    levels = [rule.noise_level for rule in later.transitions if isinstance(rule, FlowSDE)]
    assert levels == pytest.approx([0.5, 0.6, 0.7])
    with pytest.raises(ValueError, match="noise_level, and TableSDE"):
        TreeWindow(Window(TableSDE((0.1,) * 4), 0, 2), slope=0.1).resolve(4, 0, 0)


def test_pruned_depths_are_not_replayed(tmp_path):
    plan = Tree(SDE, (0, 2), (2, 3), pruning=DepthPruning(6, 2, every=2, stop=5))
    assert [plan.resolve(STEPS, epoch, 0).skipped for epoch in (0, 1, 2, 9)] == [(6, 7), (6, 7), (5, 6), (5, 6)]
    run = trainer(tmp_path / "run", plan, 6)
    batch = run.collect(0)
    run.update(batch)
    assert run.state.rows.gradient == 4 * (1 + 2 + 2 + 6 * 5)
    assert run.model.bias.detach()[[6, 7]].tolist() == [0, 0]


def test_width_pruning_keeps_the_best_and_the_worst_after_the_last_branching(tmp_path):
    kept = Extremes(0.5)(torch.tensor([3.0, 1, 2, 5, 4, 6]), torch.zeros(6, dtype=torch.int64))
    assert kept.tolist() == [False, True, True, False, False, True]  # of three the worse two, as in the authors' code
    run = trainer(tmp_path / "run", Tree(SDE, (0, 2), (2, 4)), 8, width_pruning=Extremes(0.5), compare=depths)
    batch = run.collect(0)
    ranks = batch.scores.total.view(4, 8).argsort(1).argsort(1).flatten()
    extreme = (ranks < 2) | (ranks > 5)
    assert torch.equal(batch.advantages[:, 3] != 0, extreme)
    assert batch.advantages[:, :3].ne(0).all()
    plain = trainer(tmp_path / "plain", Tree(SDE, (0, 2), (2, 4)), 8, compare=depths).collect(0)
    torch.testing.assert_close(batch.advantages[extreme, 3], 2 * plain.advantages[extreme, 3])


def test_what_is_counted_is_what_is_spent(tmp_path):
    """Micro-batches of two trees out of three, guidance, a KL, and pruning; floors without padding, and with it."""
    run = tree_job(tmp_path / "run", evaluation=Evaluation(), epochs=1)
    epoch = run.collection.epoch(0)
    spent = spent_rows(run, epoch, geometry(run))
    run.train(report=False)
    row = rows(tmp_path / "run")[-1]
    assert (spent.forward, spent.gradient) == (row["rows/forward"], row["rows/gradient"])
    assert floor_rows(run, epoch).forward == row["floor/forward"] < row["rows/forward"]
    assert row["ratio_max"] >= 0


def test_a_check_tells_the_tree(tmp_path):
    run = trainer(tmp_path / "run", Tree(SDE, (0, 1), (2, 2)), 4)
    found = inspect(run, tmp_path / "out")
    assert not found.errors, found.problems
    assert found.trial is not None
    assert found.trial.learning.off == 0
    told = page(found)
    assert "a tree of 4 leaves for each prompt; rows part at step 0 into 2, step 1 into 2" in " ".join(told.split())
    assert "35 rows of the network for a group, where samples apart take 40" in " ".join(told.split())


def test_a_tree_s_members_can_be_trained_on_by_their_outcome(tmp_path):
    """Flow-GRPO and DenseGRPO on a tree: credit of their own, and the same replay of nodes."""
    run = job(tmp_path / "run", sampling=Sampling(Tree(SDE, (0, 1), (2, 2)), 2, 4, 1, 4, 3, 1.0), epochs=1)
    batch = run.collect(0)
    assert batch.advantages.shape == (8,)
    assert run.update(batch)["ratio_max"] < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 8}, "1 x 2 x 3 x 2 = 12 leaves .* sampling.group_size is 8"),
        ({"plan": AllSteps(SDE)}, "samples share nothing: .* trainers.FlowGRPO"),
        ({"plan": Tree(SDE, (9,), (2,), last_step=False), "size": 2}, "0 to 8"),
        ({"plan": TreeWindow(RollingWindow(SDE, 2, every=1)), "size": 4, "epochs": 10}, "1 x 2 = 2 leaves"),
        ({"width_pruning": Extremes(), "plan": TreeWindow(Window(SDE, 0, 2)), "size": 4}, "after the last branching"),
        ({"plan": Tree(SDE, (0,), (12,), pruning=DepthPruning(0, 10))}, "no step to train on"),
        ({"advantages": GDPO()}, "GDPO reads the terms"),
    ],
    ids=["size", "flat", "last", "cut", "width", "pruned", "terms"],
)
def test_what_cannot_work_together_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tree(SDE, (0, 0), (2, 2)), "must rise"),
        (lambda: Tree(SDE, (0, 1), (2,)), "a number for each"),
        (lambda: Tree(SDE, (0,), (1,)), "at least 2 children"),
        (lambda: Extremes(0.0), "must lie in"),
        (lambda: DepthPruning(2, 1, stop=3), "stop among"),
    ],
)
def test_bad_trees_say_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()

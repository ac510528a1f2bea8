"""G2RPO: one anchor and one network row for a group, credit that knows one step's noise, tails and their calls."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowalign.advantages import dancegrpo_advantages, group_advantages, unbiased_group_std
from flowalign.completions import calls_of, follow, thinned_points
from flowalign.models.gaussian import GaussianModel
from flowalign.records import Media, Prompts, Step
from flowalign.rollout import Policy, resume
from flowalign.schedules import AllSteps, FanOut, RandomSteps
from flowalign.transitions import ODE, FlowSDE
from rewards.base import Card, FunctionReward, Reward
from tests import processes
from tests.jobs import g2rpo_job, rows
from tests.test_flow_grpo import law
from tests.test_shipped_configs import resolved
from trainers import FlowGRPO, Optimizer, Sampling
from trainers.fanned import fanned_rewards_of, name_of
from trainers.g2rpo import G2RPO, summed_advantages
from trainers.preflight import inspect
from trainers.preflight.geometry import floor_rows, geometry, looked_at, spent_rows
from trainers.preflight.text import page
from trainers.state import State

SDE, STEPS = FlowSDE(0.7), 10
EVERY = tuple(range(STEPS))


def level(media: Media, prompts: Prompts) -> Tensor:
    return media.pixels[:, 0, 0, 0]


def square(media: Media, prompts: Prompts) -> Tensor:
    return media.pixels[:, 0, 0, 0].square()


def sampling(steps: tuple[int, ...] = EVERY, size: int = 6, per_call: int = 64) -> Sampling:
    return Sampling(FanOut(SDE, steps), 3, size, 2, per_call, STEPS, 1.0)


def trainer(folder: Path, **changes: Any) -> G2RPO:
    """On the closed form, where the reward is the sample itself."""
    settings: dict[str, Any] = {
        "model": GaussianModel(mean=0.3), "reward": level, "prompts": ["x", "y", "z"], "sampling": sampling(),
        "folder": str(folder), "optimizer": Optimizer(0.02, weight_decay=0.0, ema_decay=0.0), "epochs": 1,
    }  # fmt: skip
    return G2RPO(**settings | changes)


def noise_of(run: G2RPO, step: Step) -> Tensor:
    """What the members of a step were moved by, from where they came to."""
    transition = run.collection.path(0).transitions[step.interval.index]
    with torch.no_grad():
        velocity = run.model.velocity(step.latents, step.interval.sigma, run.model.encode([""] * len(step.latents)))
    mean, std = transition(step.latents, velocity, step.interval)
    return (step.latents_next - mean.repeat_interleave(step.members, 0))[:, 0].double() / std


def test_points_of_a_tail():
    assert thinned_points(1, 6, 1) == (1, 2, 3, 4, 5, 6)
    assert thinned_points(1, 6, 2) == (1, 2, 4, 6)
    assert thinned_points(2, 6, 2) == (2, 3, 6)  # 5 would be the last one, and goes to the end at once
    assert thinned_points(1, 6, 3) == (1, 2, 6)
    assert thinned_points(5, 6, 2) == (5, 6)
    assert thinned_points(6, 6, 2) == (6,)
    for first, stride in itertools.product(range(1, 9), range(1, 10)):
        points = thinned_points(first, 8, stride)
        assert (points[0], points[-1]) == (first, 8)
        assert all(a < b for a, b in itertools.pairwise(points))


def test_routes_share_the_calls_of_points_that_they_have_in_common_from_their_start_on():
    assert calls_of([(1, 2, 3, 4, 5, 6), (1, 2, 4, 6)]) == (1, 2, 3, 4, 5, 4)
    assert calls_of([(1, 2, 3), (1, 3)]) == (1, 2)
    assert calls_of([(3,), (3,)]) == ()


@pytest.mark.parametrize("per_call", [1, 4, None])
def test_tails_are_odes_on_their_own_grids(per_call):
    model = GaussianModel(mean=0.5, dims=3)
    sigmas, told = model.sigmas(STEPS), model.encode(["a", "b"])
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(4, 3, generator=generator), torch.randn(2, 3, generator=generator)]
    routes = [(0, thinned_points(1, STEPS, 1)), (0, thinned_points(1, STEPS, 2)), (1, thinned_points(4, STEPS, 2))]
    index = [torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1])]
    model.meter.take()
    ends = follow(model, told, starts, index, routes, sigmas, rows_per_call=per_call)
    assert model.meter.rows.forward == 4 * len(calls_of([routes[0][1], routes[1][1]])) + 2 * len(
        calls_of([routes[2][1]])
    )
    for end, (start, route) in zip(ends, routes, strict=True):
        grid = [sigmas[point] for point in route]
        assert grid[-1] == 0
        assert torch.equal(end, resume(model, told.rows(index[start]), starts[start], grid[0], grid))


def test_members_share_the_anchor_which_is_the_ode_bit_for_bit(tmp_path):
    run = trainer(tmp_path)
    batch, model = run.collect(0), run.model
    assert [step.interval.index for step in batch.steps] == list(EVERY)
    told, anchor = model.encode([""] * 3), batch.steps[0].latents
    for step in batch.steps:
        assert (len(step.latents), step.members) == (3, 6)
        assert torch.equal(step.latents, anchor)
        with torch.no_grad():
            anchor, _ = ODE()(anchor, model.velocity(anchor, step.interval.sigma, told), step.interval)
        assert len(step.latents_next.unique()) == 18


def test_a_reward_depends_on_its_own_step_s_noise_alone(tmp_path, monkeypatch):
    plain = trainer(tmp_path).collect(0)
    run = trainer(tmp_path)
    real = run.collection.noise

    def moved(epoch: Any, samples: Any, purpose: str, number: int) -> Tensor:
        return real(epoch, samples, purpose, number) * (-1 if number == 4 else 1)

    monkeypatch.setattr(run.collection, "noise", moved)
    other = run.collect(0)
    for step, stride in itertools.product(EVERY, (1, 2)):
        same = torch.equal(*(one.scores.parts[name_of(step, stride)] for one in (plain, other)))
        assert same == (step != 4), (step, stride)
    assert [torch.equal(a, b) for a, b in zip(plain.advantages.T, other.advantages.T, strict=True)] == [
        step != 4 for step in EVERY
    ]


def test_credit_of_a_linear_reward_is_the_noise_itself(tmp_path):
    """Correlation 1 at every step, where the sparse credit of Flow-GRPO has .01 to .40."""
    run = trainer(tmp_path)
    batch = run.collect(0)
    for at, step in enumerate(batch.steps):
        for group in range(3):
            its = batch.group_ids == group
            both = torch.stack([batch.advantages[its, at].double(), noise_of(run, step)[its]])
            assert float(torch.corrcoef(both)[0, 1]) == pytest.approx(1, abs=1e-6)
            assert both[0].abs().max() < 5  # unclipped, and a sum of two z-scores
            assert float(both[0].std()) == pytest.approx(2, abs=1e-4)


def test_advantages_are_sums_of_z_scores_that_are_clipped_once():
    one, two = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 9.0]), torch.tensor([0.0, 5.0, 1.0, 4.0, 4.0, 4.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    rewards = torch.stack([torch.stack([one, two], 1), torch.stack([two, two], 1)], 1)
    scored = [group_advantages(values, groups, unbiased_group_std, eps=1e-8) for values in (one, two)]
    found = summed_advantages(rewards, groups)
    torch.testing.assert_close(found[:, 0], scored[0] + scored[1])
    torch.testing.assert_close(found[:, 1], 2 * scored[1])
    assert found[3:, 1].eq(0).all()  # equal rewards: exactly nothing
    far = torch.zeros(40, 1, 2)
    far[0] = 1.0
    assert summed_advantages(far, torch.zeros(40, dtype=torch.int64))[0] == 5
    single = summed_advantages(far, torch.zeros(40, dtype=torch.int64), clip=100.0)[0]
    assert float(single) == pytest.approx(2 * 39 / math.sqrt(40), rel=1e-5)


PLANS = {
    "all": (sampling(), {}),
    "gaps": (sampling((1, 4, 7), per_call=5), {"granularities": (1, 2, 3)}),
    "thin": (sampling((0, 2)), {"granularities": (3,), "kl_coef": 0.1}),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_run_takes_the_rows_that_it_needs_and_no_more_but_for_padding(name, tmp_path):
    """Three groups in micro-batches of two: the fourth row of an anchor's or an update's call is padding."""
    plan, changes = PLANS[name]
    run = trainer(tmp_path, sampling=plan, epochs=2, **changes)
    run.train(report=False)
    steps, tails = run.collection.path(0).stochastic, 0
    for step in steps:
        tails += len({route[:i] for route in run.collection.routes(step) for i in range(1, len(route))})
    for epoch, row in zip(looked_at(run), rows(tmp_path), strict=True):
        floor, spent = floor_rows(run, epoch), spent_rows(run, epoch, geometry(run))
        reference = len(steps) * (run.kl_coef > 0)
        assert floor.forward == 3 * (steps[-1] + 1 + reference) + 18 * tails
        assert floor.gradient == 3 * len(steps)
        assert (row["floor/forward"], row["floor/gradient"]) == (floor.forward, floor.gradient)
        assert (row["rows/forward"], row["rows/gradient"]) == (spent.forward, spent.gradient)
        assert spent.forward - floor.forward == steps[-1] + 1 + reference
        assert row["ratio_max"] == 0


def test_the_authors_settings_take_this_many_rows(tmp_path):
    """16 steps, the first 8 trained, tails of every and of every second point, 12 members."""
    grid = [1 - i / 16 for i in range(17)]
    run = trainer(tmp_path, model=GaussianModel(grid=grid), sampling=Sampling(
        FanOut(SDE, tuple(range(8))), 1, 12, 1, 64, 16, 1.0
    ))  # fmt: skip
    assert [len(calls_of(run.collection.routes(k))) for k in range(8)] == [15 + 6 - k - (k + 1) // 2 for k in range(8)]
    assert run.needed(run.collection.epoch(0)).gradient == 8


def test_one_step_and_the_grid_itself_are_flow_grpo_with_a_fan_out(tmp_path):
    common = {"kl_coef": 0.0, "updates_per_epoch": 1, "epochs": 3, "sampling": sampling((2,))}
    run = trainer(tmp_path / "fans", granularities=(1,), **common)
    flow = FlowGRPO(
        GaussianModel(mean=0.3), level, ["x", "y", "z"], advantages=dancegrpo_advantages, clip_range=1e-4,
        optimizer=run.optimizer.settings, folder=str(tmp_path / "flow"), **common,
    )  # fmt: skip
    for one in (run, flow):
        one.train(report=False)
    for name, value in flow.model.trainable().items():
        torch.testing.assert_close(run.model.trainable()[name], value, atol=1e-7, rtol=0)
    assert run.model.trainable()["bias"].detach().abs().max() > 0.01


def test_the_mean_moves_to_where_the_reward_is_higher(tmp_path):
    settings = {"epochs": 5, "sampling": sampling((0, 3, 6)), "optimizer": Optimizer(0.05, ema_decay=0.0)}
    for name, reward, sign in (("up", level, 1), ("down", lower, -1)):
        run = trainer(tmp_path / name, model=GaussianModel(), reward=reward, **settings)
        run.train(report=False)
        assert isinstance(run.model, GaussianModel)
        assert sign * law(run.model, ODE())[0] > 0.03


def lower(media: Media, prompts: Prompts) -> Tensor:
    return -level(media, prompts)


def test_terms_of_a_reward_are_scored_on_their_own_and_their_weights_signs_count(tmp_path):
    reward = 100.0 * as_one(level, "level") - 0.01 * as_one(square, "square")
    run = trainer(tmp_path, reward=reward, sampling=sampling((0, 3)))
    batch = run.collect(0)
    for at, step in enumerate((0, 3)):
        expected = torch.zeros(18)
        for stride, (term, sign) in itertools.product((1, 2), (("level", 1), ("square", -1))):
            values = batch.scores.parts[name_of(step, stride, f"term/{term}")]
            expected += sign * group_advantages(values, batch.group_ids, unbiased_group_std, eps=1e-8)
        torch.testing.assert_close(batch.advantages[:, at], expected.clamp(-5, 5), atol=2e-5, rtol=0)
    whole = trainer(tmp_path, reward=reward, sampling=sampling((0, 3)), by_term=False).collect(0)
    values = fanned_rewards_of(whole.scores, (0, 3), (1, 2), ())
    assert torch.equal(whole.advantages, summed_advantages(values, whole.group_ids))
    assert torch.equal(whole.scores.total, batch.scores.total)
    assert not torch.allclose(whole.advantages, batch.advantages, atol=0.1)


def as_one(function: Any, name: str) -> Reward:
    made = FunctionReward(function)
    made.name = name
    return made


class Rank(FunctionReward):
    card = Card(scope="group")


def best(media: Media, prompts: Prompts) -> Tensor:
    """The share of the group that a sample exceeds."""
    assert prompts.groups is not None
    values, groups = level(media, prompts), torch.tensor(prompts.groups)
    assert (groups.bincount()[groups] == 6).all()
    return ((values[:, None] > values) & (groups[:, None] == groups)).float().sum(1) / 5


def test_members_of_one_step_are_the_group_that_a_reward_compares(tmp_path):
    batch = trainer(tmp_path, reward=Rank(best), sampling=sampling((0, 5), per_call=4)).collect(0)
    for step, stride in itertools.product((0, 5), (1, 2)):
        ranks = batch.scores.parts[name_of(step, stride)].view(3, 6).sort(1).values
        torch.testing.assert_close(ranks, torch.arange(6).div(5).expand(3, 6))


def sometimes(media: Media, prompts: Prompts) -> Tensor:
    values = level(media, prompts).clone()
    return values.where(values < 1.0, torch.nan)


def test_a_sample_of_which_one_picture_cannot_be_scored_is_not_valid(tmp_path):
    scores = trainer(tmp_path, reward=sometimes, on_invalid="drop").collect(0).scores
    values = fanned_rewards_of(scores, EVERY, (1, 2), ())
    assert torch.equal(scores.valid, ~values.isnan().flatten(1).any(1))
    assert scores.total[~scores.valid].isfinite().any()


def test_a_check_tries_it_whole_and_leaves_it_as_it_was(tmp_path):
    run = trainer(tmp_path / "run", sampling=sampling((0, 3)))
    found = inspect(run, tmp_path / "out")
    assert not found.errors, found.problems
    assert found.trial is not None
    assert found.trial.learning.off == 0
    assert len(found.trial.rollouts.pixels) == 6
    assert "6 members part from one ODE path at each of 2 steps, and go on by every 1 and 2 points" in page(found)
    assert run.state == State()
    batch = run.collect(0)
    held = sum(value.nbytes for step in batch.steps for value in (step.latents, step.latents_next, step.log_probs))
    assert run.preflight().kept_bytes(geometry(run)) == held


def credit_and_policy(folder: Path, rank: int = 0) -> tuple[Any, Any]:
    run = trainer(folder, sampling=sampling((0, 3)), updates_per_epoch=2, epochs=2, kl_coef=0.1)
    credit = run.collect(0).advantages.numpy()
    run.state = State()
    run.train(report=False)
    return credit, {name: value.detach().numpy() for name, value in run.model.trainable().items()}


def test_it_comes_to_the_same_on_two_processes(tmp_path):
    (alone,) = processes.run(1, tmp_path, functools.partial(credit_and_policy, tmp_path / "1"))
    for credit, ends in processes.run(2, tmp_path, functools.partial(credit_and_policy, tmp_path / "2")):
        assert np.array_equal(credit, alone[0])
        assert max(np.abs(ends[name] - alone[1][name]).max() for name in ends) <= 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": Sampling(AllSteps(SDE), 2, 4, 2, steps=STEPS)}, "AllSteps: with noise in several steps.*FanOut"),
        ({"sampling": Sampling(RandomSteps(SDE, 1), 2, 4, 2, steps=STEPS)}, "plan is RandomSteps"),
        ({"sampling": sampling((1, 1))}, r"names a step twice: \[1, 1\]"),
        ({"sampling": sampling((3, STEPS))}, "stochastic step 10 is outside a rollout of 10 steps"),
        ({"sampling": sampling(size=1)}, "group_size must be at least 2"),
        ({"granularities": ()}, "granularities must be distinct numbers of at least 1, got"),
        ({"granularities": (1, 0)}, r"at least 1, got \[1, 0\]"),
        ({"granularities": (2, 2)}, r"distinct numbers of at least 1, got \[2, 2\]"),
        ({"updates_per_epoch": 4}, r"updates_per_epoch must lie in 1 \.\.\. 3"),
    ],
)
def test_what_cannot_work_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)


def test_published_settings():
    config = resolved("g2rpo/flux.1-dev_hpsv2_clip.yaml")
    sampled = config["sampling"]
    assert sampled["plan"]["steps"] == list(range(8))
    assert sampled["plan"]["transition"]["noise_level"] == 0.7
    assert [sampled[key] for key in ("groups", "group_size", "steps", "guidance_scale")] == [16, 12, 16, 3.5]
    assert (config["clip_range"], config["kl_coef"], config["granularities"]) == (1e-4, 0.0, [1, 2])
    assert (config["updates_per_epoch"], config["epochs"], config["by_term"]) == (1, 301, True)


def test_no_guidance_is_no_second_call(tmp_path):
    run = g2rpo_job(tmp_path)
    assert run.policy == Policy(2.0, unconditional_grad=False)
    epoch = run.collection.epoch(0)
    assert run.collection.scoring_rows(epoch).forward == 2 * 12 * (2 + 1)
    assert run.needed(epoch).gradient == 3 * 2

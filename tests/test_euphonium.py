"""Guidance against closed forms, its density, SPSA, the two advantages, and DanceGRPO where nothing is guided."""

from __future__ import annotations

import itertools
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.advantages import dancegrpo_advantages
from flowalign.guidance import SPSA, Backpropagation, Guide, Guided
from flowalign.models.gaussian import GaussianModel
from flowalign.objectives import clipped_policy_loss
from flowalign.records import Interval, Media, Prompts
from flowalign.rollout import Policy, Replay, rollout
from flowalign.schedules import AllSteps, ChosenSteps, RandomSteps
from flowalign.transitions import DanceSDE, sum_of_elements
from flowalign.trees import Tree
from rewards.base import Card, FunctionReward
from tests.jobs import euphonium_job, rows
from trainers import Evaluation, FlowGRPO, Sampling
from trainers.euphonium import Euphonium, arrival, departure
from trainers.guided import process_rewards_of
from trainers.preflight import inspect, page
from trainers.preflight.geometry import floor_rows, geometry, spent_rows

STEPS = 10
DANCE = DanceSDE(0.3)
HELD, WHOLE = Backpropagation(network=False), Backpropagation()


def level(media: Media, prompts: Prompts) -> Tensor:
    return media.pixels[:, 0, 0, 0]


LEVEL = FunctionReward(level, differentiable=True)


def trainer(folder: FilePath, kind: Any = Euphonium, **changes: Any) -> Any:
    """On the closed form, where the reward is the sample itself."""
    settings: dict[str, Any] = {
        "reward": LEVEL, "sampling": Sampling(AllSteps(DANCE, shared_noise=True), 2, 6, 1, 64, STEPS, 1.0),
        "kl_coef": 0.0, "updates_per_epoch": 1, "epochs": 2, "folder": str(folder),
    }  # fmt: skip
    if kind is FlowGRPO:
        settings["advantages"] = dancegrpo_advantages
    return kind(GaussianModel(), prompts=["x", "y"], **settings | changes)


def ones(step: int, number: int) -> Tensor:
    return torch.ones(4, 3)


def walk(model: GaussianModel, guide: Guide | None, dims: int = 3, step: int = 6) -> Any:
    """A rollout with one stochastic step."""
    generator = torch.Generator().manual_seed(1)
    start, noise = (torch.randn(4, dims, generator=generator) for _ in range(2))
    told, path = model.encode([""] * 4), ChosenSteps(DANCE, (step,)).resolve(STEPS, 0, 0)
    return rollout(
        model, told, start, model.sigmas(STEPS), path, Policy(reduce=sum_of_elements), lambda _: noise, guide=guide
    )


@pytest.mark.parametrize("times_dt", [True, False])
@pytest.mark.parametrize("slope", [HELD, WHOLE, SPSA(0.5), SPSA(0.5, 3, network=True)], ids=str)
def test_a_linear_reward_moves_the_mean_by_scale_times_its_gradient(slope, times_dt):
    """r = g . x0hat rises: held, x moves x0hat one to one; through the network by 1 - sigma A, the posterior's gain."""
    model, g = GaussianModel(mean=0.3, variance=0.5, dims=3), torch.tensor([1.0, -2.0, 0.5])
    # with u = (1, 1, 1) the estimate of a linear reward is its slope along u
    estimate = g if isinstance(slope, Backpropagation) else g.sum().expand(3)
    guide = Guide(Guided((6,), 0.7, times_dt, slope), lambda step, x: x @ g, ones)
    (plain,), (moved,) = (walk(model, one).steps for one in (None, guide))
    sigma, interval = plain.interval.sigma, plain.interval
    gain = 0.5 * (1 - sigma) / ((1 - sigma) ** 2 * 0.5 + sigma**2) if slope.network else 1.0
    shift = 0.7 * (-interval.dt if times_dt else 1.0) * gain * estimate
    torch.testing.assert_close(moved.latents_next - plain.latents_next, shift.expand(4, 3), atol=1e-5, rtol=1e-4)
    rise = (moved.latents_next - plain.latents_next) @ g
    assert (rise > 0).all() or isinstance(slope, SPSA)


def test_the_log_prob_of_a_guided_step_is_that_of_the_unguided_gaussian():
    model, g = GaussianModel(dims=3), torch.tensor([1.0, -2.0, 0.5])
    guide = Guide(Guided((6,), 3.0), lambda step, x: (x * g).sum(1), ones)
    (plain,), (moved,) = (walk(model, one).steps for one in (None, guide))
    velocity = model.velocity(moved.latents, moved.interval.sigma, model.encode([""] * 4)).detach()
    mean, std = DANCE(moved.latents, velocity, moved.interval)
    expected = torch.distributions.Normal(mean, std).log_prob(moved.latents_next).sum(1)
    torch.testing.assert_close(moved.log_probs, expected)
    assert not torch.allclose(moved.log_probs, plain.log_probs)


def test_values_are_those_of_the_denoised_latents_and_the_velocity_is_the_rollout_s_own():
    model, g = GaussianModel(dims=3), torch.tensor([1.0, -2.0, 0.5])
    for slope in (HELD, WHOLE, SPSA()):
        made = walk(model, Guide(Guided((6,), 0.0, slope=slope), lambda step, x: x @ g, ones))
        plain = walk(model, None)
        assert torch.equal(made.latents, plain.latents)
        (step,), (values,) = made.steps, made.values
        velocity = model.velocity(step.latents, step.interval.sigma, model.encode([""] * 4))
        torch.testing.assert_close(values, (step.latents - step.interval.sigma * velocity).detach() @ g)


def test_what_is_not_finite_moves_nothing():
    model = GaussianModel(dims=3)

    def reward(step: int, x: Tensor) -> Tensor:
        return x.sum(1).where(torch.tensor([True, False, True, True]), torch.nan)

    made, plain = walk(model, Guide(Guided((6,), 0.5), reward, ones)), walk(model, None)
    same = (made.steps[0].latents_next == plain.steps[0].latents_next).all(1)
    assert same.tolist() == [False, True, False, False]
    assert made.values[0].isnan().tolist() == [False, True, False, False]


def test_spsa_averaged_over_all_signs_is_a_quadratic_s_gradient():
    g, curve = torch.randn(4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    x = torch.randn(1, 4, dtype=torch.float64)
    every = [torch.tensor([signs], dtype=torch.float64) for signs in itertools.product((-1.0, 1.0), repeat=4)]

    def reward(y: Tensor) -> Tensor:
        return y @ g + ((y @ curve) * y).sum(1)

    felt = SPSA(0.3, len(every))(torch.zeros_like, reward, x, 0.5, lambda number: every[number])
    torch.testing.assert_close(felt.gradient, g + x @ (curve + curve.T))
    single = SPSA(0.3)(torch.zeros_like, reward, x, 0.5, lambda number: every[number])
    assert not torch.allclose(single.gradient, felt.gradient, rtol=0.1)


NOTHING = [
    {"guided": Guided((7, 8), 0.0), "process_coef": 0.0},
    {"guided": Guided((7, 8), 0.0), "credited_to": lambda stochastic, guided: None},
    {"guided": Guided()},
]


@pytest.mark.parametrize("changes", NOTHING, ids=["no coefficient", "no credit", "no steps"])
def test_without_guidance_it_is_dancegrpo_bit_for_bit(changes, tmp_path):
    ends = []
    for name, kind, own in (("a", Euphonium, changes), ("b", FlowGRPO, {})):
        run = trainer(tmp_path / name, kind, updates_per_epoch=2, **own)
        for number in range(2):
            run.update(run.collect(number))
        ends.append(torch.cat([run.model.gain.detach(), run.model.bias.detach()]))
    assert ends[0].any()
    assert torch.equal(*ends)


def test_a_guided_rollout_earns_more_and_is_replayed_as_unguided(tmp_path):
    """The ratio of a sample to the policy that drew it is 1, as both densities are the unguided ones."""
    plain = trainer(tmp_path / "a", FlowGRPO).collect(0)
    run = trainer(tmp_path / "b", guided=Guided((5, 6, 7), 1.0))
    batch = run.collect(0)
    assert (batch.scores.total > plain.scores.total).all()
    assert run.update(batch)["ratio_max"] == 0


def test_the_two_advantages_by_hand(tmp_path):
    """The reward at step 7 is credited to step 6, which has led there, and that of step 5 to step 4."""
    run = trainer(tmp_path / "run", guided=Guided((7, 5), 0.5))
    batch = run.collect(0)
    assert batch.advantages.shape == (12, 10, 2)
    outcome = dancegrpo_advantages(batch.scores.total, batch.group_ids)
    assert torch.equal(batch.advantages[:, :, 0], outcome[:, None].expand(12, 10))
    rewards = process_rewards_of(batch.scores)
    (fifth, seventh) = (batch.steps[at] for at in (5, 7))
    for column, step in zip(rewards.T, (fifth, seventh), strict=True):
        velocity = run.model.velocity(step.latents, step.interval.sigma, run.model.encode([""] * 12))
        torch.testing.assert_close(column, (step.latents - step.interval.sigma * velocity).detach()[:, 0])
    expected = torch.zeros(12, 10)
    expected[:, [4, 6]] = dancegrpo_advantages(rewards, batch.group_ids)
    assert torch.equal(batch.advantages[:, :, 1], expected)
    assert (arrival((2, 4, 7), 7), arrival((2, 4, 7), 2), departure((2, 4), 4)) == (4, None, 4)


def test_the_loss_is_two_clipped_ones(tmp_path):
    run = trainer(tmp_path / "run", outcome_coef=0.5, process_coef=2.0, clip_range=0.1)
    new, old = torch.tensor([0.3, -0.3, 0.05]), torch.zeros(3)
    advantages = torch.tensor([[1.0, -1.0], [-2.0, 3.0], [0.5, 0.0]])
    made = Replay(new, torch.zeros(3, 1), torch.zeros(3, 1), 0.1)
    loss = run.loss(made, old, advantages, None, Interval(0, 1.0, 0.9, 0.9))
    outcome, process = (clipped_policy_loss(new, old, advantages[:, i], 0.1) for i in (0, 1))
    torch.testing.assert_close(loss, 0.5 * outcome + 2 * process)
    torch.testing.assert_close(loss[0], -0.5 * torch.tensor(1.1) + 2 * torch.tensor(0.3).exp())


@pytest.mark.parametrize("slope", [WHOLE, SPSA(draws=2, network=True)], ids=str)
def test_what_is_counted_is_what_is_spent(slope, tmp_path):
    guided = Guided((1, 2), 0.5, slope=slope)
    run = euphonium_job(tmp_path / "run", evaluation=Evaluation(), epochs=1, guided=guided)
    epoch = run.collection.epoch(0)
    spent = spent_rows(run, epoch, geometry(run))
    run.train(report=False)
    row = rows(tmp_path / "run")[-1]
    assert (spent.forward, spent.gradient) == (row["rows/forward"], row["rows/gradient"])
    assert floor_rows(run, epoch) == spent
    assert {"reward/process_001", "reward/process_002"} <= set(row)


def test_signs_are_keyed_and_rollouts_repeat_on_any_micro_batches(tmp_path):
    ends = []
    for size in (1, 3):
        run = trainer(
            tmp_path / str(size), guided=Guided((4, 6), 0.5, slope=SPSA(draws=2)), reward=level,
            sampling=Sampling(AllSteps(DANCE, shared_noise=True), 3, 4, size, 64, STEPS, 1.0),
        )  # fmt: skip
        ends.append(run.collect(0).scores.total)
    assert torch.equal(*ends)


def test_it_guides_trees_and_fans_too(tmp_path):
    """A guided step that samples share has one reward, of all of them."""
    plan = Tree(DANCE, (3, 6), (2, 3))
    batch = trainer(tmp_path / "run", guided=Guided((4, 6), 0.5), sampling=Sampling(plan, 2, 6, 1, 64, STEPS, 1.0))
    rewards = process_rewards_of(batch.collect(0).scores).view(2, 2, 3, 2)
    assert torch.equal(rewards, rewards[:, :, :1].expand_as(rewards))
    assert len(rewards.unique()) == 8


def test_a_check_tells_what_is_guided(tmp_path):
    run = trainer(tmp_path / "run", guided=Guided((6, 7), 0.5))
    found = inspect(run, tmp_path / "out")
    assert not found.errors, found.problems
    assert found.trial is not None
    assert found.trial.learning.off == 0
    assert "steps [6, 7], by 0.0686 to 0.0934 times the gradient of level" in " ".join(page(found).split())


def sometimes(media: Media, prompts: Prompts) -> Tensor:
    values = level(media, prompts)
    return values.where(values < 0.5, torch.nan)


def test_a_sample_whose_process_reward_cannot_be_had_is_not_valid(tmp_path):
    judge = FunctionReward(sometimes, differentiable=True)
    run = trainer(tmp_path / "run", guided=Guided((5, 6), 0.5), process_reward=judge, on_invalid="drop")
    batch = run.collect(0)
    assert 0 < batch.scores.valid.sum() < 12
    assert not batch.advantages[~batch.scores.valid].any()
    assert batch.scores.parts["process_005"].isfinite().all()


class Rank(FunctionReward):
    card = Card(scope="group")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guided": Guided((3,)), "reward": level}, "level has no gradient.*SPSA"),
        ({"guided": Guided((3,)), "process_reward": Rank(level)}, "score each on its own"),
        ({"guided": Guided((10,))}, "guided.steps names step 10"),
        (
            {"guided": Guided((3,)), "sampling": Sampling(RandomSteps(DANCE, 4), 2, 6, 6, 64, STEPS, 1.0)},
            "guided.steps names step 3",
        ),
        ({"outcome_coef": 0.0, "process_coef": 0.0}, "not both 0"),
    ],
    ids=["gradient", "scope", "outside", "drawn", "coefficients"],
)
def test_what_cannot_work_together_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", epochs=30, **changes)


def test_bad_numbers_say_why():
    with pytest.raises(ValueError, match="scale must be at least 0"):
        Guided((1,), -0.1)
    with pytest.raises(ValueError, match="positive size"):
        SPSA(0.0)

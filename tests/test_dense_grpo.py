"""DenseGRPO: completions against the ODE itself, gains and credit against the closed form, the noise's calibration."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.advantages import group_advantages
from flowalign.completions import complete, completion_points
from flowalign.models.gaussian import GaussianModel
from flowalign.models.sd3 import SD3
from flowalign.records import Media, Prompts, Step, Trajectory, intervals
from flowalign.rollout import Policy, resume, rollout
from flowalign.schedules import AllSteps, ChosenSteps, FanOut, RandomSteps, Window
from flowalign.schedules import Path as Plan
from flowalign.transitions import CPS, ODE, DanceSDE, FlowSDE, Transition
from rewards.base import Card, FunctionReward
from tests.jobs import dense_job, job, redness, rows
from tests.tiny import tiny_sd3
from trainers import Calibration, DenseGRPO, Evaluation, Sampling
from trainers.completed import completed_rewards_of
from trainers.dense_grpo import gains, gains_to_go, least_gain_to_go, step_advantages, values_after
from trainers.noise_calibration import noise_table
from trainers.preflight import inspect
from trainers.preflight.geometry import floor_rows, geometry, looked_at, spent_rows
from trainers.state import State

SDE = FlowSDE(0.7)
STEPS = 10


def level(media: Media, prompts: Prompts) -> Tensor:
    return media.pixels[:, 0, 0, 0]


def trainer(folder: Path, sampling: Sampling | None = None, reward: Any = level, **changes: Any) -> DenseGRPO:
    """On the closed form, where the reward is the sample itself."""
    sampling = sampling or Sampling(AllSteps(SDE), 2, 32, 16, 64, STEPS, 1.0)
    settings: dict[str, Any] = {"kl_coef": 0.0, "updates_per_epoch": 1, "epochs": 1, "folder": str(folder)}
    return DenseGRPO(GaussianModel(), reward, ["x", "y"], sampling, **settings | changes)


def rolled(model: Any, path: Plan, count: int = 6, guidance: float = 1.0) -> tuple[Trajectory, Any, list[float]]:
    """A rollout of the default grid with everything that completions need."""
    sigmas, generator = model.sigmas(len(path.transitions)), torch.Generator().manual_seed(1)
    shape = (count, *model.latent_shape)
    told = model.encode(["a red circle", "two stars"] * (count // 2))
    noise = [torch.randn(shape, generator=generator) for _ in range(len(path.transitions) + 1)]
    made = rollout(
        model, told, noise[-1], sigmas, path, Policy(guidance), lambda step: noise[step], keep_path=True,
        keep_velocities=True,
    )  # fmt: skip
    return made, told, sigmas


def test_points_of_a_completion():
    assert completion_points(7, 10) == (7, 8, 9, 10)
    assert completion_points(0, 10, 1) == (0, 10)
    assert completion_points(1, 10, 2) == (1, 5, 10)
    assert completion_points(8, 10, 5) == (8, 9, 10)
    for step, count in itertools.product(range(9), range(1, 12)):
        points = completion_points(step, 9, count)
        assert (points[0], points[-1], len(points)) == (step, 9, min(count, 9 - step) + 1)
        assert all(a < b for a, b in itertools.pairwise(points))


def test_a_completion_is_the_ode_from_the_same_latents_bit_for_bit():
    model = GaussianModel(mean=0.5, dims=3)
    made, told, sigmas = rolled(model, AllSteps(SDE).resolve(STEPS, 0, 0))
    ends = complete(model, told, made.steps, made.velocities, sigmas)
    for step, end in zip(made.steps, ends, strict=True):
        assert torch.equal(end, resume(model, told, step.latents, step.interval.sigma, sigmas))
    for rows_per_call in (1, 4, 7):
        again = complete(model, told, made.steps, made.velocities, sigmas, rows_per_call=rows_per_call)
        assert all(torch.equal(one, other) for one, other in zip(again, ends, strict=True))


def test_one_step_of_a_completion_is_the_denoised_latents_and_two_meet_a_point_of_the_grid():
    model = GaussianModel()
    made, told, sigmas = rolled(model, AllSteps(SDE).resolve(STEPS, 0, 0))
    model.meter.take()
    ends = complete(model, told, made.steps, made.velocities, sigmas, count=1)
    assert model.meter.rows.forward == 0
    for step, velocity, end in zip(made.steps, made.velocities, ends, strict=True):
        torch.testing.assert_close(end, step.latents - step.interval.sigma * velocity)
    (end,) = complete(model, told, made.steps[1:2], made.velocities[1:2], sigmas, count=2)
    half = made.steps[1].latents + (sigmas[5] - sigmas[1]) * made.velocities[1]
    torch.testing.assert_close(end, half - sigmas[5] * model.velocity(half, sigmas[5], told))
    assert model.meter.rows.forward == 6


def test_points_of_one_ode_path_have_one_completion():
    """Without noise every gain is exactly 0; with a coarser ODE it is not."""
    model = GaussianModel(mean=0.5)
    made, told, sigmas = rolled(model, Plan((ODE(),) * STEPS))
    nothing = torch.zeros(len(told))
    steps = [Step(at, made.path[at.index], made.path[at.index + 1], nothing) for at in intervals(sigmas)]
    velocities = [model.velocity(step.latents, step.interval.sigma, told) for step in steps]
    for end in complete(model, told, steps, velocities, sigmas):
        assert torch.equal(end, made.latents)
    coarse = complete(model, told, steps, velocities, sigmas, count=3)
    assert not torch.equal(coarse[0], made.latents)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_completions_of_a_network_are_the_rollout_s_own_ode(guidance):
    """Rows of several steps in one call, and the first velocity from the rollout: equal but for rounding."""
    model = SD3(tiny_sd3(), max_sequence_length=0)
    made, told, sigmas = rolled(model, ChosenSteps(SDE, (0, 1, 3)).resolve(5, 0, 0), 4, guidance)
    model.meter.take()
    ends = complete(model, told, made.steps, made.velocities, sigmas, guidance)
    calls = model.calls(guidance, 1.0)
    assert model.meter.rows.forward == calls * 4 * (4 + 3 + 1)
    for step, end in zip(made.steps, ends, strict=True):
        torch.testing.assert_close(
            end, resume(model, told, step.latents, step.interval.sigma, sigmas, Policy(guidance)), atol=1e-5, rtol=1e-5
        )
    assert not torch.allclose(ends[0], ends[1], atol=1e-2)


VALUES = torch.tensor([[1.0, 3.0, 2.0, 6.0], [0.0, 0.0, -1.0, 1.0]])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (gains, [[2, -1, 4], [0, -1, 2]]),
        (values_after, [[3, 2, 6], [0, -1, 1]]),
        (gains_to_go, [[5, 3, 4], [1, 1, 2]]),
        (least_gain_to_go, [[-1, -1, 4], [-1, -1, 2]]),
    ],
)
def test_step_rewards_by_hand(function, expected):
    assert function(VALUES).tolist() == expected


def test_advantages_are_z_scores_of_each_step_on_its_own():
    group_ids = torch.tensor([0, 0, 1, 1])
    steps = torch.tensor([[1.0, 5.0], [3.0, 5.0], [0.0, 0.2], [4.0, 0.0]])
    found = step_advantages(steps, group_ids)
    torch.testing.assert_close(
        found, torch.tensor([[-1.0, 0.0], [1.0, 0.0], [-1.0, 1.0], [1.0, -1.0]]), atol=2e-3, rtol=0
    )
    assert found[:2, 1].eq(0).all()  # equal gains: exactly nothing


def affine(model: GaussianModel, rule: Transition, sigmas: list[float]) -> list[tuple[float, float, float]]:
    """Slope of the ODE step, slope of the SDE's mean, and its std, of each step; the data have mean 0."""
    probe, found = torch.ones(1, 1), []
    for interval in intervals(sigmas):
        with torch.no_grad():
            velocity = model.velocity(probe, interval.sigma, model.encode([""]), 1.0)
        mean, std = rule(probe, velocity, interval)
        found.append((ODE()(probe, velocity, interval)[0].item(), mean.item(), std))
    return found


def test_a_gain_is_the_slope_of_the_rest_times_the_score_s_drift_and_the_noise(tmp_path):
    """dR_t = P(t') [g^2 / (2 t) ehat |dt| + std eps], P the slope of the ODE from there; and gains add up."""
    run = trainer(tmp_path / "run")
    batch = run.collect(0)
    values = completed_rewards_of(batch.scores)
    steps, sigmas = gains(values), run.sigmas
    assert torch.equal(steps.sum(1), values[:, -1].double() - values[:, 0].double())
    assert torch.equal(values[:, -1], batch.scores.total)
    known, table = affine(run.model, SDE, sigmas), noise_table(batch.path, sigmas)
    for step in batch.steps:
        at, s = step.interval.index, step.interval.sigma
        rest = math.prod(slope for slope, _, _ in known[at + 1 :])
        x, (_, mean, std) = step.latents[:, 0].double(), known[at]
        eps = (step.latents_next[:, 0].double() - mean * x) / std
        ehat = s / ((1 - s) ** 2 + s**2) * x  # of N(0, 1) data
        drift = table[at] ** 2 / (2 * s) * ehat * step.interval.dt
        torch.testing.assert_close(steps[:, at], rest * (drift + std * eps), atol=3e-5, rtol=1e-4)


def correlations(rule: Transition) -> tuple[list[float], list[float]]:
    """Of each step's noise with its own gain, and with the reward, on the closed form: all Gaussian, so exact."""
    model = GaussianModel()
    known = affine(model, rule, model.grid)
    variance, shares, dense = 1.0, list[float](), list[float]()
    for at, (slope, mean, std) in enumerate(known):
        rest = math.prod(one for one, _, _ in known[at + 1 :])
        after = math.prod(one for _, one, _ in known[at + 1 :])
        dense.append(rest * std / math.sqrt((rest * (mean - slope)) ** 2 * variance + (rest * std) ** 2))
        variance = mean**2 * variance + std**2
        shares.append(after * std)
    return dense, [share / math.sqrt(variance) for share in shares]


DENSE = [0.944, 0.928, 0.954, 0.964, 0.969, 0.971, 0.974, 0.980, 0.991, 1.0]
SPARSE = [0.20, 0.33, 0.30, 0.31, 0.34, 0.37, 0.40, 0.37, 0.26, 0.01]


def test_dense_credit_knows_its_own_step_s_noise_and_sparse_credit_does_not(tmp_path):
    for found, tabulated, atol in zip(correlations(SDE), (DENSE, SPARSE), (0.006, 0.02), strict=True):
        assert found == pytest.approx(tabulated, abs=atol)
    dance, sparse = correlations(DanceSDE(0.3))
    assert min(dance) > 0.994
    assert 0.02 < min(sparse) < max(sparse) < 0.2
    count = 1024
    run = trainer(tmp_path / "run", Sampling(AllSteps(SDE), 1, count, count, 20 * count, STEPS, 1.0))
    batch = run.collect(0)
    known = affine(run.model, SDE, run.sigmas)
    for step, dense, total in zip(batch.steps, *correlations(SDE), strict=True):
        _, mean, std = known[step.interval.index]
        noise = (step.latents_next - mean * step.latents)[:, 0] / std
        both = torch.stack([batch.advantages[:, step.interval.index], batch.scores.total, noise]).double()
        to_gain, to_reward = torch.corrcoef(both)[2, :2].tolist()
        assert to_gain == pytest.approx(dense, abs=5 * (1 - dense**2) / math.sqrt(count) + 1e-4)
        assert to_reward == pytest.approx(total, abs=5 / math.sqrt(count))


PLANS = [
    Sampling(AllSteps(SDE), 2, 4, 4, 5, STEPS, 1.0),
    Sampling(Window(SDE, 2, 3), 2, 4, 4, 64, STEPS, 1.0),
    Sampling(AllSteps(SDE, shared_noise=True), 4, 3, 2, 64, STEPS, 1.0),
    Sampling(RandomSteps(SDE, 3), 2, 4, 4, 64, STEPS, 1.0),
]


@pytest.mark.parametrize("count", [None, 2])
@pytest.mark.parametrize("sampling", PLANS, ids=["all", "window", "shared", "random"])
def test_a_run_takes_no_more_rows_than_it_needs(sampling, count, tmp_path):
    run = trainer(tmp_path / "run", sampling, completion_steps=count, epochs=2, step_fraction=0.7)
    run.train(report=False)
    for epoch, row in zip(looked_at(run), rows(tmp_path / "run"), strict=True):
        assert (row["rows/forward"], row["rows/gradient"]) == (row["floor/forward"], row["floor/gradient"])
        assert floor_rows(run, epoch) == spent_rows(run, epoch, geometry(run))
        assert row["ratio_max"] == 0
    names = [name for name in row if name.startswith("reward/completed_")]
    assert len(names) == len(run.completed_steps(epoch.path))


def test_the_floor_of_all_steps_is_the_paper_s(tmp_path):
    """T (T - 1) / 2 calls of completions beside the T of the rollout."""
    run = trainer(tmp_path / "run", PLANS[0])
    epoch = run.collection.epoch(0)
    assert run.collection.scoring_rows(epoch).forward == 8 * 45
    assert run.needed(epoch).forward == 8 * 55
    assert run.needed(epoch).gradient == 8 * 10


def test_padding_is_counted_by_the_check(tmp_path):
    run = dense_job(
        tmp_path / "run",
        sampling=Sampling(AllSteps(SDE), 3, 3, 2, 4, 3, 2.0),
        calibration=None,
        epochs=1,
        evaluation=Evaluation(),
    )
    spent = spent_rows(run, run.collection.epoch(0), geometry(run))
    run.train(report=False)
    row = rows(tmp_path / "run")[-1]
    assert (spent.forward, spent.gradient) == (row["rows/forward"], row["rows/gradient"])


def test_a_check_tries_completions_too_and_leaves_the_trainer_as_it_was(tmp_path):
    run = dense_job(tmp_path / "run", evaluation=Evaluation(), epochs=1)
    found = inspect(run, tmp_path / "out")
    assert not found.errors, found.problems
    assert found.trial is not None
    assert found.trial.learning.off == 0
    assert found.trial.rollouts.advantages.shape == (4,)
    assert len(found.trial.rollouts.pixels) == 4  # of the samples, not of their completions
    ((spent, floor),) = found.rows
    assert spent == floor == run.needed(run.collection.epoch(0))
    assert run.state == State()


def test_the_other_steps_of_a_window_are_held_against_nothing(tmp_path):
    """The ODE steps behind it gain nothing: its last gain leads to the sample itself."""
    run = trainer(tmp_path / "run", PLANS[1])
    values = completed_rewards_of(run.collect(0).scores)
    assert values.shape == (8, 4)
    whole = trainer(tmp_path / "x", Sampling(ChosenSteps(SDE, (2, 3, 4)), 2, 4, 4, 64, STEPS, 1.0), completion_steps=9)
    assert torch.equal(completed_rewards_of(whole.collect(0).scores), values)


def test_a_group_s_shared_start_has_one_completion(tmp_path):
    run = trainer(tmp_path / "run", PLANS[2])
    batch = run.collect(0)
    first = batch.scores.parts["completed_000"].view(4, 3)
    assert torch.equal(first, first[:, :1].expand(4, 3))
    assert len(first[:, 0].unique()) == 4
    values = completed_rewards_of(batch.scores)
    expected = step_advantages(gains(values), batch.group_ids)
    assert torch.equal(batch.advantages, expected)
    told = run.model.encode([""] * 4)
    (step, *_) = batch.steps
    ends = resume(run.model, told, step.latents, step.interval.sigma, run.sigmas)
    torch.testing.assert_close(first[:, 0], ends[:, 0])


def sometimes(media: Media, prompts: Prompts) -> Tensor:
    values = level(media, prompts).clone()
    return values.where(values < 1.5, torch.nan)


def test_a_sample_with_a_completion_that_cannot_be_scored_is_not_valid(tmp_path):
    run = trainer(tmp_path / "run", reward=sometimes, on_invalid="drop")
    scores = run.collect(0).scores
    values = completed_rewards_of(scores)
    assert torch.equal(scores.valid, ~values.isnan().any(1))
    assert scores.total[~scores.valid].isfinite().any()


class Rank(FunctionReward):
    card = Card(scope="group")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": Sampling(FanOut(SDE, (1,)), 2, 4, 2, steps=STEPS)}, "FanOut.*trainers.FlowGRPO"),
        ({"sampling": Sampling(ChosenSteps(SDE, (1,), True), 2, 4, 2, steps=STEPS)}, "one stochastic step"),
        ({"completion_steps": 0}, "completion_steps must lie in 1 ... 10"),
        ({"completion_steps": 11}, "completion_steps must lie in 1 ... 10"),
        (
            {"sampling": Sampling(AllSteps(CPS(), False), 2, 4, 2, 64, STEPS, 1.0), "calibration": Calibration()},
            "calibration moves the g of an SDE, and CPS",
        ),
    ],
)
def test_what_cannot_work_together_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", **changes)


def test_a_reward_that_compares_samples_is_refused(tmp_path):
    sampling = Sampling(AllSteps(SDE), 2, 4, 8, 64, STEPS, 1.0)
    with pytest.raises(ValueError, match="a gain is the difference of two rewards of one sample"):
        DenseGRPO(GaussianModel(), Rank(level), ["x"], sampling, folder=str(tmp_path / "run"))


def outcome(values: Tensor) -> Tensor:
    return values[:, -1:].expand(-1, values.shape[1] - 1).double()


def alike(rewards: Tensor, group_ids: Tensor) -> Tensor:
    return group_advantages(rewards, group_ids, eps=1e-4).float()


def test_with_the_outcome_as_every_step_s_reward_it_is_flow_grpo(tmp_path):
    """The same rollouts, ratios and policy, to the last bit."""
    reward = FunctionReward(redness)
    changes: dict[str, Any] = {"epochs": 1, "reward": reward, "evaluation": Evaluation(), "advantages": alike}
    dense = dense_job(tmp_path / "a", calibration=None, step_rewards=outcome, **changes)
    flow = job(tmp_path / "b", **changes)
    for run in (dense, flow):
        run.train(report=False)
    for name, value in flow.model.trainable().items():
        assert torch.equal(dense.model.trainable()[name], value), name

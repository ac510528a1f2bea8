"""The calibration of the noise: when gains are balanced, how the table moves, and that training keeps it."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.models.gaussian import GaussianModel
from flowalign.records import intervals
from flowalign.rollout import resume
from flowalign.schedules import AllSteps, ChosenSteps, Window
from flowalign.transitions import ODE, DanceSDE, FlowSDE, TableSDE, Transition
from tests.jobs import rows
from tests.test_dense_grpo import STEPS, trainer
from trainers import BinomialBalance, Calibration, CountBalance, FractionBalance, Sampling
from trainers.noise_calibration import noise_table

SDE = FlowSDE(0.7)
WINDOW = Sampling(Window(SDE, 2, 3), 2, 4, 4, 64, STEPS, 1.0)


@pytest.mark.parametrize(
    ("balance", "counts", "expected"),
    [
        (CountBalance(2), (12, 11), True),
        (CountBalance(2), (13, 11), False),
        (CountBalance(2), (0, 0), True),
        (BinomialBalance(0.05), (0, 0), True),
        (BinomialBalance(0.05), (17, 7), True),  # p = .064
        (BinomialBalance(0.05), (18, 6), False),  # p = .023
        (BinomialBalance(0.05), (6, 18), False),
        (FractionBalance(0.2), (59, 41), True),
        (FractionBalance(0.2), (41, 61), True),
        (FractionBalance(0.2), (60, 40), False),
    ],
)
def test_when_gains_are_balanced(balance, counts, expected):
    assert balance(*counts) is expected


@pytest.mark.parametrize(("rollouts", "share"), [(4, 0.375), (24, 0.161), (192, 0.058), (1024, 0.025)])
def test_how_often_the_paper_s_rule_takes_fair_coins_to_be_balanced(rollouts, share):
    rises = sum(math.comb(rollouts, k) for k in range(rollouts + 1) if CountBalance(2)(k, rollouts - k))
    assert rises / 2**rollouts == pytest.approx(share, abs=5e-4)


def test_the_paper_s_rule_takes_noise_away_from_a_balanced_step_and_a_test_does_not():
    """Exact drift in units of the amount over 24 fair coins: -.68 a round, and +.93."""
    drift = {}
    for balance in (CountBalance(2), BinomialBalance(0.05)):
        rises = sum(math.comb(24, k) / 2**24 for k in range(25) if balance(k, 24 - k))
        drift[balance] = 2 * rises - 1
    assert drift[CountBalance(2)] == pytest.approx(-0.678, abs=2e-3)
    assert drift[BinomialBalance(0.05)] == pytest.approx(1 - 2 * 0.0227, abs=2e-3)


def antithetic(reward: Any, noise: float, at: int = 4) -> Tensor:
    """Gains of a step from a point whose predicted noise is 0, under pairs of noise +e and -e."""
    model = GaussianModel()
    rule, interval = DanceSDE(noise), intervals(model.grid)[at]
    start = torch.zeros(64, 1)
    velocity = model.velocity(start, interval.sigma, model.encode([""] * 64))
    eps = torch.randn(32, 1, generator=torch.Generator().manual_seed(0))
    mean, std = rule(start, velocity, interval)
    told = model.encode([""] * 64)
    ends = resume(model, told, mean + std * torch.cat([eps, -eps]), interval.sigma_next, model.grid)
    return (reward(ends) - reward(resume(model, told, start, interval.sigma, model.grid))).detach()


@pytest.mark.parametrize("balance", [CountBalance(), BinomialBalance(), FractionBalance()], ids=str)
def test_a_linear_reward_raises_the_noise_and_one_that_peaks_on_the_ode_path_lowers_it(balance):
    settings = Calibration(balance=balance, amount=0.05, lowest=0.4, highest=1.5)
    for reward, bound in ((lambda x: x, 1.5), (lambda x: -(x**2), 0.4)):
        noise = [0.7]
        for _ in range(12):
            (counts,) = settings.counts(antithetic(reward, noise[-1]))
            noise.append(settings.moved(noise[-1], 0.7, counts))
        moves = [b - a for a, b in itertools.pairwise(noise)]
        assert all(move >= 0 if bound > 1 else move <= 0 for move in moves)
        assert moves[0] == pytest.approx(0.05 if bound > 1 else -0.05)
        assert noise[-1] == pytest.approx(bound * 0.7)


def test_gains_within_the_tolerance_count_as_neither():
    found = Calibration(tolerance=0.1).counts(torch.tensor([[0.2, -0.1], [-0.3, 0.1], [0.05, -0.11]]))
    assert found == [(1, 1), (0, 1)]


def test_calibration_moves_the_table_that_training_then_keeps(tmp_path):
    """By the rule, round for round; it starts from the plan's noise, and every epoch has what it came to."""
    settings = Calibration(rounds=3, groups=2, amount=0.02, balance=FractionBalance(0.5))
    run = trainer(tmp_path / "run", WINDOW, calibration=settings, epochs=2)
    seen: list[tuple[Transition, ...]] = []
    begin = run.collection.begin
    run.collection.begin = lambda *rest: seen.append(rest[0].path.transitions) or begin(*rest)  # type: ignore
    run.train(report=False)
    told = json.loads((tmp_path / "run" / "noise.json").read_text())
    assert told["start"] == pytest.approx(noise_table(WINDOW.plan.resolve(STEPS, 0, 0), run.sigmas))
    assert len(told["rounds"]) == 3
    table = list(told["start"])
    for row in told["rounds"]:
        assert row["steps"] == [2, 3, 4]
        for step, more, fewer in zip(row["steps"], row["positive"], row["negative"], strict=True):
            assert more + fewer == 8
            table[step] = settings.moved(table[step], told["start"][step], (more, fewer))
        assert row["table"] == table
    assert told["table"] == table
    assert table != told["start"]
    assert {step for path in seen for step in path if not isinstance(step, ODE)} == {TableSDE(tuple(table))}
    assert run.state.noise == told
    assert rows(tmp_path / "run")[0]["rows/forward"] == rows(tmp_path / "run")[0]["floor/forward"]


def test_the_start_of_the_table_is_the_plan_s_noise():
    sigmas = GaussianModel().grid
    table = noise_table(ChosenSteps(SDE, (3, 5)).resolve(STEPS, 0, 0), sigmas)
    assert table[3] == pytest.approx(0.7 * math.sqrt(sigmas[3] / (1 - sigmas[3])))
    assert table[1] == pytest.approx(0.7 * math.sqrt(sigmas[1] / (1 - sigmas[1])))
    assert noise_table(AllSteps(TableSDE(table)).resolve(STEPS, 0, 0), sigmas) == pytest.approx(table)

"""AWM: its loss against recorded numbers, weighted regression as its limit, where it leads, and its network calls."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.models.gaussian import GaussianModel
from flowalign.objectives import clipped_policy_loss
from flowalign.transitions import ODE
from tests.jobs import rows
from tests.test_flow_grpo import law, level, nothing
from tests.test_nft import INPUTS, RECORDED, STEPS, half, recorded_input, settings
from tests.test_shipped_configs import resolved
from trainers import Optimizer, Sampling
from trainers.awm import AWM, by_t, by_t_squared, ghuber, huber, matching_log_probs, uniform, unit_advantages
from trainers.forward_advantages import on_policy
from trainers.preflight import inspect
from trainers.preflight.geometry import floor_rows, geometry, looked_at, spent_rows

WEIGHTINGS = {"Uniform": uniform, "t": by_t, "t**2": by_t_squared, "huber": huber, "ghuber": ghuber}


def trainer(folder: Path, updates: int = 1, epochs: int = 1, **changes: Any) -> AWM:
    return AWM(**{"reward": level, **settings(folder, updates, epochs), **changes})


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_recorded_numbers(name, tmp_path):
    made = trainer(tmp_path, weighting=WEIGHTINGS[name], clip_range=1e-4, kl_coef=0.0)
    noised = recorded_input(INPUTS["advantages"], 0.0)
    assert noised.older is not None
    for velocity, key in ((noised.velocity, "log_prob_new"), (noised.older, "log_prob_old")):
        found = matching_log_probs(velocity, noised.target, noised.sigma, made.weighting)
        torch.testing.assert_close(found.detach(), RECORDED[f"awm/{name}/{key}"], atol=1e-6, rtol=0)
    loss = made.loss(noised).mean()
    torch.testing.assert_close(loss.detach(), RECORDED[f"awm/{name}/loss"], atol=1e-6, rtol=0)
    loss.backward()
    assert noised.velocity.grad is not None
    torch.testing.assert_close(
        noised.velocity.grad.flatten(1).norm(dim=1), RECORDED[f"awm/{name}/grad_norm"], atol=1e-7, rtol=1e-5
    )


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("clip", [1e-4, math.inf])
def test_on_policy_it_is_regression_weighted_by_the_advantage(name, clip, tmp_path):
    """To the last bit, and whatever the clip range: the ratio is 1."""
    made = trainer(tmp_path, weighting=WEIGHTINGS[name], clip_range=clip, kl_coef=0.0)
    gradients = []
    for weigh in (False, True):
        velocity = INPUTS["v_new"].clone().requires_grad_()
        target = INPUTS["noise"] - INPUTS["x0"]
        new = matching_log_probs(velocity, target, INPUTS["t"], made.weighting)
        loss = -INPUTS["advantages"] * new
        if not weigh:
            loss = clipped_policy_loss(new, new.detach(), INPUTS["advantages"], clip)
        loss.sum().backward()
        gradients.append(velocity.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 1e-5


def test_errors_weigh_by_hand():
    errors, t = torch.tensor([4.0, 0.0]), torch.tensor([0.5, 0.25])
    assert uniform(errors, t).tolist() == [-4, 0]
    assert by_t(errors, t).tolist() == [-2, 0]
    assert by_t_squared(errors, t).tolist() == [-1, 0]
    assert huber(errors, t).tolist() == pytest.approx([-0.5 * (2 - 1e-5), 0], abs=1e-6)
    assert ghuber(errors, t).tolist() == pytest.approx([-0.5 * (math.sqrt(2) - 1e-10**0.25) * 4, 0], abs=1e-6)


@pytest.mark.parametrize("weighting", [uniform, ghuber])
@pytest.mark.parametrize("updates", [1, 2])
def test_the_mean_moves_to_where_the_reward_is_higher(weighting, updates, tmp_path):
    made = trainer(
        tmp_path,
        updates,
        3,
        weighting=weighting,
        clip_range=10.0,
        kl_coef=0.0,
        optimizer=Optimizer(0.05, ema_decay=0.0),
    )
    made.train(report=False)
    assert isinstance(made.model, GaussianModel)
    assert law(made.model, ODE())[0] > 0.05


def test_equal_rewards_move_nothing(tmp_path):
    made = trainer(tmp_path, 2, 2, reward=nothing, kl_coef=0.0)
    made.train(report=False)
    assert not any(value.detach().any() for value in made.model.trainable().values())


CASES = [  # optimizer steps an epoch, settings, and how many of all steps read the older policy
    (1, {}, 0),
    (2, {}, 2),
    (1, {"older_coef": 1.0}, 0),
    (1, {"older_coef": 1.0, "decay": half}, 1),
    (1, {"sample_older": True, "decay": half}, 1),
    (2, {"sample_older": True, "decay": half}, 3),
]


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize(("updates", "changes", "older"), CASES)
def test_the_older_policy_and_the_reference_are_called_only_where_they_are_needed(
    updates, changes, older, kl, tmp_path
):
    made = trainer(tmp_path, updates, 2, kl_coef=kl, **changes)
    made.train(report=False)
    told, noised = [row for row in rows(tmp_path) if "loss" in row], 16 * STEPS
    expected = 2 * noised + older * noised // updates + 2 * noised * (kl > 0)
    assert sum(row["rows/forward"] for row in told) == expected
    for row, epoch in zip(told, looked_at(made), strict=True):
        assert (row["rows/forward"], row["rows/gradient"]) == (row["floor/forward"], row["floor/gradient"])
        assert floor_rows(made, epoch) == spent_rows(made, epoch, geometry(made))


def test_later_steps_have_ratios_to_the_policy_that_the_epoch_starts_with(tmp_path):
    """A step so large that the second one's ratios all leave a narrow range on the side that was asked for."""
    common: dict[str, Any] = {"kl_coef": 0.0, "weighting": uniform, "optimizer": Optimizer(0.5, ema_decay=0.0)}
    clipped = []
    for name, updates in (("one", 1), ("two", 2)):
        trainer(tmp_path / name, updates, 1, clip_range=1e-6, **common).train(report=False)
        clipped.append(next(row["clip_fraction"] for row in rows(tmp_path / name) if "loss" in row))
    assert clipped[0] == 0
    assert clipped[1] > 0.4  # of both steps' mean


@pytest.mark.parametrize("sample_older", [False, True])
def test_the_older_policy_is_a_distance_and_draws_samples_only_where_it_is_asked_to(sample_older, tmp_path):
    made = trainer(tmp_path, older_coef=3.0, decay=half, sample_older=sample_older, kl_coef=0.0, clip_range=math.inf)
    noised = recorded_input(INPUTS["advantages"], 0.0)
    assert noised.older is not None
    made.state.epoch = 1
    new, old = (
        matching_log_probs(one, noised.target, noised.sigma, made.weighting) for one in (noised.velocity, noised.older)
    )
    ratio = (new - (old if sample_older else new)).exp()
    apart = (noised.velocity - noised.older).square().flatten(1).mean(1)
    torch.testing.assert_close(made.loss(noised), -noised.credit * ratio + 3 * apart)


def test_credit_is_within_one():
    rewards, groups = torch.tensor([0.0] * 99 + [1e3]), torch.zeros(100, dtype=torch.int64)
    found = unit_advantages(rewards, groups)
    assert found.max() == 1
    assert found[:99].tolist() == pytest.approx([-1 / math.sqrt(99) / 5] * 99, rel=1e-3)


def test_a_check(tmp_path):
    found = inspect(trainer(tmp_path / "run", 2, 2), tmp_path / "out")
    assert not found.errors, found.problems
    texts = [one.text for one in inspect(trainer(tmp_path / "flat", reward=nothing), tmp_path / "flat out").problems]
    assert any(text.startswith("the first group has nothing to learn from") for text in texts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_range": 0.0}, "clip_range must be positive and older_coef at least 0, got 0.0"),
        ({"older_coef": -1.0}, "clip_range must be positive and older_coef at least 0"),
        ({"updates_per_epoch": 2, "decay": half, "older_coef": 1.0}, "samples are drawn by the policy that an epoch"),
        ({"decay": half, "epochs": 2}, "nothing reads it: give older_coef or sample_older"),
        ({"sampling": Sampling(group_size=1)}, "group_size must be at least 2: an advantage compares the samples"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)


@pytest.mark.parametrize(
    ("short", "groups", "kl", "first"), [("pickscore", 24, 1e-4, 0), ("geneval", 72, 1e-3, 1), ("ocr", 72, 3e-3, 1)]
)
def test_published_settings(short, groups, kl, first):
    config = resolved(f"awm/sd3.5_{short}.yaml")
    assert (config["kl_coef"], config["older_coef"], config["clip_range"]) == (kl, 1.0, 1.0)
    assert (config["updates_per_epoch"], config["sample_older"], config["guidance_scale"]) == (1, False, 1.0)
    assert config["decay"] == "trainers.forward_advantages.rising_to_three_tenths"
    assert config["times"] == {
        "class": "trainers.StratifiedTimes", "draws": 6, "first": first, "share": 0.9
    }  # fmt: skip
    assert [config["sampling"][key] for key in ("groups", "group_size", "steps")] == [groups, 24, 14]
    assert (config["optimizer"]["learning_rate"], config["optimizer"]["ema_decay"]) == (3e-4, 0.99)


def test_the_defaults_take_the_policy_itself(tmp_path):
    made = trainer(tmp_path)
    assert made.decay is on_policy
    assert not made.reads_older(5, 0)
    assert made.reads_older(5, 1)
    assert not isinstance(made.penalty(recorded_input(INPUTS["advantages"], 1.0)), float)
    assert isinstance(made.advantages(torch.tensor([0.0, 1.0]), torch.tensor([0, 0])), Tensor)

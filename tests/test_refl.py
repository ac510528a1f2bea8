"""ReFL: the hinge, its one late step, and that it learns where there is something to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.gradient_plans import LateStep
from flowalign.schedules import flow_match_euler
from rewards.base import FunctionReward
from tests.jobs import rows
from tests.test_draft import CENTRE, GRID, Plane, gradient, nearness
from tests.test_instruct_video import COLOURS, Drawing, pictures
from trainers import Checkpoints, Evaluation, Optimizer, ReFL, Sampling
from trainers.preflight import inspect
from trainers.refl import hinge


def trainer(folder: Path, plan: LateStep = LateStep(2, 4), **changes: Any) -> ReFL:
    sampling = Sampling(plan, 32, 1, 32, 32, 5, 1.0)
    settings: dict[str, Any] = {
        "optimizer": Optimizer(0.03, ema_decay=0.0), "coefficient": 1.0, "checkpoints": Checkpoints(minutes=0),
    }  # fmt: skip
    model = changes.pop("model", None) or Plane()
    reward = FunctionReward(nearness, differentiable=True)
    return ReFL(model, reward, ["x"], sampling, folder=str(folder), **settings | changes)


def test_the_hinge_has_no_gradient_from_the_margin_on():
    rewards = torch.tensor([-1.0, 1.5, 2.0, 3.0], requires_grad=True)
    losses = hinge(rewards, 2.0)
    assert losses.tolist() == [3.0, 0.5, 0.0, 0.0]
    (slopes,) = torch.autograd.grad(losses.sum(), rewards)
    assert slopes.tolist() == [-1.0, -1.0, 0.0, 0.0]


def test_a_policy_that_has_reached_the_margin_gets_no_gradient(tmp_path):
    assert not gradient(trainer(tmp_path, margin=-100.0)).any()
    assert gradient(trainer(tmp_path, margin=2.0)).any()


def test_the_default_is_the_authors(tmp_path):
    made = ReFL(
        Plane([*torch.linspace(1, 0, 41).tolist()]), FunctionReward(nearness, True), ["x"], folder=str(tmp_path)
    )
    assert (made.margin, made.coefficient, made.optimizer.settings.learning_rate) == (2.0, 1e-3, 1e-5)
    assert (made.sampling.steps, made.sampling.guidance_scale) == (40, 1.0)
    assert {made.collection.epoch(number).path.gradient_from for number in range(300)} == {*range(30, 40)}


@pytest.mark.parametrize("step", [2, 3, 4])
def test_its_gradient_is_that_of_x0hat_at_the_late_step(step, tmp_path):
    """d x0hat / d bias = -sigma, d loss / d x0hat = 2 (x0hat - c) coefficient; no other step has any."""
    made = trainer(tmp_path, LateStep(step, step), margin=2.0, coefficient=0.5)
    epoch = made.collection.epoch(0)
    draw = made.collection.draw(epoch, [*range(32)])
    jumped: Tensor = made.rollout(epoch, draw, made.sigmas).latents.detach()
    found = gradient(made)[len(GRID) :].view(len(GRID), 2)
    expected = torch.zeros(len(GRID), 2)
    expected[step] = (0.5 * 2 * (jumped - CENTRE) * -GRID[step]).mean(0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_it_learns_until_the_margin_and_no_further(tmp_path):
    made = trainer(tmp_path, LateStep(2, 2), margin=-0.5, epochs=40, optimizer=Optimizer(0.2, ema_decay=0.0, decay=40))
    made.train(report=False)
    told = [row for row in rows(tmp_path) if "reward" in row]
    assert told[0]["reward"] < -2
    assert told[0]["satisfied"] < 0.5
    assert told[-1]["reward"] > -0.6
    assert told[-1]["satisfied"] > 0.7
    assert told[-1]["loss"] == pytest.approx(0.0, abs=0.1)


def test_the_check_tells_that_nothing_is_left_to_learn(tmp_path):
    made = trainer(tmp_path / "run", margin=-100.0, evaluation=Evaluation(["x"] * 30), epochs=1)
    texts = [f"{one.kind}: {one.text}" for one in inspect(made, tmp_path / "out").problems]
    assert any(text.startswith("warning: the first losses and their gradient are exactly 0") for text in texts)


def test_a_coefficient_that_trains_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="coefficient must be positive and pretraining at least 0"):
        trainer(tmp_path, coefficient=0.0)


def test_the_pretraining_loss_is_drawn_for_every_optimizer_step(tmp_path):
    """At a point of the grid but its end, where there is no noise left."""
    sampling = Sampling(LateStep(2, 4), 3, 1, 3, 3, 5, 1.0)
    reward, prompts = FunctionReward(nearness, differentiable=True), str(pictures(tmp_path))
    made = ReFL(Drawing(), reward, prompts, sampling, folder=str(tmp_path / "run"), margin=-100.0, pretraining=1.0)
    places = list[int]()
    for part in range(40):
        made.state.part = part
        places += gradient(made)[len(GRID) :].view(len(GRID), 2).any(1).nonzero().flatten().tolist()
    assert len(places) == 40
    assert {*places} == {*range(len(GRID) - 1)}


def test_a_late_step_is_not_told_to_be_tiny(tmp_path):
    """The last one of such a grid is drawn only now and then."""
    assert trainer(tmp_path, LateStep(4, 4), model=Plane(flow_match_euler(5, 3.0))).remarks() == ()


def test_the_pretraining_loss_is_the_flow_s_own(tmp_path):
    """Its gradient in the policy's shift at the drawn point is 2 mu (v - (e - x0)) / d, and no other point has any."""
    folder, changes = tmp_path / "run", {"margin": -100.0, "pretraining": 3.0}
    sampling = Sampling(LateStep(2, 4), 6, 1, 4, 4, 5, 1.0)
    reward, prompts = FunctionReward(nearness, differentiable=True), str(pictures(tmp_path))
    made = ReFL(Drawing(), reward, prompts, sampling, folder=str(folder), epochs=1, **changes)
    found = gradient(made)[len(GRID) :].view(len(GRID), 2)
    epoch = made.collection.epoch(0)
    draw = made.collection.draw(epoch, [*range(6)])
    (place,) = found.any(1).nonzero().flatten().tolist()
    clean = torch.tensor([COLOURS[int(text.split()[1])][:2] for text in draw.told.text]) / 255
    noise = made.collection.noise(epoch, draw.samples, "pretraining", 0)
    noised = (1 - GRID[place]) * clean + GRID[place] * noise
    velocity = made.model.network(noised, GRID[place], draw.condition).detach()
    expected = (3.0 * 2 * (velocity - (noise - clean)) / 2).mean(0)  # of two elements
    torch.testing.assert_close(found[place], expected, rtol=1e-4, atol=1e-6)
    made.train(report=False)
    (row,) = [row for row in rows(folder) if "reward" in row]
    assert row["floor/gradient"] == 6 + 6

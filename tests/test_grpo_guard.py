"""GRPO-Guard on the closed-form model: what its ratio is, what is clipped, what its gradients are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.models.gaussian import GaussianModel
from flowalign.records import Media, Prompts, expand_rows, intervals
from flowalign.rollout import Replay, replay
from flowalign.schedules import AllSteps, FanOut, Plan, Window, linear
from flowalign.step_weights import inverse_dt, spread_of
from flowalign.transitions import (
    CPS,
    DanceSDE,
    FlowSDE,
    gaussian_log_prob,
    squared_error_log_prob,
    sum_of_elements,
)
from trainers import Optimizer, Sampling
from trainers.grpo_guard import GRPOGuard
from trainers.update import Update

SDE = FlowSDE(0.7)


def level(media: Media, prompts: Prompts) -> Tensor:
    return media.pixels[:, 0, 0, 0]


def trainer(plan: Plan = Window(SDE, 0, 3), dims: int = 5, steps: int = 10, **changes: Any) -> GRPOGuard:
    settings: dict[str, Any] = {
        "sampling": Sampling(plan, groups=3, group_size=4, batch_size=6, steps=steps, guidance_scale=1.0),
        "optimizer": Optimizer(0.01, weight_decay=0.0, ema_decay=0.0),
        "clip_range": 1e-2,
    }
    return GRPOGuard(GaussianModel(1.0, dims=dims, grid=linear(steps)), level, ["x", "y"], **settings | changes)


def moved(run: GRPOGuard, far: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(3)
    for value in run.model.trainable().values():
        value.data = far * torch.randn(value.shape, generator=generator)


def replays(run: GRPOGuard, far: float = 0.1) -> list[tuple[Replay, Tensor, Tensor]]:
    """Each step under the present policy with its old mean, its old log-probs, and the noise that was drawn."""
    batch = run.collect(0)
    before, found = [value.detach().clone() for value in run.model.trainable().values()], []
    moved(run, far)
    update, epoch = Update(run, batch, None), run.collection.epoch(0)
    samples = expand_rows(torch.arange(len(epoch.rows)), epoch.members)
    for step in batch.steps:
        told = batch.condition(run.model, range(len(epoch.rows)))
        at = torch.arange(len(epoch.rows)).repeat_interleave(len(step.latents) // len(epoch.rows))
        transition = batch.path.transitions[step.interval.index]
        new = replay(run.model, step, transition, told.rows(at), run.policy)
        noise = run.collection.draw(epoch, range(len(epoch.rows))).step_noise(step.interval.index)
        old_mean = update._old_mean(step, new.std, samples)
        found.append((replace(new, old_mean=old_mean), step.log_probs, noise))
        for value, held in zip(run.model.trainable().values(), before, strict=True):
            value.data = held
        true = replay(run.model, step, transition, told.rows(at), run.policy)
        torch.testing.assert_close(old_mean, true.mean, atol=1e-6, rtol=1e-6)
        moved(run, far)
    return found


@pytest.mark.parametrize(
    "plan",
    [Window(SDE, 0, 3), Window(SDE, 0, 3, shared_noise=True), FanOut(SDE, (2,)), Window(CPS(0.7), 4, 2)],
    ids=repr,
)
def test_its_ratio_is_the_average_of_noise_times_how_far_the_mean_has_moved(plan: Plan):
    run = trainer(plan)
    for new, old_log_probs, noise in replays(run):
        assert new.old_mean is not None
        expected = (noise * (new.mean - new.old_mean)).mean(1)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(run._ratio(new, old_log_probs).log(), expected, atol=2e-6, rtol=1e-4)


def test_on_the_policy_that_has_sampled_it_is_exactly_1():
    run = trainer(updates_per_epoch=1)
    metrics = run.update(run.collect(0))
    assert metrics["ratio_max"] == 0
    assert metrics["clip_fraction"] == 0


def test_its_average_is_1_where_the_plain_ratio_s_is_below():
    """Over many samples: eps is independent of the move, whose square the plain log-ratio loses."""
    run = trainer(Window(SDE, 6, 1), dims=2)
    run.sampling = replace(run.sampling, groups=2, group_size=1500, batch_size=3000)
    run.collection = run.collector(run.reward)
    (new, old_log_probs, _), *_ = replays(run, 0.7)
    assert new.old_mean is not None
    bias = (new.mean - new.old_mean).square().mean() / (2 * new.std**2)
    plain = (new.log_probs - old_log_probs).mean()
    guarded = run._ratio(new, old_log_probs).log().mean()
    assert plain.item() == pytest.approx(-bias.item(), rel=0.2)
    assert abs(guarded.item() / new.std) < 0.2 * bias


def test_its_gradient_at_the_old_policy_is_the_advantage_times_the_noise():
    """d loss / d mean = -A eps / D."""
    run = trainer()
    batch = run.collect(0)
    step, epoch = batch.steps[1], run.collection.epoch(0)
    noise = run.collection.draw(epoch, range(12)).step_noise(1)
    transition = batch.path.transitions[1]
    velocity = run.model.velocity(step.latents, step.interval.sigma, batch.condition(run.model, range(12)))
    mean, std = transition(step.latents, velocity, step.interval)
    mean = mean.detach().requires_grad_()
    new = Replay(gaussian_log_prob(step.latents_next, mean, std), mean, velocity, std, mean.detach())
    advantages = torch.linspace(-2, 2, 12)
    run.loss(new, step.log_probs, advantages, None, step.interval).sum().backward()
    torch.testing.assert_close(mean.grad, -advantages[:, None] * noise / 5, atol=1e-5, rtol=1e-4)


def test_it_clips_on_the_side_that_the_advantage_asks_for():
    run, clipped = trainer(clip_range=1e-3), 0
    for new, old_log_probs, _ in replays(run):
        ratio = run._ratio(new, old_log_probs)
        for sign in (1.0, -1.0):
            loss = run.loss(new, old_log_probs, torch.full((12,), sign), None, intervals(run.sigmas)[0])
            beyond = sign * (ratio - 1) > run.clip_range
            expected = torch.where(beyond, torch.full_like(ratio, 1 + sign * run.clip_range), ratio)
            torch.testing.assert_close(loss, -sign * expected)
            clipped += int(beyond.sum())
    assert 10 < clipped < 62


def test_the_weights_of_its_steps_undo_their_lengths():
    """What the velocity's move is worth to the mean is the same at all steps of Flow-SDE once divided by |dt|."""
    run = trainer()
    assert run.step_weights is inverse_dt
    grid = intervals(run.sigmas)
    steps = [(SDE, grid[i]) for i in range(1, 9)]
    moves = [std * leverage for std, leverage in (spread_of(*step) for step in steps)]
    worth = [move * weight for move, weight in zip(moves, inverse_dt(steps, [1] * 8), strict=True)]
    assert worth == pytest.approx([1 + 0.7**2 / 2] * 8, rel=1e-5)


def test_two_updates_have_ratios_and_learn():
    run = trainer(AllSteps(SDE, last_step=False), updates_per_epoch=2)
    batch = run.collect(0)
    metrics = run.update(batch)
    assert 0 < metrics["ratio_max"] < 0.1
    assert metrics["approx_kl"] > 0
    assert run.model.bias.detach()[:9].abs().min() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduce": sum_of_elements}, "leave reduce at flowalign.transitions.mean_of_elements"),
        ({"log_prob": squared_error_log_prob}, "and log_prob at gaussian_log_prob"),
        ({"plan": AllSteps(CPS(0.7))}, "step 9 of 10, which ends at sigma 0, has noise of std 0"),
        ({"plan": AllSteps(CPS(0.7)), "steps": 1}, "a rollout of one step has no other"),
    ],
)
def test_what_it_cannot_guard_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        trainer(**changes)


def test_one_update_has_nothing_to_guard_and_says_so():
    assert "updates_per_epoch is 1" in trainer(updates_per_epoch=1).remarks()[0]
    assert trainer(DANCE).remarks() == ()


DANCE = Window(DanceSDE(0.3), 1, 2)

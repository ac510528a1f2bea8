"""Flow-RWR: where its weights lead on the closed-form model, whose optimum is a tilted Gaussian, and what they are."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowalign.gradient_plans import LastSteps
from flowalign.models.gaussian import GaussianModel
from flowalign.randomness import key_noise
from flowalign.records import Media, Prompts, Scores
from flowalign.schedules import linear
from flowalign.transitions import ODE
from tests.jobs import rows, rwr_job
from tests.test_flow_grpo import law, level, nothing
from trainers import Checkpoints, FlowRWR, GridTimes, Optimizer, Sampling, collection, forward_steps
from trainers.batch import parts_of
from trainers.flow_rwr import exponential_over_epoch, exponential_over_group, raw_rewards
from trainers.forward_steps import ForwardSteps, Noised
from trainers.preflight import inspect
from trainers.regression import RegressionTrainer, effective
from trainers.watch import Watch

STEPS, DIMS = 5, 4
VARIANCE = 0.59367  # drawn_from(1.0): of each element of a sample of the start
STD = math.sqrt(VARIANCE / DIMS)  # of what is scored: the mean of a sample's elements


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise from one stream: tests of tens of thousands of samples would mostly wait for keys and their checks."""
    one_stream(monkeypatch)


def one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = np.random.default_rng(0)

    def noise(*key: object, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(stream.standard_normal(shape, dtype=np.float32))

    monkeypatch.setattr(collection, "key_noise", noise)
    monkeypatch.setattr(forward_steps, "key_noise", noise)
    monkeypatch.setattr(forward_steps, "key_generator", lambda *key: stream)


def settings(folder: Path, groups: int, size: int, updates: int = 1, epochs: int = 1) -> dict[str, Any]:
    """A policy that can be every Gaussian of alike elements; each sample is noised at all sigmas."""
    sampling = Sampling(
        groups=groups, group_size=size, batch_size=256, rows_per_call=4096, steps=STEPS, guidance_scale=1
    )
    return {
        "model": GaussianModel(dims=DIMS, grid=linear(STEPS)), "prompts": ["x"],
        "sampling": replace(sampling, guidance_scale=1.0),
        "optimizer": Optimizer(0.05, betas=(0.5, 0.9), weight_decay=0.0, max_grad_norm=1e3, ema_decay=0.0),
        "updates_per_epoch": updates, "times": GridTimes(STEPS), "checkpoints": Checkpoints(minutes=0),
        "folder": str(folder), "epochs": epochs,
    }  # fmt: skip


def converged(made: RegressionTrainer) -> tuple[float, float]:
    """Mean and variance of each element that the policy draws where an epoch's loss is least; and what was aimed at.

    The loss is a parabola in gain and bias at each sigma, so that its gradients at three points tell where that is.
    """
    model, epoch = made.model, made.collection.epoch(0)
    assert isinstance(model, GaussianModel)
    units = made.units(epoch, made.source.draw(epoch, None))
    steps = ForwardSteps(made, epoch, units, None)
    every, size = torch.arange(len(units)), len(epoch.rows) * epoch.members
    noise = key_noise(0, "test", shape=(len(units), STEPS, DIMS))
    steps.noise, steps.sigmas = lambda chosen, draw: noise[chosen, draw], cache(steps.sigmas)

    def slopes(gain: float, bias: float) -> Tensor:
        model.gain.data.fill_(gain)
        model.bias.data.fill_(bias)
        made.optimizer.discard()
        for size_, micro in steps.micro_batches(every, range(size)):
            steps.micro_batch(size_, micro, 1.0, Watch((), 1.0, model.device))
        return torch.stack([model.gain.grad, model.bias.grad])[:, :STEPS].double()  # the grid's end has no policy

    start = slopes(0.0, 0.0)
    curvature = torch.stack([slopes(1.0, 0.0) - start, slopes(0.0, 1.0) - start]).permute(2, 1, 0)
    least = torch.linalg.solve(curvature, -start.T)
    model.gain.data[:STEPS], model.bias.data[:STEPS] = least.T.float()
    return law(model, ODE())


def drawn_from(variance: float) -> float:
    """The variance of what the ODE draws in so few steps where the data have this one."""
    return law(GaussianModel(variance=variance, grid=linear(STEPS)), ODE())[1]


def last(folder: Path) -> dict[str, Any]:
    return next(row for row in reversed(rows(folder)) if "reward" in row)


def positive(media: Media, prompts: Prompts) -> Tensor:
    """0 below 0 and 1 above."""
    return (level(media, prompts) > 0).float()


def test_an_offline_round_of_a_linear_reward_shifts_the_mean_by_the_variance_over_the_temperature(tmp_path, quick):
    """Within 3 %, where the weighted mean of 32,768 samples has an error of 1.2 %.

    A reward of lambda times the sum of the elements shifts each by lambda VARIANCE / tau; here lambda is 1 / DIMS.
    """
    made = FlowRWR(reward=level, temperature=0.5, refresh=0, **settings(tmp_path, 64, 512))
    mean, variance = converged(made)
    assert mean == pytest.approx(VARIANCE / DIMS / 0.5, rel=0.03)
    assert variance == pytest.approx(drawn_from(VARIANCE), rel=0.02)


@pytest.mark.parametrize(
    ("weights", "factor"),
    [(raw_rewards, 2.0), (exponential_over_epoch, 2 * math.tanh(0.5))],
    ids=["raw", "exponential"],
)
def test_the_authors_raw_reward_has_another_optimum(weights, factor, tmp_path, quick):
    """Of 0 below 0 and 1 above: E[x r] / E[r] and E[x e^r] / E[e^r], where E[x; x > 0] = STD / sqrt(2 pi)."""
    mean, _ = converged(FlowRWR(reward=positive, weights=weights, **settings(tmp_path, 2, 4096)))
    assert mean == pytest.approx(STD / math.sqrt(2 * math.pi) * factor, abs=0.012)  # .307 and .142; errors .004


def test_equal_rewards_are_plain_fine_tuning_which_moves_no_mean(tmp_path, quick):
    made = FlowRWR(reward=nothing, **settings(tmp_path, 2, 2048))
    mean, variance = converged(made)
    assert abs(mean) < 0.02  # three errors of the mean of as many samples
    assert variance == pytest.approx(drawn_from(VARIANCE), rel=0.04)


@pytest.mark.parametrize("refresh", [0, 1, 2])
def test_rounds_of_the_present_policy_tilt_further_and_a_frozen_start_s_do_not(refresh, tmp_path, quick):
    """The mean of what each epoch has sampled: a round tilts it by some .3."""
    FlowRWR(reward=level, temperature=0.5, refresh=refresh, **settings(tmp_path, 2, 256, 16, 4)).train(report=False)
    told = [row for row in rows(tmp_path) if "reward" in row]
    assert told[0]["ess"] == pytest.approx(math.exp(-VARIANCE / DIMS / 0.5**2), rel=0.15)
    assert told[0]["reward_aimed_at"] == pytest.approx(VARIANCE / DIMS / 0.5, abs=0.1)
    found = [row["reward"] for row in told]
    expected = {0: [0, 0, 0, 0], 1: [0, 0.28, 0.45, 0.53], 2: [0, 0, 0.33, 0.33]}[refresh]
    assert found == pytest.approx(expected, abs=0.1)


def test_weights_are_exponentials_over_their_mean():
    rewards, groups = torch.tensor([0.0, math.log(3.0), 100.0, 100.0]), torch.tensor([4, 4, 7, 7])
    assert exponential_over_group(rewards, groups).tolist() == pytest.approx([0.5, 1.5, 1.0, 1.0])
    found = exponential_over_epoch(rewards[:3] / torch.tensor([1, 1, 1e9]), torch.tensor([0, 1, 2]))
    assert found.tolist() == pytest.approx([0.6, 1.8, 0.6], rel=1e-5)
    assert exponential_over_group(torch.full((3,), -5e4), torch.zeros(3, dtype=torch.int64)).tolist() == [1.0] * 3
    shifted = exponential_over_group(rewards + groups, groups)  # a constant of a prompt says nothing
    assert shifted.tolist() == pytest.approx(exponential_over_group(rewards, groups).tolist(), rel=1e-5)
    assert raw_rewards(torch.tensor([0.0, 2.0]), groups[:2]).tolist() == [0.0, 2.0]
    with pytest.raises(ValueError, match=r"the lowest is -0\.5 .*Add a constant to the reward"):
        raw_rewards(torch.tensor([1.0, -0.5]), groups[:2])


def test_the_effective_number_of_samples():
    assert effective(torch.tensor([1.0, 1.0, 2.0])) == pytest.approx(16 / 6)
    assert effective(torch.full((7,), 0.3)) == pytest.approx(7)
    assert effective(torch.tensor([0.0, 5.0])) == 1.0
    assert effective(torch.zeros(3)) == 0.0


def test_the_loss_is_the_weighted_error_of_the_velocity(tmp_path):
    made = FlowRWR(reward=level, **settings(tmp_path, 2, 2, 1))
    velocity, target = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [3.0, 1.0]])
    noised = Noised(velocity, target, torch.zeros(2, 2), torch.tensor([0.5, 0.25]), torch.tensor([2.0, 0.5]))
    assert made.loss(noised).tolist() == [2.0 * (1 + 4) / 2, 0.5 * (9 + 1) / 2]


def test_a_network_that_predicts_the_noise_is_trained_on_errors_of_the_noise(tmp_path, monkeypatch):
    made = FlowRWR(reward=level, **settings(tmp_path, 2, 2, 1))
    monkeypatch.setattr(made.model, "training_weights", lambda sigmas: (1 - sigmas).square())
    velocity, target, sigma = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0.1, 0.5, 0.9])
    found = made.loss(Noised(velocity, target, torch.randn(3, 2), sigma, torch.ones(3)))
    eps = (1 - sigma)[:, None] * (velocity - target)  # e_hat - e, at the same x_t
    torch.testing.assert_close(found, eps.square().mean(1))


def holed(media: Media, prompts: Prompts) -> Tensor:
    """No score for what lies below 0."""
    scores = level(media, prompts)
    return scores.where(scores > 0, torch.nan)


def test_samples_without_a_valid_score_have_weight_0_and_are_counted(tmp_path):
    common = settings(tmp_path, 2, 64, 2)
    made = FlowRWR(reward=holed, on_invalid="drop", weights=exponential_over_epoch, **common)
    epoch = made.collection.epoch(0)
    scores = made.source.draw(epoch, None)
    units = made.units(epoch, scores)
    assert units.samples.flatten().tolist() == scores.valid.nonzero().flatten().tolist()
    weights = scores.total[scores.valid].double().exp()
    torch.testing.assert_close(units.credit, (weights / weights.mean()).float())
    share = float(weights.sum()) ** 2 / float(weights.square().sum()) / len(weights)
    assert made.told(units, scores)["ess"] == pytest.approx(share)
    made.state.buffer = {}
    made.train(report=False)
    assert last(tmp_path)["invalid"] == int((~scores.valid).sum()) > 40
    with pytest.raises(ValueError, match=r"scores of epoch 0 are not valid; mend the reward, or set on_invalid: drop"):
        FlowRWR(reward=holed, **settings(tmp_path / "stop", 2, 64, 2)).train()


def test_every_sample_is_taken_in_each_pass_with_noise_of_its_own(tmp_path):
    made = FlowRWR(reward=nothing, passes=3, **settings(tmp_path, 4, 4, 6))
    units = made.units(made.collection.epoch(0), Scores(torch.zeros(16), {}, torch.ones(16, dtype=torch.bool)))
    assert units.samples.flatten().tolist() == [sample for sample in range(16) for _ in range(3)]
    for step in parts_of(len(units), 6, made.seed, 0):
        taken = units.samples[step, 0].tolist()
        assert len(taken) == len({*taken}) == 8
    made.train(report=False)
    told = last(tmp_path)
    assert (told["floor/gradient"], told["floor/forward"]) == (48 * STEPS, 16 * STEPS)


def test_a_few_samples_that_decide_are_told_once(tmp_path, capsys):
    made = FlowRWR(reward=level, temperature=1e-3, **settings(tmp_path / "run", 2, 32, 1, epochs=3))
    texts = [one.text for one in inspect(made, tmp_path / "out").problems]
    assert any(text.startswith("in the first group the weights of 64 samples tell as much as 2") for text in texts)
    capsys.readouterr()
    made.train(report=False)
    said = [line for line in capsys.readouterr().err.splitlines() if "decide what is learned" in line]
    assert len(said) == 1
    assert said[0].startswith("flowalign: epoch 0: the weights of 64 samples")
    assert "Raise temperature (now 0.001)" in said[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0"),
        ({"passes": 0}, "passes must be at least 1 and refresh at least 0, got 0 and 1"),
        ({"refresh": -1}, "passes must be at least 1 and refresh at least 0, got 1 and -1"),
        ({"sampling": Sampling(group_size=1)}, "group_size must be at least 2: alone in its group every sample has"),
        ({"sampling": Sampling(LastSteps(1))}, "says where a reward's gradient flows; FlowRWR looks at where rollouts"),
        ({"updates_per_epoch": 17}, r"updates_per_epoch must lie in 1 \.\.\. 16"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        FlowRWR(**{"reward": level, **settings(tmp_path, 4, 4, 1), **changes})


def test_alone_in_a_group_the_epoch_tells_samples_apart(tmp_path):
    made = FlowRWR(reward=level, weights=exponential_over_epoch, **settings(tmp_path, 64, 1, 1))
    made.train(report=False)
    assert 0 < last(tmp_path)["ess"] < 0.9


def test_guidance_is_of_the_samples_and_the_conditional_velocity_learns(tmp_path):
    """No unconditional call in the update of a run that samples with guidance."""
    made = rwr_job(tmp_path, epochs=1)
    assert (made.policy.guidance_scale, made.guidance_scale) == (2.0, 1.0)
    made.train(report=False)
    told = last(tmp_path)
    sampled = made.sampling.groups * made.sampling.group_size
    assert told["floor/forward"] == 2 * 3 * sampled
    assert told["floor/gradient"] == sampled * made.passes

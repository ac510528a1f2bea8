"""Flow-GRPO on the closed-form model: the optimum of a KL-regularised linear reward is known exactly."""

from __future__ import annotations

import pytest
import torch

from flowalign.advantages import group_advantages
from flowalign.models.gaussian import GaussianModel
from flowalign.records import Media, Prompts, intervals
from flowalign.schedules import AllSteps, FanOut, linear
from flowalign.transitions import CPS, ODE, FlowSDE, Memoryless, Transition, exact_kl, flow_grpo_kl, sum_of_elements
from trainers import FlowGRPO, Optimizer, Sampling
from trainers.batch import summary

STEPS = 12


def level(media: Media, prompts: Prompts) -> torch.Tensor:
    return media.pixels[:, 0, 0, 0]


def nothing(media: Media, prompts: Prompts) -> torch.Tensor:
    return torch.zeros(len(media))


def centred(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """Raw advantages: the reward less its group's mean."""
    return group_advantages(rewards, group_ids, std=lambda r, g: torch.ones_like(r))


def trainer(folder, transition: Transition, reward=level, epochs: int = 100, **changes) -> FlowGRPO:
    settings = {
        "sampling": Sampling(
            AllSteps(transition, last_step=False), 2, 64, batch_size=128, steps=STEPS, guidance_scale=1.0
        ),
        "optimizer": Optimizer(learning_rate=0.15, weight_decay=0.0, max_grad_norm=1e3, ema_decay=0.97, ema_every=1),
        "updates_per_epoch": 1,
        "kl_coef": 1.0,
        "kl": exact_kl,
        "reduce": sum_of_elements,
        "advantages": centred,
    } | changes
    model = GaussianModel(grid=linear(STEPS))
    return FlowGRPO(model, reward, ["x", "y"], epochs=epochs, folder=str(folder), **settings)


def law(model: GaussianModel, transition: Transition) -> tuple[float, float]:
    """Mean and variance that the policy's sampler gives, by the exact affine recursion; its last step is ODE."""
    mean, var = 0.0, 1.0
    for slope, shift, _, std in affine_steps(model, transition):
        mean, var = shift + slope * mean, slope**2 * var + std**2
    return mean, var


def affine_steps(model: GaussianModel, transition: Transition) -> list[tuple[float, float, float, float]]:
    """Slope in x, value at x = 0, slope in the velocity, and std of every step."""
    probe, condition = torch.tensor([[0.0], [1.0]]), model.encode(["", ""])
    steps = []
    for interval in intervals(model.grid):
        rule = ODE() if interval.sigma_next == 0 else transition
        with torch.no_grad():
            velocity = model.velocity(probe, interval.sigma, condition, 1.0)
        (at_0, at_1), std = rule(probe, velocity, interval)
        per_velocity = rule(probe, velocity + 1, interval)[0][0] - at_0
        steps.append(((at_1 - at_0).item(), at_0.item(), per_velocity.item(), std))
    return steps


def optimum(transition: Transition, steps: int = STEPS) -> GaussianModel:
    """The exact optimum of E[x_0] - KL: a step's mean moves by std^2 times the slope of the rest of the sampler."""
    model = GaussianModel(grid=linear(steps))
    rest = 1.0
    for k, (slope, _, per_velocity, std) in reversed(list(enumerate(affine_steps(model, transition)))):
        model.bias.data[k] = std**2 * rest / per_velocity
        rest *= slope
    return model


@pytest.mark.parametrize("transition", [FlowSDE(0.7), pytest.param(Memoryless(), marks=pytest.mark.slow)], ids=str)
def test_training_reaches_the_tilted_law(transition, tmp_path):
    """Base N(0, 1), reward x, KL weight 1. Of five seeds mean and variance came within .04 and .07 of the optimum's."""
    run = trainer(tmp_path / "run", transition)
    run.train()
    with run.optimizer.averaged():
        mean, var = law(run.model, transition)
        ode_mean, _ = law(run.model, ODE())
    best = optimum(transition)
    best_mean, best_var = law(best, transition)
    assert mean == pytest.approx(best_mean, abs=0.07)
    assert var == pytest.approx(best_var, rel=0.12)
    assert ode_mean == pytest.approx(law(best, ODE())[0], abs=0.07)


@pytest.mark.parametrize("transition", [FlowSDE(0.7), Memoryless()], ids=str)
def test_the_optimum_is_the_tilted_law(transition):
    """exp(x) N(0, 1) is N(1, 1), where the sampler that is trained is used again: to order 1 / steps."""
    off = []
    for steps in (STEPS, 40, 640):
        mean, var = law(optimum(transition, steps), transition)
        off.append(max(abs(mean - 1), abs(var - 1)))
    assert off[0] > off[1] > off[2]
    assert off[2] < 0.01


def test_only_the_memoryless_sde_leaves_the_ode_with_the_same_law():
    """With a = 0.7 the velocity that is right for the SDE overshoots when the ODE is sampled; with sqrt 2 it does not.

    The fine-grid limits are 4 / (2 + a^2) = 1.606 and 1; at 40 steps the exact optima give 1.205 and 0.966.
    """
    means = [law(optimum(transition, 40), ODE())[0] for transition in (FlowSDE(0.7), Memoryless())]
    assert means == pytest.approx([1.205, 0.966], abs=1e-3)


@pytest.mark.parametrize("level", [1.0, 2.0])
def test_the_ode_of_what_is_right_for_the_sde_has_its_fine_grid_limit(level):
    """4 / (2 + a^2): 1.333 at a = 1 and .667 at a = 2, which the exact optima come to as steps grow."""
    off = [4 / (2 + level**2) - law(optimum(FlowSDE(level), steps), ODE())[0] for steps in (160, 640)]
    assert 0 < off[1] < off[0] / 2
    assert off[1] < 0.011


def test_without_a_reward_nothing_drifts(tmp_path):
    run = trainer(tmp_path / "run", FlowSDE(0.7), reward=nothing, epochs=3)
    run.train()
    assert not run.model.gain.any()
    assert not run.model.bias.any()


def test_micro_batches_and_their_padding_change_nothing(tmp_path):
    """32 rows in calls of 32, of 8, and of 12 with 4 rows of padding."""
    ends = []
    for size in (32, 8, 12):
        sampling = Sampling(AllSteps(FlowSDE(0.7)), 4, 8, batch_size=size, steps=STEPS, guidance_scale=1.0)
        run = trainer(tmp_path / str(size), FlowSDE(0.7), epochs=2, sampling=sampling)
        run.train()
        ends.append(torch.cat([run.model.gain.detach(), run.model.bias.detach()]))
    assert ends[0].abs().max() > 0.05
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], atol=2e-5, rtol=0)


def test_a_fanned_out_group_shares_its_start_and_differs_by_one_noise(tmp_path):
    sampling = Sampling(FanOut(FlowSDE(0.7), (3,)), 4, 6, batch_size=3, steps=STEPS, guidance_scale=1.0)
    run = trainer(tmp_path / "run", FlowSDE(0.7), sampling=sampling)
    batch = run.collect(0)
    (step,) = batch.steps
    assert step.interval.index == 3
    assert len(step.latents) == 4
    assert step.latents_next.shape == (24, 1)
    assert len(batch.scores.total.unique()) == 24
    # a linear sampler: within a group the reward is an increasing function of the one noise
    for rewards, latents in zip(batch.scores.total.view(4, 6), step.latents_next.view(4, 6), strict=True):
        assert torch.equal(rewards.argsort(), latents.argsort())
    before = run.model.bias.detach().clone()
    run.update(batch)
    assert (run.model.bias.detach() - before).nonzero().flatten().tolist() == [3]


def test_an_epoch_is_a_function_of_seed_and_epoch(tmp_path):
    one, again, other = (trainer(tmp_path / str(i), FlowSDE(0.7), seed=seed) for i, seed in enumerate((5, 5, 6)))
    assert torch.equal(one.collect(3).scores.total, again.collect(3).scores.total)
    assert not torch.equal(one.collect(3).scores.total, one.collect(4).scores.total)
    assert not torch.equal(one.collect(3).scores.total, other.collect(3).scores.total)


def sometimes(media: Media, prompts: Prompts) -> torch.Tensor:
    """The level, which cannot be had for every fifth sample."""
    scores = level(media, prompts)
    scores[::5] = torch.nan
    return scores


def test_scores_that_are_not_valid_stop_the_run_or_are_left_out_and_counted(tmp_path):
    with pytest.raises(ValueError, match="26 of 128 scores of epoch 0 are not valid"):
        trainer(tmp_path / "a", FlowSDE(0.7), sometimes).train()
    run = trainer(tmp_path / "b", FlowSDE(0.7), sometimes, on_invalid="drop")
    batch = run.collect(0)
    assert batch.weights[::5].eq(0).all()
    assert batch.weights.sum() == 102
    for group in (0, 1):
        assert batch.advantages[batch.group_ids == group].sum().item() == pytest.approx(0, abs=1e-4)
    assert summary(batch)["invalid"] == 26
    assert torch.isfinite(torch.tensor(summary(batch)["reward"]))


def third(media: Media, prompts: Prompts) -> torch.Tensor:
    """The level, which cannot be had for one sample of the group of number 1."""
    scores, groups = level(media, prompts), torch.tensor(prompts.groups)
    first = (groups == 1).nonzero().flatten()[:1]
    return scores.index_fill(0, first, torch.nan)


def test_whole_groups_are_left_out_where_asked(tmp_path):
    """What is learned of the other groups is what they would be alone; what cannot be had of all ends the run."""
    sampling = Sampling(AllSteps(FlowSDE(0.7)), groups=3, group_size=4, batch_size=12, steps=STEPS)
    run = trainer(tmp_path / "a", FlowSDE(0.7), third, sampling=sampling, on_invalid="drop_group")
    plain = trainer(tmp_path / "b", FlowSDE(0.7), sampling=sampling, advantages=group_advantages)
    run.advantages = group_advantages
    batch, whole = run.collect(0), plain.collect(0)
    gone = batch.group_ids == 1
    assert gone.sum() == summary(batch)["invalid"] == 4
    assert batch.weights[gone].eq(0).all()
    assert torch.equal(batch.weights[~gone], whole.weights[~gone])
    assert torch.equal(batch.advantages[~gone], whole.advantages[~gone])

    def none(media: Media, prompts: Prompts) -> torch.Tensor:
        return level(media, prompts).where(torch.arange(len(media)) % 4 > 0, torch.nan)

    with pytest.raises(ValueError, match="3 of 12 scores of epoch 0 are not valid, and no group is whole; mend"):
        trainer(tmp_path / "c", FlowSDE(0.7), none, sampling=sampling, on_invalid="drop_group").collect(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": Sampling(AllSteps(ODE()), 2, 8, steps=STEPS)}, "no stochastic step"),
        ({"updates_per_epoch": 300}, "must lie in 1 ... 128"),
        ({"kl_coef": -1.0}, "kl_coef at least 0"),
        (
            {"kl": flow_grpo_kl, "sampling": Sampling(AllSteps(CPS(0.7), last_step=False), 2, 8, steps=STEPS)},
            "flow_grpo_kl is of SDE steps, and the plan's are CPS, .* set kl to flowalign.transitions.exact_kl",
        ),
    ],
)
def test_bad_settings_say_what_to_do(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", FlowSDE(0.7), **changes)


def test_groups_that_share_their_start_are_trained_on_all_steps(tmp_path):
    """One row for a group at the first step, one for each sample after it; the replay is exact at all of them."""
    plan = AllSteps(FlowSDE(0.7), shared_noise=True)
    sampling = Sampling(plan, 4, 6, batch_size=3, steps=STEPS, guidance_scale=1.0)
    run = trainer(tmp_path / "run", FlowSDE(0.7), sampling=sampling, updates_per_epoch=1)
    batch = run.collect(0)
    assert [len(step.latents) for step in batch.steps] == [4] + [24] * (STEPS - 1)
    seen = run.update(batch)
    assert seen["ratio_max"] == 0
    assert run.model.bias.detach()[:STEPS].all(), "each step has learned"

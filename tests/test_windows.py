"""Windows that move, paths of their own for prompts, shortened tails and weights of steps, on the closed-form model."""

from __future__ import annotations

import functools
from pathlib import Path as FilePath
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from flowalign.cli import parse_trainer
from flowalign.config import arguments_of, load_yaml
from flowalign.gradient_plans import LastSteps
from flowalign.models.gaussian import GaussianModel
from flowalign.records import Media, Prompts, intervals
from flowalign.rollout import rollout
from flowalign.schedules import AllSteps, Deterministic, FanOut, Path, Plan, Window, flow_match_euler, linear
from flowalign.step_weights import StepWeights, even_gradients, even_means, inverse_dt, noise_weights
from flowalign.transitions import ODE, FlowSDE, TableSDE
from flowalign.windows import (
    ExponentiallyHastenedWindow,
    Jump,
    LinearlyHastenedWindow,
    PromptWindow,
    RandomWindow,
    RollingWindow,
    ShortTail,
    SlidingWindow,
)
from tests import jobs, processes
from tests.test_shipped_configs import wan_sigmas
from trainers import BestOfN, DenseGRPO, FlowGRPO, Optimizer, Sampling
from trainers.batch import Batch
from trainers.preflight.geometry import geometry, looked_at, planned_steps, spent_rows
from trainers.update import Update

SDE = FlowSDE(0.7)
PROMPTS = ["a", "b", "c", "d", "e", "f", "g"]


def level(media: Media, prompts: Prompts) -> Tensor:
    return media.pixels[:, 0, 0, 0]


def trainer(plan: Plan, kind: type[FlowGRPO] = FlowGRPO, **changes: Any) -> Any:
    """Seven groups of four on ten steps of SD3's grid; odd micro-batches."""
    settings: dict[str, Any] = {
        "sampling": Sampling(plan, groups=7, group_size=4, batch_size=3, rows_per_call=8, steps=10, guidance_scale=1.0),
        "optimizer": Optimizer(0.01, weight_decay=0.0, ema_decay=0.0),
        "epochs": 3,
        "updates_per_epoch": 1,
        "kl_coef": 0.0,
    }
    return kind(GaussianModel(1.0, dims=3), level, PROMPTS, **settings | changes)


def starts(plan: Plan, epochs: range, steps: int = 25) -> list[tuple[int, ...]]:
    return [plan.resolve(steps, epoch, 0).stochastic for epoch in epochs]


# ------------------------------------------------------------------------------ windows


def test_mixgrpo_s_window_slides_and_stops_or_starts_anew():
    told = starts(SlidingWindow(SDE), range(0, 1000, 25))
    assert told[:3] == [(0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5)]
    assert told[21:] == [(21, 22, 23, 24)] * 19
    assert starts(SlidingWindow(SDE), range(24, 26)) == [(0, 1, 2, 3), (1, 2, 3, 4)]
    assert starts(SlidingWindow(SDE, every=1, stride=4, end=23), range(7)) == [
        (0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15), (16, 17, 18, 19), (19, 20, 21, 22),
        (19, 20, 21, 22),
    ]  # fmt: skip
    rolling = starts(RollingWindow(SDE, every=2, end=23), range(92))
    assert [rolling[i] for i in (0, 1, 2, 40, 44, 45)] == [
        (0, 1, 2, 3), (0, 1, 2, 3), (1, 2, 3, 4), (20, 21, 22), (22,), (22,)
    ]  # fmt: skip
    assert rolling[46:] == rolling[:46]
    assert {step for window in rolling for step in window} == set(range(23))


def epochs_at(plan: Plan, epochs: int) -> list[int]:
    """How many epochs the window stays at each start."""
    told = [window[0] for window in starts(plan, range(epochs))]
    return [told.count(start) for start in range(23)]


def test_late_windows_of_mixgrpo_s_variants_stay_for_fewer_epochs():
    """Their script's 10 to 1 of "decay", int(10 - 9 start / 23); ceil(10 e^(-.1 d)) of "exp_decay", d from step 13."""
    linear_ = [10, 9, 9, 8, 8, 8, 7, 7, 6, 6, 6, 5, 5, 4, 4, 4, 3, 3, 2, 2, 2, 1, 1]
    assert epochs_at(LinearlyHastenedWindow(SDE, every=10, end=23, least=1), sum(linear_)) == linear_
    exponential = [10] * 14 + [10, 9, 8, 7, 7, 6, 5, 5, 5]
    assert epochs_at(ExponentiallyHastenedWindow(SDE, every=10, end=23), sum(exponential)) == exponential


def test_a_random_window_takes_every_start_of_its_range():
    told = starts(RandomWindow(SDE, 2, 0, 5), range(300), 10)
    counts = [told.count((start, start + 1)) for start in range(4)]
    assert sum(counts) == 300
    assert min(counts) > 50
    assert told == starts(RandomWindow(SDE, 2, 0, 5, shared_noise=True), range(300), 10)
    path = RandomWindow(SDE, 2, 3, 5, shared_noise=True).resolve(10, 0, 0)
    assert (path.branch, path.stochastic) == (3, (3, 4))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (SlidingWindow(SDE, length=11), "window of 11 steps among the steps 0 to 9"),
        (SlidingWindow(SDE, every=0), "every and stride must be at least 1, got 0 and 1"),
        (RollingWindow(SDE, end=11), "window of 4 steps among the steps 0 to 10"),
        (LinearlyHastenedWindow(SDE, least=30), "least must lie in 1 ... every = 25, got 30"),
        (RandomWindow(SDE, 3, 4, 6), "RandomWindow has a window of 3 steps among the steps 4 to 5"),
        (PromptWindow(SDE), "take RandomWindow or Window"),
        (ShortTail(PromptWindow(SDE)), "take RandomWindow or Window"),
        (ShortTail(Deterministic()), "follows the last stochastic step, but its plan has none"),
        (Jump(ShortTail(Window(SDE, 0, 2))), "shortened already: shorten it once"),
    ],
)
def test_what_no_window_can_be(plan: Plan, message: str):
    with pytest.raises(ValueError, match=message):
        plan.resolve(10, 0, 0)


def test_a_plan_of_gradients_has_no_tail():
    with pytest.raises(ValueError, match="ShortTail is given LastSteps, which says where a reward's gradient flows"):
        ShortTail(LastSteps(2))
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        ShortTail(Window(SDE, 0, 2), 0)


# ------------------------------------------------------------------------------ tails


@pytest.mark.parametrize("every", [1, 2, 3, 20])
@pytest.mark.parametrize("last", range(10))
def test_a_short_tail_is_g2rpo_s_and_ends_where_the_grid_does(last: int, every: int):
    sigmas = flow_match_euler(10, 3.0)
    path = ShortTail(Window(SDE, last, 1), every).resolve(10, 0, 0)
    expected = sigmas[: last + 2] + sigmas[last + 2 :: every]
    assert path.grid(sigmas) == expected + ([0.0] if expected[-1] else [])
    assert len(path.transitions) == len(path.grid(sigmas)) - 1
    assert path.stochastic == (last,)
    assert intervals(path.grid(sigmas))[last] == intervals(sigmas)[last]


def affine(path: Path, sigmas: list[float], mean: float, variance: float, level: float) -> tuple[float, float]:
    """Mean and variance of a rollout's last latents, by the recursion of its affine steps."""
    grid, m, var = path.grid(sigmas), 0.0, 1.0
    for i, (s, s_next) in enumerate(zip(grid, grid[1:], strict=False)):
        slope = (s - (1 - s) * variance) / ((1 - s) ** 2 * variance + s**2)
        noise = level * (s / (1 - (grid[1] if s == 1 else s))) ** 0.5 if i in path.stochastic else 0.0
        dt = s_next - s
        in_x, in_v = 1 + noise**2 * dt / (2 * s), (1 + noise**2 * (1 - s) / (2 * s)) * dt
        m = in_x * m + in_v * (slope * (m - (1 - s) * mean) - mean)
        var = (in_x + in_v * slope) ** 2 * var - noise**2 * dt
    return m, var


@pytest.mark.parametrize(
    "plan",
    [
        SlidingWindow(SDE, every=1), RandomWindow(SDE, 2, 0, 5), ShortTail(SlidingWindow(SDE, every=1), 2),
        ShortTail(Window(SDE, 1, 2), 3), Jump(Window(SDE, 2, 4)), ShortTail(AllSteps(SDE, last_step=False)),
    ],
    ids=lambda plan: repr(plan)[:60],
)  # fmt: skip
def test_rollouts_have_the_law_of_the_affine_recursion(plan: Plan):
    """Each unit of noise alone gives the sampler's slope in it; the variance is the sum of their squares."""
    model, sigmas = GaussianModel(1.0, 0.7, dims=1), flow_match_euler(10, 3.0)
    path = plan.resolve(10, 3, 0)
    sources = 1 + len(path.stochastic)
    units = torch.eye(sources + 1)[:, 1:]  # the first row has no noise at all
    places = {step: place for place, step in enumerate(path.stochastic, 1)}
    told = model.encode([""] * (sources + 1))
    ends = rollout(
        model, told, units[:, :1], path.grid(sigmas), path, step_noise=lambda step: units[:, places[step], None]
    ).latents[:, 0].double()  # fmt: skip
    mean, variance = affine(path, sigmas, 1.0, 0.7, 0.7)
    assert ends[0].item() == pytest.approx(mean, abs=1e-6)
    assert (ends[1:] - ends[0]).square().sum().item() == pytest.approx(variance, abs=1e-6)


def test_a_jump_ends_at_the_denoised_latents():
    model, sigmas = GaussianModel(1.0, 0.7, dims=2), flow_match_euler(10, 3.0)
    told, path = model.encode([""] * 4), Jump(Window(SDE, 1, 2)).resolve(10, 0, 0)
    noise = torch.randn(10, 4, 2, generator=torch.Generator().manual_seed(0))
    made = rollout(model, told, noise[0], path.grid(sigmas), path, step_noise=lambda i: noise[1 + i], keep_path=True)
    assert len(made.path) == 5
    velocity = model.velocity(made.path[3], sigmas[3], told)
    torch.testing.assert_close(made.latents, made.path[3] - sigmas[3] * velocity)


@pytest.mark.parametrize("shorten", [ShortTail, functools.partial(ShortTail, every=3), Jump])
@pytest.mark.parametrize("plan", [Window(SDE, 1, 2), FanOut(SDE, (2,)), PromptWindow(SDE, 2, 0, 5)], ids=repr)
def test_a_tail_changes_nothing_before_it_and_costs_less(plan: Plan, shorten: Any):
    runs = [trainer(plan), trainer(shorten(plan))]
    whole, short = (run.collect(0) for run in runs)
    assert len(whole.steps) == len(short.steps)
    for one, other in zip(whole.steps, short.steps, strict=True):
        assert one.interval == other.interval
        assert torch.equal(one.latents_next, other.latents_next)
        assert torch.equal(one.log_probs, other.log_probs)
    assert (whole.scores.total - short.scores.total).abs().max() > 1e-4
    costs = [run.needed(run.collection.epoch(0)) for run in runs]
    assert costs[0].gradient == costs[1].gradient
    assert costs[0].forward > costs[1].forward
    assert runs[1].evaluator.steps == 10


@pytest.mark.parametrize(
    "plan",
    [
        ShortTail(RandomWindow(SDE, 2, 0, 5, shared_noise=True)), Jump(FanOut(SDE, (2, 4))), PromptWindow(SDE, 2, 0, 5),
        ShortTail(PromptWindow(SDE, 1, 1, 4, shared_noise=True)),
    ],
    ids=lambda plan: repr(plan)[:70],
)  # fmt: skip
def test_what_an_epoch_takes_is_what_check_says_and_its_maths_need(plan: Plan):
    one_row = Sampling(plan, groups=7, group_size=4, batch_size=1, rows_per_call=8, steps=10, guidance_scale=1.0)
    for made in (trainer(plan, sampling=one_row), trainer(plan)):
        made.update(made.collect(0))
        epoch, cut = made.collection.epoch(0), geometry(made)
        spent, padding = made.state.rows, made.sampling.batch_size > 1
        if not padding:
            assert spent == made.needed(epoch) == spent_rows(made, epoch, cut)
        assert spent.gradient == spent_rows(made, epoch, cut).gradient
        steps = planned_steps(made, looked_at(made))
        assert sum(step.stochastic for step in steps) == pytest.approx(len(epoch.path.stochastic))
        assert all(step.std > 0 for step in steps if step.stochastic)
        assert made.preflight().kept_bytes(cut) > 0


def test_completions_follow_the_shortened_tail():
    """With next to no noise a step gains nothing if both its ends are completed along the points of the rollout."""
    plan = ShortTail(Window(FlowSDE(1e-3), 1, 2), 3)
    made = trainer(plan, DenseGRPO)
    parts = made.collect(0).scores
    for name in ("completed_001", "completed_002"):
        assert (parts.parts[name] - parts.total).abs().max() < 3e-3
    full = trainer(Window(FlowSDE(1e-3), 1, 2), DenseGRPO).collect(0).scores
    assert (full.total - parts.total).abs().max() > 2e-2


def test_a_search_that_would_leave_out_steps_is_refused(tmp_path: FilePath):
    with pytest.raises(ValueError, match="a search makes all steps of its grid, and this plan leaves some out"):
        BestOfN(
            GaussianModel(), level, ["a"], steps=10, plan=ShortTail(Window(SDE, 0, 2)), folder=str(tmp_path / "run")
        )


def test_gains_cannot_be_compared_over_steps():
    with pytest.raises(ValueError, match="a gain is held against those of the same step in all groups"):
        trainer(PromptWindow(SDE, 1, 0, 9), DenseGRPO)


# ------------------------------------------------------------------------------ a path for each prompt


def test_each_prompt_has_its_own_step_and_keeps_it_within_an_epoch():
    plan = PromptWindow(SDE, 1, 0, 5)
    run = trainer(plan)
    for number in range(5):
        epoch = run.collection.epoch(number)
        assert sorted(epoch.prompts) == list(range(7))
        for group, prompt in enumerate(epoch.prompts):
            rows = [row for row, (g, _) in enumerate(epoch.rows) if g == group]
            assert {epoch.path_of(epoch.bucket_of(row)) for row in rows} == {plan.of_prompt(10, number, 0, prompt)}
        assert [path.stochastic for path, _ in epoch.paths] == sorted({path.stochastic for path, _ in epoch.paths})
    drawn = [plan.of_prompt(10, epoch, 0, prompt).stochastic[0] for epoch in range(40) for prompt in range(5)]
    assert min(drawn.count(step) for step in range(5)) > 20
    assert [plan.of_prompt(10, e, 0, 3) for e in range(9)] != [plan.of_prompt(10, e, 0, 4) for e in range(9)]


def gradient(run: FlowGRPO, batch: Batch) -> Tensor:
    """That of all a batch's rows, of gain and bias."""
    update = Update(run, batch, None)
    update._accumulate(torch.arange(len(batch.texts)), update._watch())
    made = torch.stack([value.grad.clone() for value in run.model.trainable().values()])
    run.optimizer.discard()
    return made


def only(batch: Batch, number: int) -> tuple[Batch, int]:
    """The rows of one bucket as a batch of their own, and how many samples they are."""
    part = batch.parts[number]
    rows = range(part.bucket.rows.start, part.bucket.rows.stop)
    samples = torch.arange(rows.start * batch.members, rows.stop * batch.members)
    texts, scores = batch.texts[rows.start : rows.stop], batch.scores.rows(samples.tolist())
    held = (batch.group_ids[samples], batch.advantages[samples], batch.weights[samples])
    return Batch(part.path, torch.arange(len(rows)), texts, part.steps, scores, *held), len(samples)


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared noise"])
@pytest.mark.parametrize("length", [1, 2])
def test_an_epoch_s_gradient_is_the_sum_of_those_of_its_steps(length: int, shared: bool):
    run = trainer(PromptWindow(SDE, length, 0, 5, shared))
    batch = run.collect(0)
    whole = gradient(run, batch)
    assert len(batch.parts) > 2
    parts = [only(batch, number) for number in range(len(batch.parts))]
    summed = sum(gradient(run, part) * samples for part, samples in parts) / len(batch.scores)
    torch.testing.assert_close(whole, summed, atol=1e-7, rtol=1e-5)
    trained = {step for part in batch.parts for step in part.path.stochastic}
    assert {int(step) for step in whole[0].nonzero()} == trained  # each step has its own gain and bias


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared noise"])
def test_rollouts_of_a_bucket_are_those_of_its_step_s_plan(shared: bool):
    run = trainer(PromptWindow(SDE, 1, 0, 5, shared))
    epoch, batch = run.collection.epoch(0), run.collect(0)
    for part in batch.parts:
        path = Window(SDE, part.path.stochastic[0], 1, shared).resolve(10, 0, 0)
        draw = run.collection.draw(epoch, [*part.bucket.rows])
        made = rollout(
            run.model, draw.condition, draw.start, run.sigmas, path, run.policy, draw.step_noise, epoch.members
        )
        samples = slice(part.bucket.rows.start * epoch.members, part.bucket.rows.stop * epoch.members)
        torch.testing.assert_close(made.steps[0].latents_next, part.steps[0].latents_next)
        torch.testing.assert_close(made.latents.mean(1), batch.scores.total[samples])


# ------------------------------------------------------------------------------ weights


def evenly(steps: Any, rows: Any) -> list[float]:
    return [1.0] * len(steps)


def weighted(weigh: StepWeights | None, plan: Plan = Window(SDE, 1, 3)) -> Tensor:
    run = trainer(plan, step_weights=weigh)
    return gradient(run, run.collect(0))


def test_weights_of_one_change_no_bit():
    assert torch.equal(weighted(evenly), weighted(None))
    assert torch.equal(weighted(evenly, PromptWindow(SDE, 2, 0, 5)), weighted(None, PromptWindow(SDE, 2, 0, 5)))


@pytest.mark.parametrize("weigh", [noise_weights, inverse_dt, even_means, even_gradients])
def test_a_step_s_gradient_has_its_weight(weigh: StepWeights):
    grid = intervals(flow_match_euler(10, 3.0))
    weights = weigh([(SDE, grid[step]) for step in (1, 2, 3)], [1, 1, 1])
    plain, made = weighted(None)[:, 1:4], weighted(weigh)[:, 1:4]
    torch.testing.assert_close(made, plain * torch.tensor(weights), atol=1e-8, rtol=1e-5)


def test_weights_by_hand():
    """TempFlow's are the stds, with a mean of 1 over what is trained; GRPO-Guard's are 1 / |dt|."""
    grid = intervals(flow_match_euler(10, 3.0))
    steps = [(SDE, grid[step]) for step in (0, 1, 8)]
    stds = torch.tensor([0.7, 0.7430, 0.2254])
    expected = stds / (stds @ torch.tensor([0.5, 0.25, 0.25]))
    torch.testing.assert_close(torch.tensor(noise_weights(steps, [2, 1, 1])), expected, atol=3e-4, rtol=0)
    assert inverse_dt(steps, [1, 1, 1]) == pytest.approx([1 / 0.0399, 1 / 0.0468, 1 / 0.2691], rel=2e-3)
    # 1 / |d mean / d v| = 1 / ((1 + a^2 / 2) |dt|) of Flow-SDE, but for its step from sigma 1
    ratios = torch.tensor(even_means(steps[1:], [1, 1])) / torch.tensor(inverse_dt(steps[1:], [1, 1]))
    assert ratios[0].item() == pytest.approx(ratios[1].item(), rel=1e-5)


def test_even_gradients_are_flash_grpo_s_table():
    """The ten numbers in the authors' script, of Wan's 20 steps at shift 3 and g = sigma sigmas[1], to their scale."""
    table = [7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754]
    sigmas = wan_sigmas("flow_grpo/wan2.1_flash.yaml")
    rule = TableSDE(tuple(sigmas[1] * sigma for sigma in sigmas[:-1]))
    made = torch.tensor(even_gradients([(rule, step) for step in intervals(sigmas)[:10]], [1] * 10))
    assert made.mean().item() == pytest.approx(1.0)
    torch.testing.assert_close(made, torch.tensor(table) / (sum(table) / 10), atol=0, rtol=2e-3)


# ------------------------------------------------------------------------------ runs


def policy(folder: FilePath, rank: int = 0) -> Any:
    """A GRPO-Guard run with everything here in it."""
    run = jobs.guard_job(folder, epochs=1, optimizer=Optimizer(3e-4))
    run.train(report=False)
    return torch.cat([value.detach().flatten() for value in run.model.trainable().values()]).numpy()


def test_paths_tails_and_weights_do_not_depend_on_the_number_of_processes(tmp_path: FilePath):
    (alone,) = processes.run(1, tmp_path, functools.partial(policy, tmp_path / "1"))
    for found in processes.run(2, tmp_path, functools.partial(policy, tmp_path / "2")):
        numpy.testing.assert_allclose(found, alone, atol=1e-6, rtol=1e-4)


def test_the_ode_alone_has_no_tail_to_shorten():
    assert Path((ODE(),) * 3).grid(linear(3)) == linear(3)


# ------------------------------------------------------------------------------ configs


def resolved(name: str) -> dict[str, Any]:
    return arguments_of(parse_trainer(load_yaml(FilePath(__file__).resolve().parents[1] / "configs" / name)))


def test_published_windows_are_the_authors():
    config = resolved("flow_grpo/flux.1-dev_mixgrpo.yaml")
    sampling, plan = config["sampling"], config["sampling"]["plan"]
    assert plan["class"] == "flowalign.windows.RollingWindow"
    assert [plan[key] for key in ("length", "every", "stride", "end", "shared_noise")] == [4, 25, 1, 23, True]
    assert plan["transition"] == {"class": "flowalign.transitions.FlowSDE", "noise_level": 0.7}
    assert [sampling[key] for key in ("groups", "group_size", "steps", "guidance_scale")] == [32, 12, 25, 3.5]
    assert (config["epochs"], config["updates_per_epoch"], config["clip_range"], config["kl_coef"]) == (300, 4, 1e-4, 0)
    assert (config["optimizer"]["learning_rate"], config["advantages"]["clip"]) == (1e-5, 5.0)

    for name, transition, length, shared in (("", "FlowSDE", 2, True), ("_cps", "CPS", 3, False)):
        config = resolved(f"flow_grpo/sd3.5_fast{name}.yaml")
        plan = config["sampling"]["plan"]
        assert plan["transition"] == {"class": f"flowalign.transitions.{transition}", "noise_level": 0.8}
        assert [plan[key] for key in ("length", "low", "high", "shared_noise")] == [length, 0, 5, shared]
        assert (config["clip_range"], config["kl_coef"], config["step_fraction"]) == (1e-5, 0.0, 1.0)

    config = resolved("flow_grpo/wan2.1_flash.yaml")
    plan = config["sampling"]["plan"]
    assert [plan[key] for key in ("length", "low", "high")] == [1, 0, 10]
    sigmas = wan_sigmas("flow_grpo/wan2.1_flash.yaml")
    assert plan["transition"]["table"] == pytest.approx([sigmas[1] * sigma for sigma in sigmas[:-1]], abs=1e-4)
    assert (config["clip_range"], config["kl_coef"], config["optimizer"]["learning_rate"]) == (1e-3, 0.0, 1e-4)
    assert config["step_weights"] == "flowalign.step_weights.even_gradients"


def test_grpo_guard_s_settings_are_the_published_ones():
    config = resolved("grpo_guard/sd3.5_pickscore.yaml")
    assert (config["clip_range"], config["kl_coef"], config["step_fraction"]) == (4e-6, 0.0, 0.99)
    assert (config["optimizer"]["learning_rate"], config["evaluation"]["every"]) == (1e-4, 30)
    assert config["advantages"] == "flowalign.advantages.group_advantages"
    assert config["step_weights"] == "flowalign.step_weights.inverse_dt"

"""DRaFT against closed forms: its gradient's mean and variance, where it learns to, and what it refuses."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowalign.gradient_plans import GaussianTruncation, GradientPlan, LastSteps, LateStep, RandomTruncation
from flowalign.models.gaussian import GaussianModel
from flowalign.randomness import key_noise
from flowalign.records import Condition, Media, Prompts, Scores
from flowalign.schedules import AllSteps, flow_match_euler, linear, shifted
from flowalign.transitions import DDIM, FlowSDE
from rewards.base import FunctionReward, Reward
from tests.interrupted import slow_but
from tests.jobs import BY_GRADIENT, JOBS, draft_job, job, redness, rows
from trainers import Checkpoints, DRaFT, Evaluation, Optimizer, Sampling
from trainers.base import Trainer
from trainers.path_steps import PathSteps, repeated
from trainers.preflight import inspect, page
from trainers.preflight.geometry import floor_rows, geometry, looked_at, spent_rows
from trainers.watch import Watch

GRID = linear(5)
CENTRE = torch.tensor([1.5, -0.5])


class Plane(GaussianModel):
    """Points of the plane, with a policy that may shift each coordinate apart; a picture is the two and a 0."""

    def __init__(self, grid: list[float] = GRID) -> None:
        super().__init__(0.0, 1.0, 2, grid)
        self.bias = nn.Parameter(torch.zeros(len(grid), 2))

    def decode(self, latents: Float[Tensor, "b 2"]) -> Float[Tensor, "b 3 1 1"]:
        return nn.functional.pad(latents, (0, 1))[:, :, None, None]


def points(media: Media) -> Float[Tensor, "b 2"]:
    return media.pixels[:, :2, 0, 0]


def nearness(media: Media, prompts: Prompts) -> Tensor:
    return -(points(media) - CENTRE).square().sum(1)


def curved(media: Media, prompts: Prompts) -> Tensor:
    return points(media).sin().sum(1)


def trainer(folder: Path, reward: Any = nearness, model: GaussianModel | None = None, **changes: Any) -> DRaFT:
    plan, steps = changes.pop("plan", LastSteps()), changes.pop("steps", 5)
    sampling = Sampling(plan, changes.pop("groups", 64), 1, changes.pop("batch_size", 64), 64, steps, 1.0)
    given = reward if isinstance(reward, Reward) else FunctionReward(reward, differentiable=True)
    settings: dict[str, Any] = {
        "optimizer": Optimizer(0.03, ema_decay=0.0),
        "checkpoints": Checkpoints(minutes=0),
    }
    return DRaFT(model or Plane(), given, ["x", "y"], sampling, folder=str(folder), **settings | changes)


def samples(made: DRaFT, number: int = 10_000) -> Float[Tensor, "n 2"]:
    """What the policy makes of one epoch's noise."""
    epoch = made.collection.epoch(number)
    with torch.no_grad():
        draw = made.collection.draw(epoch, [*range(len(epoch.rows))])
        return made.rollout(epoch, draw, made.sigmas).latents


def test_the_mean_reaches_the_reward_s_best_and_the_variance_collapses(tmp_path):
    made = trainer(tmp_path, epochs=60, optimizer=Optimizer(0.1, ema_decay=0.0, decay=60))
    before = samples(made)
    assert (before.mean(0) - CENTRE).norm() > 1
    assert before.var(0).min() > 0.5
    made.train(report=False)
    after = samples(made)
    assert (after.mean(0) - CENTRE).norm() < 0.1
    assert after.var(0).max() < 0.02
    told = [row["reward"] for row in rows(tmp_path) if "reward" in row]
    assert told[0] < -2
    assert told[-1] > -0.1


def test_the_kl_holds_what_would_collapse(tmp_path):
    made = trainer(tmp_path, epochs=20, kl_coef=3.0, optimizer=Optimizer(0.1, ema_decay=0.0, decay=20))
    made.train(report=False)
    assert samples(made).var(0).min() > 0.1
    assert rows(tmp_path)[-1]["kl"] > 0


def gradient(made: DRaFT, number: int = 0) -> Tensor:
    """Of the first optimizer step of an epoch, as one vector, before clipping; the policy stays."""
    epoch = made.collection.epoch(number)
    steps = PathSteps(made, epoch, None)
    watch = Watch(made.watched(), 1.0, made.model.device)
    every = torch.arange(len(epoch.rows))
    for at, micro in enumerate(steps.micro_batches(every)):
        steps.micro_batch(micro, at, len(every), watch)
    found = torch.cat([value.grad.flatten() for value in made.optimizer.parameters.values() if value.grad is not None])
    made.optimizer.discard()
    return found.clone()


@pytest.mark.parametrize("kl_coef", [0.0, 1.0])
def test_a_step_s_gradient_is_the_mean_over_its_samples_however_they_are_cut(kl_coef, tmp_path):
    """Off the reference, where a KL has gradient: padding counts in neither."""

    def cut(size: int) -> Tensor:
        made = trainer(tmp_path, groups=10, batch_size=size, kl_coef=kl_coef)
        made.model.bias.data.fill_(0.5)
        return gradient(made)

    whole = cut(10)
    assert whole.abs().max() > 0.1
    for size in (1, 3, 4, 7):
        torch.testing.assert_close(cut(size), whole, atol=2e-6, rtol=1e-6)


def test_low_variance_is_the_gradient_of_a_mean_and_its_variance_falls_with_n(tmp_path, monkeypatch):
    """x1 = (1 - t) x0 + t e, one step: -d E_e sin(x1 - t v(x1)) / d bias = t E_e cos(...), of a normal in closed form.

    All samples have one start, so that they differ by what is drawn anew; the last step's shift moves each by -t.
    """
    monkeypatch.setattr("trainers.collection.key_noise", one_start)
    t = GRID[-2]
    found: dict[int, Tensor] = {}
    for count in (1, 4, 16):
        made = trainer(tmp_path, curved, plan=LastSteps(1), groups=1000, batch_size=1000, low_variance=count)
        latents = samples(made, 0).requires_grad_()
        told = Prompts(("x",) * len(latents), ({},) * len(latents))
        scores = made.reward(Media(made.model.decode(latents)), told, grad=True)
        (slopes,) = torch.autograd.grad(scores.total.sum(), latents)
        found[count] = t * slopes[:, 0].view(-1, count).mean(1)
        mean = gradient(made)[len(GRID) + 2 * (len(GRID) - 2)]  # behind the gains, of the first coordinate
        assert mean.item() == pytest.approx(found[count].mean().item(), rel=1e-4)
    clean = samples(trainer(tmp_path, curved, plan=LastSteps(1), groups=1, batch_size=1), 0)[0, 0].item()
    row = Condition(torch.zeros(1, 1, 1))
    one, zero = (Plane().network(torch.full((1, 2), x), t, row)[0, 0].item() for x in (1.0, 0.0))
    keep, shift = 1 - t * (one - zero), -t * zero  # the step is affine: keep x1 + shift
    center, std = keep * (1 - t) * clean + shift, abs(keep) * t
    for slopes in found.values():
        error = slopes.std().item() / len(slopes) ** 0.5
        assert slopes.mean().item() == pytest.approx(t * math.cos(center) * math.exp(-(std**2) / 2), abs=4 * error)
    assert found[1].var() / found[4].var() == pytest.approx(4, rel=0.25)
    assert found[1].var() / found[16].var() == pytest.approx(16, rel=0.25)


def one_start(seed: int, purpose: str, *key: int, shape: tuple[int, ...]) -> Tensor:
    return key_noise(seed, purpose, *((0,) if purpose == "start" else key), shape=shape)


def test_low_variance_counts_its_rows_and_scores_a_sample_once(tmp_path):
    made = trainer(tmp_path, plan=LastSteps(1), groups=6, batch_size=3, low_variance=4, kl_coef=0.1, epochs=1)
    made.train(report=False)
    (row,) = [row for row in rows(tmp_path) if "reward" in row]
    assert (row["rows/forward"], row["floor/forward"]) == (6 * 5 + 2 * 6 * 4, 6 * 5 + 6 * 4)
    assert row["rows/gradient"] == row["floor/gradient"] == 6 * 4
    assert row["kl"] == 0


def test_the_reference_is_called_for_a_kl_alone(tmp_path):
    """Six samples, three steps without gradient and two with; of the reference's two calls the first keeps nothing."""
    for kl_coef, forward, gradient in ((0.0, 18, 12), (0.1, 18 + 6, 12 + 6)):
        folder = tmp_path / str(kl_coef)
        changes: dict[str, Any] = {"groups": 6, "batch_size": 3, "kl_coef": kl_coef, "recompute": False, "epochs": 1}
        trainer(folder, plan=LastSteps(2), **changes).train(report=False)
        (row,) = [row for row in rows(folder) if "reward" in row]
        assert (row["rows/forward"], row["rows/gradient"]) == (forward, gradient)
        assert (row["floor/forward"], row["floor/gradient"]) == (forward, gradient)


PLANS: list[tuple[GradientPlan, dict[str, Any]]] = [
    (LastSteps(2), {"kl_coef": 0.1}),
    (LastSteps(), {"unconditional_grad": False}),
    (RandomTruncation(), {"recompute": False, "kl_coef": 0.1}),
    (LastSteps(1), {"low_variance": 2}),
]


@pytest.mark.parametrize(("plan", "changes"), PLANS, ids=["two", "all", "random", "low variance"])
def test_counted_rows_are_those_of_the_run(plan, changes, tmp_path):
    sampling = Sampling(plan, 3, 2, batch_size=2, rows_per_call=2, steps=3, guidance_scale=2.0)
    made = draft_job(tmp_path / "run", **{"kl_coef": 0.0, "sampling": sampling, "evaluation": Evaluation()} | changes)
    cut, epochs = geometry(made), looked_at(made)
    made.train(report=False)
    for epoch, row in zip(epochs, rows(tmp_path / "run"), strict=True):
        spent, floor = spent_rows(made, epoch, cut), floor_rows(made, epoch)
        assert (spent.forward, spent.gradient) == (row["rows/forward"], row["rows/gradient"])
        assert (floor.forward, floor.gradient) == (row["floor/forward"], row["floor/gradient"])


def drawn_first(plan: GradientPlan, steps: int, epochs: int = 4000) -> Counter[int]:
    return Counter(plan.resolve(steps, epoch, 3).gradient_from for epoch in range(epochs))


def test_random_truncation_is_uniform():
    found = drawn_first(RandomTruncation(), 10)
    assert [*sorted(found)] == [*range(1, 10)]  # at least one step with gradient, never all
    expected = 4000 / 9
    assert sum((count - expected) ** 2 / expected for count in found.values()) < 26.1  # chi2 of 8, p = .001
    assert {*drawn_first(RandomTruncation(3, 5), 10)} == {3, 4, 5}


def test_gaussian_truncation_is_aligned_prop_s():
    """int(x) of x from N(42, 5), drawn anew from 50 on: a mean K of 9.09, and K = 1 for 49 <= x < 50."""
    found = drawn_first(GaussianTruncation(), 50)
    assert min(found) >= 1
    assert max(found) <= 49
    below = [NormalDist(42, 5).cdf(step + 1) - NormalDist(42, 5).cdf(step) for step in range(1, 50)]
    mean = sum((50 - step) * share for step, share in enumerate(below, 1)) / sum(below)
    assert (mean, below[-1] / sum(below)) == pytest.approx((9.09, 0.0275), rel=2e-3)
    drawn = sum((50 - first) * count for first, count in found.items()) / 4000
    assert drawn == pytest.approx(mean, abs=0.25)  # rounding: 8.70
    assert found[49] / 4000 == pytest.approx(0.0275, abs=0.01)


def test_truncation_is_a_function_of_seed_and_epoch():
    plans = [RandomTruncation(), GaussianTruncation(5.0, 2.0), LateStep(2, 8)]
    for plan in plans:
        assert plan.resolve(10, 7, 1) == plan.resolve(10, 7, 1)
        assert len({plan.resolve(10, epoch, 1).gradient_from for epoch in range(30)}) > 3


def test_aligned_prop_samples_with_noise_that_the_gradient_runs_around(tmp_path):
    made = trainer(tmp_path, plan=RandomTruncation(1, 3), epochs=2)
    assert {type(one) for one in made.collection.epoch(0).path.transitions} == {DDIM}
    start, again = samples(made, 0), samples(made, 0)
    assert torch.equal(start, again)
    made.train(report=False)
    assert not torch.equal(samples(made, 0), start)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (LastSteps(9), "LastSteps.count is 9, but a rollout has 5 steps"),
        (LastSteps(0), "LastSteps.count is 0"),
        (RandomTruncation(3, 7), "first step with gradient among 3 to 7"),
        (GaussianTruncation(), "a mean among the steps 1 to 4 of a rollout of 5; got 5.0 and 42.0"),
        (LateStep(), "LateStep chooses the first step with gradient among 30 to 39"),
        (AllSteps(FlowSDE(0.7)), "AllSteps, which is for ratios of densities; DRaFT goes back through the rollout"),
    ],
)
def test_a_plan_that_does_not_fit_is_one_line(plan, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, plan=plan)


def test_a_plan_of_gradients_is_not_for_ratios(tmp_path):
    sampling = Sampling(LastSteps(2, DDIM(1.0)), 2, 4, batch_size=2, steps=3)
    with pytest.raises(ValueError, match="LastSteps, which says where a reward's gradient flows; FlowGRPO"):
        job(tmp_path, sampling=sampling)


def test_a_reward_without_gradient_is_named(tmp_path):
    smooth, hard = FunctionReward(nearness, True), FunctionReward(curved)
    with pytest.raises(ValueError, match="DRaFT needs the reward's gradient, and curved has none"):
        trainer(tmp_path, smooth + 0.5 * hard)
    with pytest.raises(ValueError, match="needs the reward's gradient, and nearness has none"):
        trainer(tmp_path, FunctionReward(nearness))

    def cut(media: Media, prompts: Prompts) -> Tensor:
        return nearness(media, prompts).detach()

    with pytest.raises(ValueError, match="cut says that it is differentiable, but its scores carry no gradient"):
        trainer(tmp_path, cut).train()


def test_a_reward_that_compares_samples_is_refused(tmp_path):
    compared = FunctionReward(nearness, differentiable=True)
    compared.card = replace(compared.card, scope="group")
    with pytest.raises(ValueError, match="nearness compares samples with one another; DRaFT needs a reward that"):
        trainer(tmp_path, compared)


def test_settings_that_do_not_go_together_are_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"low_variance draws the last step anew: it needs the plan LastSteps"):
        trainer(tmp_path, low_variance=2)
    with pytest.raises(ValueError, match="kl_coef and low_variance must be at least 0"):
        trainer(tmp_path, kl_coef=-1.0)


def some_invalid(media: Media, prompts: Prompts) -> Scores:
    total = nearness(media, prompts)
    valid = points(media)[:, 0].detach() < 0.2
    return Scores(total.where(valid, torch.nan), {"near": total.where(valid, torch.nan)}, valid)


def test_samples_without_a_score_stop_the_run_or_are_left_out(tmp_path):
    with pytest.raises(ValueError, match="of 16 scores of epoch 0 are not valid; mend the reward, or set on_invalid"):
        trainer(tmp_path / "stop", some_invalid, groups=16, batch_size=4).train()
    seen = list[Tensor]()
    whole = Optimizer(0.03, ema_decay=0.0, max_grad_norm=1e6)  # nothing is clipped
    changes: dict[str, Any] = {"on_invalid": "drop", "epochs": 1, "optimizer": whole}
    made = trainer(tmp_path / "drop", some_invalid, groups=16, batch_size=4, **changes)
    hook = lambda *_: seen.extend(value.grad.clone() for value in made.optimizer.parameters.values())  # noqa: E731
    made.optimizer.adamw.register_step_pre_hook(hook)
    kept = samples(made, 0)[:, 0] < 0.2
    made.train(report=False)
    (row,) = [row for row in rows(tmp_path / "drop") if "reward" in row]
    assert row["invalid"] == 16 - int(kept.sum()) > 0
    latents = samples(trainer(tmp_path, groups=16), 0)[kept]
    # only the last step's shift: d loss / d bias = 2 (x - c) dt, the mean over the samples that count
    expected = (2 * (latents - CENTRE) * -GRID[-2]).mean(0)
    torch.testing.assert_close(seen[1][len(GRID) - 2], expected, rtol=1e-4, atol=1e-6)
    assert float(torch.cat([one.flatten() for one in seen]).norm()) == pytest.approx(row["grad_norm"], rel=1e-4)


def half_invalid(media: Media, prompts: Prompts) -> Scores:
    """Of every second sample one of its two pictures has no score."""
    total = nearness(media, prompts)
    valid = torch.tensor([row % 4 != 1 for row in range(len(total))])
    return Scores(total.where(valid, torch.nan), {}, valid)


def test_a_sample_of_several_pictures_is_their_mean_and_needs_all_their_scores(tmp_path):
    told = list[tuple[str, ...]]()

    def listening(media: Media, prompts: Prompts) -> Tensor:
        told.append(prompts.text)
        return nearness(media, prompts)

    changes: dict[str, Any] = {"plan": LastSteps(1), "groups": 8, "batch_size": 8, "low_variance": 2, "epochs": 1}
    made = trainer(tmp_path / "all", listening, **changes)
    drawn = samples(made, 0)
    mean = nearness(Media(made.model.decode(drawn)), Prompts(("x",) * 16, ({},) * 16)).mean()
    made.train(report=False)
    (row,) = [row for row in rows(tmp_path / "all") if "reward" in row]
    assert row["reward"] == pytest.approx(mean.item(), rel=1e-4)
    (texts,) = told
    assert texts[::2] == texts[1::2]
    assert texts[::2] == made.collection.told_rows(made.collection.epoch(0), range(8)).text
    dropping = trainer(tmp_path / "drop", half_invalid, on_invalid="drop", **changes)
    dropping.train(report=False)
    (row,) = [row for row in rows(tmp_path / "drop") if "reward" in row]
    assert row["invalid"] == 4
    condition = repeated(Condition(torch.tensor([1.0, 2.0]).view(2, 1, 1)), 2)
    assert condition.prompt_embeds.flatten().tolist() == [1, 1, 2, 2]


def test_what_a_reward_draws_at_random_is_its_micro_batch_s_own(tmp_path):
    seen = list[float]()

    def noisy(media: Media, prompts: Prompts) -> Tensor:
        seen.extend(drawn := torch.rand(len(media)).tolist())
        return nearness(media, prompts) + torch.tensor(drawn)

    changes: dict[str, Any] = {"groups": 4, "batch_size": 2, "updates_per_epoch": 2, "epochs": 2}
    trainer(tmp_path / "1", noisy, **changes).train(report=False)
    assert len({*seen}) == len(seen) == 2 * 4
    first = [*seen]
    seen.clear()
    trainer(tmp_path / "2", noisy, **changes).train(report=False)
    assert seen == first


def test_a_tiny_last_step_is_told_with_a_remedy(tmp_path, capsys):
    grid = flow_match_euler(5, 3.0)

    def made(count: int | None, points: list[float] = grid) -> DRaFT:
        return trainer(
            tmp_path / str(count), model=Plane(points), plan=LastSteps(count), epochs=1, groups=2, batch_size=2
        )

    assert "it is tiny (0.0089 to 0.0000)" in made(1).remarks()[0]
    assert made(2).remarks() == ()
    assert made(1, GRID).remarks() == ()
    made(1).train(report=False)
    assert "flowalign: only the last step has gradient, and it is tiny" in capsys.readouterr().err
    problems = inspect(made(1), tmp_path / "out").problems
    assert any("K = 1 hardly trains" in problem.text for problem in problems)


@pytest.mark.parametrize("steps", [1, 5, 10, 16, 20, 40, 50])
def test_a_tiny_last_step_is_told_at_any_number_of_steps(steps, tmp_path):
    """Diffusers' grids of SD3 (shift 3) and of Wan at 720p (5) end in .0089 and .0244, however many steps there are."""

    def told(points: list[float]) -> bool:
        made = trainer(tmp_path / "run", model=Plane(points), plan=LastSteps(1), steps=steps)
        return bool(made.remarks())

    assert all(told(flow_match_euler(steps, shift)) == (steps > 1) for shift in (3.0, 5.0))
    assert not any(told(shifted(linear(steps), shift)) for shift in (0.5, 1.0, 3.0, 5.0))


@pytest.mark.parametrize("kind", slow_but(["draft"], BY_GRADIENT))
def test_a_check_tries_it_and_leaves_it_alone(kind, tmp_path):
    changes: dict[str, Any] = {"epochs": 1, "evaluation": Evaluation(["a star"] * 3, pictures=0)}
    made: Trainer = JOBS[kind](tmp_path / "run", **changes)
    before = {name: value.detach().clone() for name, value in made.model.trainable().items()}
    found = inspect(made, tmp_path / "out")
    assert found.errors == 0
    assert found.trial is not None
    assert found.memory is not None
    assert found.trial.learning.grad_norm > 0
    assert found.trial.rollouts.repeatable
    assert "the first 2 samples" in page(found)
    assert (tmp_path / "out" / "first_group.png").is_file()
    assert all(torch.equal(value, before[name]) for name, value in made.model.trainable().items())
    assert all(value.grad is None for value in made.model.trainable().values())
    made.train(report=False)
    JOBS[kind](tmp_path / "other", **changes).train(report=False)
    assert rows(tmp_path / "run") == rows(tmp_path / "other")


def flat(media: Media, prompts: Prompts) -> Tensor:
    return 0 * redness(media, prompts) + 1


def test_a_reward_that_is_flat_is_an_error_of_the_check(tmp_path):
    made = draft_job(tmp_path / "run", reward=FunctionReward(flat, True), kl_coef=0.0)
    texts = [problem.text for problem in inspect(made, tmp_path / "out").problems if problem.kind == "error"]
    assert [text[:30] for text in texts] == ["the gradient is exactly 0: non"]


def test_a_step_that_is_not_finite_is_left_out_and_told(tmp_path):
    def breaking(media: Media, prompts: Prompts) -> Tensor:
        near = nearness(media, prompts)
        return near + torch.where(points(media)[:, 0] > 0, (near - near.detach()).sqrt(), 0.0)  # slope is infinite

    made = trainer(tmp_path, breaking, groups=8, batch_size=8, optimizer=Optimizer(0.01, max_skipped=1))
    with pytest.raises(ValueError, match="2 optimizer steps in a row had a loss or gradient that is not finite"):
        made.train()
    lines = (tmp_path / "non_finite" / "epoch-000000-step-0-process-0.jsonl").read_text().splitlines()
    assert {json.loads(line)["prompt"] for line in lines} == {"x", "y"}
    assert (tmp_path / "non_finite" / "epoch-000000-step-0-process-0.safetensors").is_file()
    assert not any(value.any() for value in made.model.trainable().values())


def test_steps_that_are_not_finite_now_and_then_are_counted_and_not_averaged(tmp_path):
    """The first of an epoch's two optimizer steps has an infinite slope; none comes twice in a row."""
    calls = [0]

    def breaking(media: Media, prompts: Prompts) -> Tensor:
        near = nearness(media, prompts)
        calls[0] += 1
        return near + (near - near.detach()).sqrt() if calls[0] % 2 else near

    changes: dict[str, Any] = {"groups": 8, "batch_size": 4, "updates_per_epoch": 2, "epochs": 3}
    made = trainer(tmp_path, breaking, optimizer=Optimizer(0.01, max_skipped=1, ema_decay=0.0), **changes)
    made.train(report=False)
    told = [row for row in rows(tmp_path) if "reward" in row]
    assert [row["skipped"] for row in told] == [1, 1, 1]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in told)
    assert any(value.any() for value in made.model.trainable().values())

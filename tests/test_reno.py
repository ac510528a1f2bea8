"""ReNO against the authors' recorded numbers, closed forms, and a generator that changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.stats import chi
from torch import Tensor

from flowalign.models.gaussian import GaussianModel
from flowalign.models.wan import Wan
from flowalign.records import Media, Prompts
from flowalign.schedules import AllSteps, linear
from flowalign.transitions import FlowSDE
from rewards import OnFrames
from tests.searches import PRICES, PROMPTS, Identity, brightness, differentiable, job, nearness
from tests.tiny_wan import tiny_wan
from trainers import ReNO
from trainers.noise_optim import Adam, Nesterov, clipped
from trainers.reno import objective, regulariser
from trainers.search_state import Line

GOLDEN = load_file(Path(__file__).parent / "golden" / "reno.safetensors")
DIMS = 4 * 8 * 8
GENTLE = Nesterov(0.05, 0.9)  # of a quadratic of curvature 2; no clip


class Toy(Identity):
    """sigmoid of a matrix of the latents' channels, at 16 x 16."""

    def decode(self, latents: Tensor) -> Tensor:
        mixed = torch.einsum("oc,bchw->bohw", GOLDEN["toy_model_matrix"], latents)
        return F.interpolate(mixed, (16, 16), mode="bilinear", align_corners=False).sigmoid()


class Traced(ReNO):
    """Keeps every noise on the way, and the best score after each try."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.path: list[Tensor] = []
        self.best: list[float] = []

    def learn(self, line: Line, valid: bool, gradient: Tensor | None) -> None:
        super().learn(line, valid, gradient)
        assert line.best is not None
        self.best.append(line.best.score)
        if gradient is not None:
            self.path.append(line.state["noise"][0])


class Recorded(Traced):
    """From the recorded noise."""

    def begin(self, number: int) -> dict[str, Tensor]:
        noise = GOLDEN["sgd/reg=True/latents0"]
        return {"noise": noise, **self.optimizer.moments(noise)}


def close(actual: Tensor | float, expected: Tensor | float, atol: float = 1e-6) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), atol=atol, rtol=0, check_dtype=False)


@pytest.mark.parametrize(
    ("name", "optimizer", "weight"),
    [
        ("sgd/reg=True", Nesterov(5.0, 0.9), 0.01),
        ("sgd/reg=False", Nesterov(5.0, 0.9), 0.0),
        ("adam/reg=True", Adam(0.05, eps=1e-2), 0.01),
    ],
)
def test_the_authors_numbers(name, optimizer, weight):
    loss = differentiable(lambda media, prompts: -5 * (media.pixels - GOLDEN["toy_target"]).square().flatten(1).mean(1))
    search = Recorded(
        Toy((4, 8, 8)), loss, ["x"], iterations=6, optimizer=optimizer, regularisation=weight, prices=PRICES
    )
    (found,) = search.find()
    close(torch.stack(search.path), GOLDEN[f"{name}/latents_after"][:, 0])
    close(found.first.score, -GOLDEN[f"{name}/initial_total"])
    close(found.best.score, -GOLDEN[f"{name}/best_total"])
    if weight:
        close(found.first.noise.norm(), GOLDEN[f"{name}/initial_norm"], 2e-6)  # of 15.5: two roundings
        close(found.best.noise.norm(), GOLDEN[f"{name}/best_norm"], 2e-6)


@pytest.mark.parametrize("scale", ["0.5", "1.0", "2.0"])
def test_the_authors_regulariser(scale):
    noise = GOLDEN[f"regularizer/scale{scale}/latents"].clone().requires_grad_()
    value = 0.01 * regulariser(noise)
    close(value.detach()[0], GOLDEN[f"regularizer/scale{scale}/value"])
    close(torch.autograd.grad(value.sum(), noise)[0], GOLDEN[f"regularizer/scale{scale}/grad"])


def test_the_regulariser_is_flat_and_least_on_the_shell():
    noise = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    shell = (noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * math.sqrt(DIMS - 1)).requires_grad_()
    least = regulariser(shell)
    assert torch.autograd.grad(least.sum(), shell)[0].abs().max() < 1e-12
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert (regulariser(factor * shell) > least).all()


def test_the_regulariser_is_the_density_of_the_norm():
    noise = torch.randn(5, DIMS, dtype=torch.float64) * torch.tensor([0.8, 0.9, 1, 1.1, 1.2])[:, None]
    differences = regulariser(noise).numpy() + chi.logpdf(noise.norm(dim=1).numpy(), DIMS)
    assert differences.std() < 1e-9


def test_the_objective_is_reward_less_regulariser():
    noise, rewards = torch.randn(2, DIMS), torch.tensor([1.0, -2.0])
    assert torch.equal(objective(rewards, noise, 0.0), rewards)
    close(objective(rewards, noise, 0.5), rewards - 0.5 * regulariser(noise))


def test_each_row_has_its_own_clip():
    rows = torch.stack([torch.full((4,), 3.0), torch.full((4,), 0.01)])
    short = clipped(rows, 0.1)
    close(short[0].norm(), 0.1)
    assert torch.equal(short[1], rows[1])
    whole = rows[:1].clone().requires_grad_()
    whole.grad = rows[:1].clone()
    torch.nn.utils.clip_grad_norm_([whole], 0.1)
    assert torch.equal(whole.grad, short[:1])


@pytest.mark.parametrize("length", [0.05, 2.0])
def test_a_linear_reward_without_regulariser_is_the_recursion(length):
    """r = <a, e>: e_k+1 = e_k - 5 (g + .9 m_k+1), m_k+1 = .9 m_k + g, with g = -a clipped at .1."""
    direction = torch.randn(3, 8, 8)
    slope = length * direction / direction.norm()
    reward = differentiable(lambda media, prompts: (media.pixels * slope).flatten(1).sum(1))
    search = ReNO(Identity(), reward, ["x"], iterations=8, regularisation=0.0, prices=PRICES)
    (found,) = search.find()
    noise, momentum, g = search.sampler.noise(0), torch.zeros(3, 8, 8), clipped(-slope[None], 0.1)[0]
    for _ in range(7):
        momentum = 0.9 * momentum + g
        noise = noise - 5 * (g + 0.9 * momentum)
    assert found.best.number == 7  # a step never lowers a linear reward, and the last one makes none
    close(found.best.noise, noise, 1e-5)


def shell_point() -> Tensor:
    point = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(5))
    return point / point.norm() * math.sqrt(191)


def test_it_comes_to_a_target_on_the_shell():
    target = shell_point()
    search = ReNO(Identity(), nearness(target), ["x"], 100, GENTLE, 1e9, prices=PRICES)
    (found,) = search.find()
    assert found.first.score < -100
    assert (found.best.noise - target).norm() < 0.05


def test_it_stops_short_of_a_target_inside_the_shell():
    """r = -k ||e||^2: at rest at ||e||^2 = w (d - 1) / (w + 2 k), within 2 % of sqrt(d) for k = w / 100."""
    inside = nearness(torch.zeros(3, 8, 8), 1e-4)
    search = Traced(Identity(), inside, ["x"], 90, Nesterov(5.0, 0.9), 1e9, prices=PRICES)
    search.find()
    close(search.path[-1].norm(), math.sqrt(0.01 * 191 / (0.01 + 2e-4)), 0.01)
    assert abs(float(search.path[-1].norm()) / math.sqrt(192) - 1) < 0.02
    free = ReNO(Identity(), nearness(torch.zeros(3, 8, 8)), ["x"], 100, GENTLE, 1e9, 0.0, prices=PRICES)
    assert free.find()[0].best.noise.norm() < 0.05


def test_the_best_so_far_never_gets_worse_and_is_never_below_the_plain_sample():
    search = Traced(Identity(), nearness(shell_point()), ["x"], 12, Nesterov(1.0, 0.9), 1e9, prices=PRICES)  # diverges
    (found,) = search.find()
    assert search.best == sorted(search.best)
    assert found.best.score >= found.first.score
    assert found.best.number < 11


def same(one, other) -> bool:
    """Whether two ends are the same to the last bit."""
    return torch.equal(one.best.noise, other.best.noise) and one.best.score == other.best.score


def test_the_same_seed_gives_the_same_bits_and_no_weight_changes():
    search = job()
    parameters = dict(search.model.module.named_parameters())
    before = {name: value.clone() for name, value in parameters.items()}
    trained = {name for name, value in parameters.items() if value.requires_grad}
    found = search.find()
    assert all(torch.equal(value, before[name]) for name, value in parameters.items())
    assert all(value.grad is None for value in parameters.values())
    assert {name for name, value in parameters.items() if value.requires_grad} == trained != set()
    assert all(same(*pair) for pair in zip(found, job().find(), strict=True))
    assert not any(same(*pair) for pair in zip(found, job(seed=8).find(), strict=True))
    assert all(one.best.score > one.first.score for one in found)


def test_a_prompt_does_not_depend_on_the_others_of_its_batch():
    alone = [job(prompts=Prompts((text,), ({"seed": i},))).find()[0] for i, text in enumerate(PROMPTS)]
    for one, other in zip(job(batch_size=3).find(), alone, strict=True):
        close(one.best.noise, other.best.noise, 1e-5)
    model = Identity()
    target = nearness(shell_point())
    whole = ReNO(model, target, PROMPTS, 6, GENTLE, 1e9, batch_size=2, prices=PRICES).find()
    for i, one in enumerate(whole):
        single = Prompts((PROMPTS[i],), ({"seed": i},))
        assert same(one, ReNO(model, target, single, 6, GENTLE, 1e9, prices=PRICES).find()[0])


def test_a_prompt_that_ends_early_makes_room_and_changes_no_other():
    """The second prompt's score is nan in its third call: the third prompt then starts, in calls of the same shape."""
    calls = {"n": 0}

    def broken(media: Media, prompts: Prompts) -> Tensor:
        calls["n"] += 1
        scores = brightness(media, prompts)
        bad = torch.tensor([text == PROMPTS[1] and calls["n"] >= 3 for text in prompts.text])
        return scores.where(~bad, torch.nan)

    whole, cut = job().find(), job(reward=differentiable(broken)).find()
    assert [one.tried for one in cut] == [5, 3, 5]
    assert (cut[1].invalid, cut[1].stopped) == (1, "the score of try 2 is not valid")
    assert cut[1].best.score >= cut[1].first.score
    for i in (0, 2):
        close(whole[i].best.noise, cut[i].best.noise, 1e-6)


def test_a_gradient_that_is_not_finite_ends_a_prompt_at_its_best():
    """sqrt |x - x| at the second prompt: the score is finite, and its gradient is not."""

    def cusp(media: Media, prompts: Prompts) -> Tensor:
        flat = [
            (one - one).abs().sum().sqrt() if text == "b" else one.sum()
            for one, text in zip(media.pixels, prompts.text, strict=True)
        ]
        return torch.stack(flat)

    one, other = ReNO(Identity(), differentiable(cusp), ["a", "b"], 4, batch_size=2, prices=PRICES).find()
    assert (one.tried, one.stopped) == (4, "")
    assert (other.tried, other.stopped, other.best.number) == (1, "the gradient of try 0 is not finite", 0)


def test_patience():
    search = ReNO(Identity(), nearness(shell_point()), ["x"], 50, Nesterov(1.0, 0.9), 1e9, patience=3, prices=PRICES)
    (found,) = search.find()
    assert found.tried == found.best.number + 4 < 50
    assert "no better score in 3 tries" in found.stopped


def test_a_stochastic_plan_has_the_same_noise_in_every_iteration():
    """A reward that is 0 everywhere: the noise rests on the shell, and so does the picture."""
    model = GaussianModel(dims=12, grid=linear(3))
    level = differentiable(lambda media, prompts: 0 * media.pixels.flatten(1).sum(1))
    plan = AllSteps(FlowSDE(0.7))
    search = ReNO(model, level, ["x", "y"], 3, regularisation=0.0, steps=3, plan=plan, batch_size=2, prices=PRICES)
    state = search.start()
    noise = torch.stack([search.sampler.noise(0)] * 2)
    first = search.sampler.call(noise, [0, 0], [0, 0]).pixels
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], search.sampler.call(noise, [0, 0], [0, 1]).pixels[1])
    assert len(list(search.rounds(state))) == 3


def test_a_noise_that_rests_has_the_same_score_in_every_iteration_of_a_stochastic_plan():
    """A score without slope: step noise of its own would make some later try the best."""

    def steady(media: Media, prompts: Prompts) -> Tensor:
        level = media.pixels.mean((1, 2, 3))
        return level.detach() + 0 * level

    settings: dict[str, Any] = {"plan": AllSteps(FlowSDE(0.7)), "batch_size": 3, "regularisation": 0.0}
    for found in job(reward=differentiable(steady), iterations=6, **settings).find():
        assert (found.tried, found.best.number) == (6, 0)


def test_recomputing_changes_nothing_but_the_cost():
    kept, anew = job(prompts=PROMPTS[:1]).find()[0], job(prompts=PROMPTS[:1], recompute=True).find()[0]
    assert same(kept, anew)
    assert kept.spent.network.gradient == anew.spent.network.gradient == 4 * 2
    assert (kept.spent.network.forward, anew.spent.network.forward) == (2, 4 * 2 + 2)


def test_videos():
    torch.manual_seed(3)
    model = Wan(tiny_wan(), height=32, width=32, frames=5, max_sequence_length=12)
    red = differentiable(lambda media, prompts: media.pixels[:, 0].mean((1, 2)))
    for reward in (OnFrames(red), differentiable(brightness)):
        (found,) = ReNO(model, reward, ["a red kite"], 4, prices=PRICES).find()
        assert found.best.score > found.first.score
        assert found.best.media.shape == (5, 3, 32, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": brightness}, "follows the reward's gradient, and brightness has none"),
        ({"iterations": 0}, "iterations and patience must be at least 1"),
        ({"patience": 0}, "iterations and patience must be at least 1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"regularisation": -1.0}, "regularisation at least 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"budget": 0.0}, "budget must be positive"),
        ({"prompts": []}, "prompts is empty"),
        ({"save_seconds": -1.0}, "save_seconds must be at least 0"),
    ],
)
def test_bad_settings(changes, message):
    settings = {"reward": differentiable(brightness), "prompts": ["x"], **changes}
    with pytest.raises(ValueError, match=message):
        ReNO(Identity(), settings.pop("reward"), settings.pop("prompts"), **settings)


def test_a_reward_that_only_says_that_it_has_a_gradient():
    search = ReNO(Identity(), differentiable(lambda media, prompts: [1.0]), ["x"], prices=PRICES)
    with pytest.raises(ValueError, match="but its scores have no gradient"):
        search.find()


def test_optimizers_refuse_rates_that_are_none():
    for bad in (lambda: Nesterov(0.0), lambda: Nesterov(1.0, 1.0), lambda: Adam(-1.0), lambda: Adam(eps=0.0)):
        with pytest.raises(ValueError, match="must be positive"):
            bad()

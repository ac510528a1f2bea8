"""The goal-baseline reward: its limits, the geometry of the projection, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_towers import check_finite_differences, save_clip
from torch import Tensor

from flowalign.records import Media, Prompts
from rewards.clip import CLIPScore
from rewards.goal import GoalBaselineCLIP, goal_baseline
from rewards.pixels import CLIP_MEAN, CLIP_STD, normalise

TEXTS = ("a red circle", "two blue squares", "", "x" * 60, "a cross", "a red circle", "blue")


def prompts(*texts: str) -> Prompts:
    return Prompts(texts, ({},) * len(texts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_clip(tmp_path_factory.mktemp("clip"), side=16, scale=0.15))


def units(count: int, width: int = 6) -> Tensor:
    return F.normalize(torch.randn(count, width, dtype=torch.float64), dim=1)


def test_without_projection_it_is_the_cosine() -> None:
    state, goal, baseline = units(5), units(5), units(5)
    torch.testing.assert_close(goal_baseline(state, goal, baseline, 0.0), (state * goal).sum(1))


def test_by_hand() -> None:
    """In the plane: from b = (1, 0) to g = (0, 1), s = (.6, .8) is projected to (.4, .6), .4 sqrt(2) away from g."""
    state, goal, baseline = (torch.tensor([v], dtype=torch.float64) for v in ((0.6, 0.8), (0.0, 1.0), (1.0, 0.0)))
    assert goal_baseline(state, goal, baseline, 1.0).item() == pytest.approx(1 - 0.32 / 2)
    halfway = torch.tensor([0.5, 0.7]) - goal[0]
    assert goal_baseline(state, goal, baseline, 0.5).item() == pytest.approx(1 - halfway.square().sum().item() / 2)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_formula_as_it_is_written(alpha: float) -> None:
    """The projection onto an affine line, once more with least squares."""
    state, goal, baseline = units(4), units(4), units(4)
    for s, g, b, ours in zip(state, goal, baseline, goal_baseline(state, goal, baseline, alpha), strict=True):
        along = torch.linalg.lstsq((g - b)[:, None], (s - b)[:, None]).solution[0, 0]
        projected = b + along * (g - b)
        expected = 1 - 0.5 * (alpha * projected + (1 - alpha) * s - g).norm() ** 2
        assert ours.item() == pytest.approx(expected.item(), abs=1e-12)


def test_what_is_not_on_the_line_does_not_count() -> None:
    goal, baseline, state = units(3), units(3), units(3)
    line = goal - baseline
    aside = torch.randn(3, 6, dtype=torch.float64)
    aside = aside - (aside * line).sum(1, keepdim=True) / line.square().sum(1, keepdim=True) * line
    kept = goal_baseline(state + aside, goal, baseline, 1.0)
    torch.testing.assert_close(kept, goal_baseline(state, goal, baseline, 1.0))
    assert (goal_baseline(state + line, goal, baseline, 1.0) != kept).all()
    assert goal_baseline(goal, goal, baseline, 0.7).tolist() == [1.0] * 3


def test_gradient_of_the_formula() -> None:
    state, goal, baseline = units(2).requires_grad_(), units(2), units(2)
    assert torch.autograd.gradcheck(lambda s: goal_baseline(s, goal, baseline, 0.4), (state,))


def test_the_reward(folder: str) -> None:
    media, asked = Media(torch.rand(7, 3, 20, 16)), prompts(*TEXTS)
    cosine = CLIPScore(folder)(media, asked).total
    torch.testing.assert_close(GoalBaselineCLIP(alpha=0.0, model=folder)(media, asked).total, cosine)
    reward = GoalBaselineCLIP("a photo", 0.5, folder, batch_size=2)
    cpu = torch.device("cpu")
    goals, starts = reward.embed_texts([*TEXTS], cpu), reward.embed_texts(["a photo"] * 7, cpu)
    together = reward(media, asked).total
    torch.testing.assert_close(together, goal_baseline(reward.embed_media(media), goals, starts, 0.5))
    assert (together - cosine).abs().max() > 0.01
    for chunk in (1, 3):
        torch.testing.assert_close(reward(media, asked, chunk=chunk).total, together, rtol=0, atol=1e-5)
    order = [3, 0, 6, 2, 5, 1, 4]
    torch.testing.assert_close(reward(media.rows(order), asked.rows(order)).total, together[order], rtol=0, atol=1e-5)


def test_a_prompts_own_baseline(folder: str) -> None:
    media = Media(torch.rand(2, 3, 16, 16))
    mixed = Prompts(("a red circle",) * 2, ({"baseline": "a circle"}, {}))
    ours = GoalBaselineCLIP("a photo", model=folder)(media, mixed).total
    for i, baseline in enumerate(("a circle", "a photo")):
        alone = GoalBaselineCLIP(baseline, model=folder)(media.rows([i]), prompts("a red circle")).total
        torch.testing.assert_close(ours[i : i + 1], alone, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="a prompt's 'baseline' must be a text, got 3"):
        GoalBaselineCLIP(model=folder)(media, Prompts(("a", "b"), ({}, {"baseline": 3})))


def test_a_goal_that_is_its_baseline_has_no_score(folder: str) -> None:
    pixels = torch.rand(3, 3, 16, 16)
    pixels[2, 0, 0, 0] = torch.nan
    scores = GoalBaselineCLIP("a photo", model=folder)(Media(pixels), prompts("a circle", "a photo", "a cross"))
    assert scores.valid.tolist() == [True, False, False]
    assert math.isnan(scores.total[1])


def test_gradient_climbs(folder: str) -> None:
    reward, asked = GoalBaselineCLIP(model=folder), prompts("a red circle")
    pixels = (0.3 + 0.4 * torch.rand(1, 3, 16, 16)).requires_grad_()
    before = reward(Media(pixels), asked, grad=True).total
    before.sum().backward()
    assert pixels.grad is not None
    step = 0.1 * pixels.grad / pixels.grad.abs().max()
    up, down = (reward(Media(pixels.detach() + sign * step), asked).total for sign in (1, -1))
    assert down < before < up


def test_gradient_against_finite_differences(folder: str) -> None:
    """Pictures in 8 bits of the network's size, where nothing is rounded; differences of the formula on the network."""
    reward = GoalBaselineCLIP("a photo", 0.5, folder)
    levels = torch.randint(0, 256, (1, 3, 16, 16)).div(255).requires_grad_()
    total = reward(Media(levels), prompts("a red circle"), grad=True).total
    (slope,) = torch.autograd.grad(total.sum(), levels)
    goal, start = reward.embed_texts(["a red circle", "a photo"], torch.device("cpu")).double().split(1)
    reward.model.double()

    def smooth(pixels: Tensor) -> Tensor:
        shown = normalise(pixels, CLIP_MEAN, CLIP_STD)
        state = F.normalize(reward.model.get_image_features(pixel_values=shown).pooler_output, dim=1)
        return goal_baseline(state, goal, start, 0.5).sum()

    assert smooth(levels.detach().double()).item() == pytest.approx(total.item(), abs=1e-5)
    check_finite_differences(slope, smooth, levels.detach())


def test_wrong_alpha(folder: str) -> None:
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        GoalBaselineCLIP(alpha=1.5, model=folder)

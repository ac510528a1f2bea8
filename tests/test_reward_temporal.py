"""Rewards of time: VBench's formulas by hand on torchvision's own resize; still videos win, but for motion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_towers import save_vit
from torch import Tensor
from transformers import CLIPModel, ViTModel

from flowalign.config import build
from flowalign.records import Media, Prompts
from flowalign.shapes import WEIGHTS
from rewards import Reward
from rewards.pixels import IMAGENET_MEAN, IMAGENET_STD
from rewards.temporal import (
    BackgroundConsistency,
    FrameConsistency,
    FrameDynamics,
    SubjectConsistency,
    TemporalFlickering,
    consistency,
    motion,
    resize_plain,
    stillness,
)

GOLDEN = Path(__file__).parent / "golden" / "rewards" / "temporal.safetensors"


def prompts(count: int) -> Prompts:
    return Prompts(("",) * count, ({},) * count)


def moving(count: int = 7, frames: int = 5, side: int = 32, speed: int = 3, seed: int = 0) -> Tensor:
    """Videos of smooth noise that slides to the right."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    picture = F.interpolate(coarse, (side, side), mode="bilinear")
    return torch.stack([picture.roll(i * speed, 3) for i in range(frames)], 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def rewards(folder: Path) -> dict[str, Reward]:
    return {
        "subject": SubjectConsistency(str(folder), batch_size=4),
        "background": BackgroundConsistency("shapes", batch_size=4),
        "flicker": TemporalFlickering(),
        "dynamics": FrameDynamics(),
    }


STEADY = ("subject", "background", "flicker")
ALL = (*STEADY, "dynamics")


def by_hand(features: Tensor) -> float:
    """VBench's loop over the frames of one video."""
    total = 0.0
    for i in range(1, len(features)):
        before = F.cosine_similarity(features[i], features[i - 1], dim=0).item()
        first = F.cosine_similarity(features[i], features[0], dim=0).item()
        total += (max(0.0, before) + max(0.0, first)) / 2
    return total / (len(features) - 1)


def test_consistency_by_hand() -> None:
    features = torch.randn(6, 5, 4)
    assert consistency(features).tolist() == pytest.approx([by_hand(one) for one in features], abs=1e-6)
    e, f = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert consistency(torch.stack([e, e, f, -e])[None]).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["down", "up", "wide"])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resize_is_torchvisions(name: str, mode: str) -> None:
    held = load_file(GOLDEN)
    ours = resize_plain(held[f"{name}/frames"] / 255, 16, mode, exact=True)
    assert torch.equal((ours * 255).round().byte(), held[f"{name}/{mode}"])
    plain = resize_plain(held[f"{name}/frames"] / 255, 16, mode, exact=False)
    assert 1e-4 < (plain - ours).abs().max() < (0.3 if mode == "bicubic" else 0.6 / 255), "which overshoots [0, 1]"


@pytest.mark.parametrize("side", [32, 45])
def test_subject_consistency_is_dinos_class_token(folder: Path, side: int) -> None:
    pixels = moving(3, side=side)
    model = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    expected = []
    for video in pixels:
        frames = F.interpolate((video * 255).round(), (32, 32), mode="bilinear").round() / 255
        with torch.no_grad():
            expected.append(by_hand(model((frames - mean) / std).last_hidden_state[:, 0]))
    scores = SubjectConsistency(str(folder))(Media(pixels, 8.0), prompts(3))
    assert torch.tensor(expected).std() > 1e-3
    assert scores.total.tolist() == pytest.approx(expected, abs=1e-5)
    assert list(scores.parts) == ["subject_consistency"]


def test_background_consistency_is_clips_picture_embedding() -> None:
    pixels = moving(3, side=40)
    reward = BackgroundConsistency("shapes")
    model = CLIPModel.from_pretrained(WEIGHTS / "clip", dtype=torch.float32)
    mean, std = (torch.tensor(values)[:, None, None] for values in (reward.prepare.mean, reward.prepare.std))
    expected = []
    for video in pixels:
        frames = F.interpolate((video * 255).round(), (32, 32), mode="bicubic").clamp(0, 255).round() / 255
        with torch.no_grad():
            expected.append(by_hand(model.get_image_features(pixel_values=(frames - mean) / std).pooler_output))
    assert torch.tensor(expected).std() > 1e-3
    assert reward(Media(pixels, 8.0), prompts(3)).total.tolist() == pytest.approx(expected, abs=1e-5)


def test_frames_that_are_not_square(folder: Path) -> None:
    wide = F.interpolate(moving(2).flatten(0, 1), (32, 56)).unflatten(0, (2, 5))
    scores = SubjectConsistency(str(folder))(Media(wide, 8.0), prompts(2))
    assert scores.valid.all()
    assert ((scores.total > 0) & (scores.total < 1)).all()
    cut = BackgroundConsistency("shapes")
    odd = F.interpolate(moving(2).flatten(0, 1), (32, 59)).unflatten(0, (2, 5))
    for whole, left in ((wide, 12), (odd, 14)):  # a margin of 27: torchvision rounds 13.5 to 14
        middle = whole[..., left : left + 32]
        assert torch.equal(cut(Media(whole, 8.0), prompts(2)).total, cut(Media(middle, 8.0), prompts(2)).total)


def test_flicker_by_hand() -> None:
    levels = torch.tensor([[0.5, 0.5, 0.5], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]])
    videos = levels[:, :, None, None, None].expand(-1, -1, 3, 4, 4).clone()
    assert TemporalFlickering()(Media(videos, 8.0), prompts(3)).total.tolist() == pytest.approx([1, 0, 0.85])
    pixels = torch.randint(0, 256, (2, 4, 3, 8, 8)).double()
    expected = [(255 - (video[1:] - video[:-1]).abs().mean().item()) / 255 for video in pixels]
    assert TemporalFlickering()(Media(pixels.float() / 255, 8.0), prompts(2)).total.tolist() == pytest.approx(expected)


def test_dynamics_by_hand() -> None:
    video = torch.zeros(2, 3, 3, 40, 40)
    video[1, 1, :, :8, :8] = 0.3  # 4 of 100 squares of 4 pixels, less than the 5 that count; then back
    scores = FrameDynamics(brisk=0.06)(Media(video, 8.0), prompts(2))
    change = 4 * 0.3 / 5
    assert scores.total.tolist() == pytest.approx([0, change / (change + 0.06)], abs=1e-6)
    checkered = torch.zeros(1, 2, 3, 8, 8)
    checkered[0, 1, :, ::2, ::2] = 0.2  # one of four pixels
    assert FrameDynamics(0.05, 4)(Media(checkered, 8.0), prompts(1)).total.item() == pytest.approx(0.5)
    assert FrameDynamics(0.05, 1)(Media(checkered, 8.0), prompts(1)).total.item() == pytest.approx(0.8)


def test_a_frozen_video_is_the_most_consistent_and_the_least_dynamic(rewards: dict[str, Reward]) -> None:
    pixels = moving()
    frozen = pixels[:, :1].expand_as(pixels)
    slower = moving(speed=1)
    for name in STEADY:
        still, slow, fast = (rewards[name](Media(p, 8.0), prompts(7)).total for p in (frozen, slower, pixels))
        assert torch.allclose(still, torch.ones(7), atol=1e-6)
        assert (slow < 1 - 1e-3).all()
        assert (fast < 1 - 1e-3).all()
        assert (fast < slow - 0.01).all() or name != "flicker"
    still, slow, fast = (rewards["dynamics"](Media(p, 8.0), prompts(7)).total for p in (frozen, slower, pixels))
    assert (still == 0).all()
    assert (slow > 0.1).all()
    assert (fast > slow + 0.05).all()


def test_consistency_beside_dynamics_prefers_motion(rewards: dict[str, Reward]) -> None:
    pixels = moving()
    frozen = Media(pixels[:, :1].expand_as(pixels), 8.0)
    both = rewards["subject"] + rewards["dynamics"]
    assert (both(Media(pixels, 8.0), prompts(7)).total > both(frozen, prompts(7)).total).all()


@pytest.mark.parametrize("name", ALL)
def test_batches_order_and_chunks_change_nothing(rewards: dict[str, Reward], name: str) -> None:
    media, reward = Media(moving(seed=2), 8.0), rewards[name]
    whole = reward(media, prompts(7)).total
    assert whole.std() > 1e-3
    order = [6, 0, 3, 1, 5, 2, 4]
    for other in (
        torch.cat([reward(media.rows([i]), prompts(1)).total for i in range(7)]),
        reward(media, prompts(7), chunk=3).total,
        reward(media.rows(order), prompts(7)).total[torch.tensor(order).argsort()],
    ):
        torch.testing.assert_close(other, whole, rtol=0, atol=2e-6)


def check_gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> None:
    """Central differences in eight directions in float64."""
    at = at.double().requires_grad_()
    (slope,) = torch.autograd.grad(function(at).sum(), at)
    assert slope.abs().max() > 0
    directions = torch.randn(8, *at.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for direction in directions:
            measured = (function(at + 1e-6 * direction) - function(at - 1e-6 * direction)).sum() / 2e-6
            assert measured.item() == pytest.approx((slope * direction).sum().item(), rel=1e-3)


@pytest.mark.parametrize("kind", [SubjectConsistency, BackgroundConsistency])
def test_gradient_of_consistency_is_that_of_finite_differences(folder: Path, kind: type[FrameConsistency]) -> None:
    model = str(folder) if kind is SubjectConsistency else "shapes"
    reward = kind(model, exact=False)
    pixels = 0.2 + 0.6 * moving(1, 3, side=40)
    media = Media(pixels.clone().requires_grad_(), 8.0)
    (own,) = torch.autograd.grad(reward(media, prompts(1), grad=True).total.sum(), media.pixels)
    reward.model.double()

    def scored(given: Tensor) -> Tensor:
        return consistency(reward.embed(given.flatten(0, 1)).unflatten(0, (1, 3)))

    check_gradient(scored, pixels)
    exact = pixels.double().requires_grad_()
    (slope,) = torch.autograd.grad(scored(exact).sum(), exact)
    torch.testing.assert_close(own.double(), slope, rtol=1e-3, atol=1e-5 * slope.abs().max().item())


def test_gradient_through_the_rounding_is_about_the_plain_one(folder: Path) -> None:
    slopes = []
    for exact in (True, False):
        pixels = moving(2, 3, side=40).requires_grad_()
        SubjectConsistency(str(folder), exact=exact)(Media(pixels, 8.0), prompts(2), grad=True).total.sum().backward()
        assert pixels.grad is not None
        slopes.append(pixels.grad.flatten())
    assert F.cosine_similarity(slopes[0], slopes[1], dim=0) > 0.95


def test_gradients_of_flicker_and_dynamics() -> None:
    pixels = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    for reward, function in (
        (TemporalFlickering(), stillness),
        (FrameDynamics(0.1, 2), lambda given: motion(given, 0.1, 2)),
    ):
        check_gradient(function, pixels)
        media = Media(pixels.clone().requires_grad_(), 8.0)
        (own,) = torch.autograd.grad(reward(media, prompts(2), grad=True).total.sum(), media.pixels)
        exact = pixels.double().requires_grad_()
        (slope,) = torch.autograd.grad(function(exact).sum(), exact)
        torch.testing.assert_close(own.double(), slope, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_a_video_that_is_not_finite_has_no_score(rewards: dict[str, Reward], name: str) -> None:
    pixels = moving(3)
    pixels[0, 2, 1, 5, 5], pixels[2, 0, 0, 1, 1] = torch.nan, torch.inf
    assert rewards[name](Media(pixels, 8.0), prompts(3)).valid.tolist() == [False, True, False]


@pytest.mark.parametrize("name", ALL)
def test_wrong_media(rewards: dict[str, Reward], name: str) -> None:
    with pytest.raises(ValueError, match="needs at least 2, and these videos have 1"):
        rewards[name](Media(moving(2, 1), 8.0), prompts(2))
    with pytest.raises(ValueError, match="scores videos"):
        rewards[name](Media(torch.rand(2, 3, 32, 32)), prompts(2))


def test_wrong_settings(folder: Path) -> None:
    for kind, model in ((SubjectConsistency, str(folder)), (BackgroundConsistency, "shapes")):
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            kind(model, batch_size=0)
    for settings in ({"brisk": 0.0}, {"smooth": 0}):
        with pytest.raises(ValueError, match="brisk must be above 0 and smooth at least 1"):
            FrameDynamics(**settings)
    with pytest.raises(ValueError, match="smaller than squares of 4"):
        FrameDynamics()(Media(torch.rand(1, 2, 3, 3, 8), 8.0), prompts(1))


def test_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a model of type 'clip', and one of type 'vit' is needed"):
        SubjectConsistency(str(WEIGHTS / "clip"))
    ViTModel(ViTModel.from_pretrained(folder).config, add_pooling_layer=True).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"has 2 that do not belong to it \(pooler\.dense\.bias, pooler\.dense\.weight\)"
    ):
        SubjectConsistency(str(tmp_path))
    with pytest.raises(ValueError, match="can be had neither as a folder nor from the hub; pass model=") as caught:
        SubjectConsistency("no-one/no-such-model")
    assert "\n" not in str(caught.value)


def test_they_are_built_from_a_config(folder: Path) -> None:
    assert build(SubjectConsistency, {"model": str(folder), "size": 40}).size == 40
    assert build(FrameDynamics, {"brisk": 1}).brisk == 1.0

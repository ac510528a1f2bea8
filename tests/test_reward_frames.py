"""Picture rewards on frames: mean and least by hand, weights and frames of InstructVideo, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flowalign.config import build
from flowalign.records import Media, Prompts, Scores
from flowalign.shapes import train_prompts
from flowalign.shapes.scenes import Spec, render
from rewards import CLIPScore, JPEGCompressibility, Reward
from rewards.base import Card, simple_scores
from rewards.frames import OnFrames, attenuated, drawn, middles, spread


class Brightness(Reward):
    """The mean of all pixels, the largest of them as a part, and how many pictures it was given at once."""

    name, differentiable = "brightness", True
    card = Card(weights="none", usual=(0.0, 1.0))

    def __init__(self, broken: float | None = None) -> None:
        self.broken, self.seen = broken, list[int]()

    def score(self, media: Media, prompts: Prompts) -> Scores:
        self.seen.append(len(media))
        total = media.pixels.mean((1, 2, 3))
        if self.broken is not None:
            total = total.where((total - self.broken).abs() > 1e-6, torch.nan)
        return simple_scores(self.name, total, {"largest": media.pixels.amax((1, 2, 3))})


class Likeness(Reward):
    """Minus the distance to the first reference, times the letters of the prompt."""

    name = "likeness"

    def score(self, media: Media, prompts: Prompts) -> Scores:
        assert media.references is not None
        near = [-(one - own[0]).abs().mean() for one, own in zip(media.pixels, media.references, strict=True)]
        return simple_scores(self.name, torch.stack(near) * torch.tensor([float(len(t)) for t in prompts.text]))


class Grouped(Brightness):
    card = Card(scope="group")


def prompts(count: int) -> Prompts:
    return Prompts(tuple("x" * (1 + i) for i in range(count)), ({},) * count)


def grey(*levels: tuple[float, ...]) -> Media:
    """Videos of 4 x 4 pixels whose frames are of one level each."""
    return Media(torch.tensor(levels)[:, :, None, None, None].expand(-1, -1, 3, 4, 4).clone(), 8.0)


def noise(count: int, frames: int = 8) -> Media:
    return Media(torch.rand(count, frames, 3, 8, 8, generator=torch.Generator().manual_seed(3)), 8.0)


def test_mean_and_least_by_hand() -> None:
    media = grey((0.0, 0.25, 0.5, 1.0), (0.5, 0.5, 0.25, 0.75))
    mean, least = OnFrames(Brightness())(media, prompts(2)), OnFrames(Brightness(), reduce="min")(media, prompts(2))
    assert mean.total.tolist() == [0.4375, 0.5]
    assert least.total.tolist() == [0.0, 0.25]
    assert least.parts["largest"].tolist() == [0.0, 0.25], "of the frame with the lowest score"
    assert list(mean.parts) == ["brightness", "largest"]
    assert mean.valid.all()


def test_weights_by_hand() -> None:
    media = grey((0.0, 0.25, 0.5, 1.0))
    raw = [math.exp(-0.5 * abs(i - 2)) for i in range(4)]
    expected = sum(w * x for w, x in zip(raw, (0.0, 0.25, 0.5, 1.0), strict=True)) / sum(raw)
    assert OnFrames(Brightness(), attenuation=0.5)(media, prompts(1)).total.item() == pytest.approx(expected, abs=1e-7)


def test_weights_and_frames_are_instruct_videos() -> None:
    """Of 16 frames in 4 segments the authors weigh .0025 .135 .135 .0025; here the same with sum 1."""
    index = middles(16, 4)
    assert index.tolist() == [2, 6, 10, 14]
    theirs = torch.exp(-(index - 8.0).abs())
    assert theirs.tolist() == pytest.approx([0.0025, 0.135, 0.135, 0.0025], abs=5e-4)
    ours = attenuated(index[None], 16, 1.0)[0]
    torch.testing.assert_close(ours, (theirs / theirs.sum()).double(), rtol=0, atol=1e-7)
    assert ours.sum().item() == pytest.approx(1)
    assert attenuated(index[None], 16, 0.0).tolist() == [[0.25] * 4]


def test_which_frames() -> None:
    assert spread(9, 3).tolist() == [0, 4, 8]
    assert spread(9, 1).tolist() == [4]
    assert spread(5, 5).tolist() == middles(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert middles(10, 3).tolist() == [1, 5, 8]
    levels = grey(tuple(i / 8 for i in range(9)))
    assert OnFrames(Brightness(), 3)(levels, prompts(1)).total.item() == 0.5
    assert OnFrames(Brightness(), 1)(levels, prompts(1)).total.item() == 0.5
    assert OnFrames(Brightness(), 2, "segments")(levels, prompts(1)).total.item() == pytest.approx((2 + 6) / 16)


def test_draws_are_in_their_segments_and_depend_on_seed_and_video_alone() -> None:
    media = noise(40, frames=10)
    index = torch.stack([drawn(video, 3, seed=1) for video in media.pixels])
    edges = torch.tensor([0, 3, 6, 10])
    assert ((index >= edges[:-1]) & (index < edges[1:])).all()
    for segment in range(3):
        assert len(index[:, segment].unique()) == edges[segment + 1] - edges[segment], "every frame is drawn"
    again = torch.stack([drawn(video, 3, seed=1) for video in media.pixels])
    other = torch.stack([drawn(video, 3, seed=2) for video in media.pixels])
    assert torch.equal(index, again)
    assert not torch.equal(index, other)
    torch.manual_seed(99)
    assert torch.equal(drawn(media.pixels[7], 3, seed=1), index[7])


REWARDS = [
    OnFrames(Brightness()),
    OnFrames(Brightness(), 3, "segments", 0.3, seed=5),
    OnFrames(Brightness(), 4, reduce="min", batch_size=5),
    OnFrames(2 * Brightness() - JPEGCompressibility(), 2),
]


@pytest.mark.parametrize("reward", REWARDS)
def test_batches_order_and_chunks_change_nothing(reward: OnFrames) -> None:
    media, asked = noise(7), prompts(7)
    whole = reward(media, asked).total
    assert whole.std() > 1e-3
    singles = torch.cat([reward(media.rows([i]), asked.rows([i])).total for i in range(7)])
    torch.testing.assert_close(singles, whole, rtol=0, atol=1e-6)
    order = [6, 0, 3, 1, 5, 2, 4]
    torch.testing.assert_close(reward(media.rows(order), asked.rows(order)).total, whole[order], rtol=0, atol=1e-6)
    torch.testing.assert_close(reward(media, asked, chunk=3).total, whole, rtol=0, atol=1e-6)


def test_chunks_over_frames_hold_what_they_say() -> None:
    inner = Brightness()
    OnFrames(inner, batch_size=5)(noise(3), prompts(3))
    assert inner.seen == [5, 5, 5, 5, 4]


def test_each_frame_gets_its_videos_prompt_and_references() -> None:
    own = (torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
    media = Media(grey((0.25, 0.75), (0.25, 0.25)).pixels, 8.0, own)
    assert OnFrames(Likeness())(media, prompts(2)).total.tolist() == [-0.5, -1.5]


def test_one_frame_without_a_score_leaves_the_video_without_one() -> None:
    media = grey((0.25, 0.5), (0.25, 0.75))
    for reduce in ("mean", "min"):
        scores = OnFrames(Brightness(broken=0.5), reduce=reduce)(media, prompts(2))
        assert scores.valid.tolist() == [False, True]
        assert scores.total[0].isnan()


def test_the_gradient_is_the_weights() -> None:
    pixels = grey((0.0, 0.25, 0.5, 1.0)).pixels.requires_grad_()
    OnFrames(Brightness(), attenuation=0.5)(Media(pixels, 8.0), prompts(1), grad=True).total.sum().backward()
    raw = torch.tensor([math.exp(-0.5 * abs(i - 2)) for i in range(4)])
    assert pixels.grad is not None
    torch.testing.assert_close(pixels.grad.sum((2, 3, 4))[0], raw / raw.sum())
    pixels.grad = None
    OnFrames(Brightness(), reduce="min")(Media(pixels, 8.0), prompts(1), grad=True).total.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.sum((2, 3, 4))[0].tolist() == pytest.approx([1, 0, 0, 0])


def test_a_real_reward_on_a_video_of_its_scenes() -> None:
    world = train_prompts(4, seed=1)
    scenes = [render(Spec.from_dict(m["spec"]), np.random.default_rng(i)) for i, m in enumerate(world.metadata)]
    frames = torch.stack([torch.from_numpy(scene) for scene in scenes]).float() / 255
    clip = CLIPScore("shapes")
    asked = world.rows([0])
    single = clip(Media(frames), world.rows([0, 0, 0, 0])).total
    assert OnFrames(clip)(Media(frames[None], 8.0), asked).total.item() == pytest.approx(single.mean().item(), abs=1e-5)
    assert OnFrames(clip, reduce="min")(Media(frames[None], 8.0), asked).total.item() == pytest.approx(
        single.min().item(), abs=1e-5
    )


def test_its_card_is_the_rewards_but_for_videos() -> None:
    reward = OnFrames(Brightness())
    assert (reward.name, reward.card.modality, reward.card.usual) == ("brightness", "video", (0.0, 1.0))
    assert reward.differentiable
    assert not OnFrames(JPEGCompressibility()).differentiable
    with pytest.raises(ValueError, match="has no gradient"):
        OnFrames(JPEGCompressibility())(noise(1), prompts(1), grad=True)
    sized = OnFrames(JPEGCompressibility()).score(noise(1), prompts(1))
    assert not sized.total.requires_grad


def test_it_is_built_from_a_config() -> None:
    inner = {"class": "rewards.JPEGCompressibility"}
    made = build(OnFrames, {"reward": inner, "frames": 4, "sampling": "segments", "attenuation": 1})
    assert (made.frames, made.attenuation) == (4, 1.0)
    assert build(OnFrames, {"reward": inner}).frames == "all"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": Grouped()}, "scores each picture on its own"),
        ({"reward": OnFrames(Brightness())}, "scores each picture on its own, brightness looks at video"),
        ({"frames": 0}, "at least 1, got 0"),
        ({"attenuation": -1.0}, "attenuation must be at least 0"),
        ({"attenuation": math.nan}, "attenuation must be at least 0"),
        ({"attenuation": math.inf}, "attenuation must be at least 0 and finite"),
        ({"attenuation": 1.0, "reduce": "min"}, "0 with the minimum"),
        ({"seed": 1}, "a seed draws frames out of segments"),
        ({"seed": 1, "sampling": "segments"}, "a seed draws frames out of segments"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnFrames(**({"reward": Brightness()} | settings))


def test_wrong_media() -> None:
    with pytest.raises(ValueError, match="looks at 9 frames, and these videos have 8"):
        OnFrames(Brightness(), 9)(noise(1), prompts(1))
    with pytest.raises(ValueError, match="scores videos"):
        OnFrames(Brightness())(Media(torch.rand(1, 3, 4, 4)), prompts(1))
    with pytest.raises(ValueError, match=r"OnFrames scores videos .* \[1, 3, 4, 4\]"):
        OnFrames(Brightness()).score(Media(torch.rand(1, 3, 4, 4)), prompts(1))
    assert len(OnFrames(Brightness())(Media(torch.rand(0, 5, 3, 4, 4), 8.0), prompts(0))) == 0

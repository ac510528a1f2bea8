"""The embedded world of videos: a verifier that is right about motion and hard to please, and the reward it makes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flowalign.config import build
from flowalign.records import Media, Prompts
from flowalign.shapes.scenes import COLORS, GREY, SHAPES, SIZE, Placed
from flowalign.shapes.scenes import draw as draw_picture
from flowalign.shapes.video import held_out_prompts, train_prompts
from flowalign.shapes.video.prompts import meaning
from flowalign.shapes.video.render import APART, BORDER, CLOSING, MET, WAY, Course, draw, place, render
from flowalign.shapes.video.scenes import (
    DIRECTIONS,
    KINDS,
    Actor,
    Spec,
    corrupt,
    random_spec,
)
from flowalign.shapes.video.tracks import fit
from flowalign.shapes.video.verifier import passes, verify
from rewards import ShapesVideoVerifier
from rewards.base import Reward

SCENES = 600
RED, BLUE = Actor("red", "circle", "left"), Actor("blue", "square")


def tensor(videos: np.ndarray) -> Tensor:
    return torch.from_numpy(videos).float() / 255


def film(*courses: Course, frames: int = 9) -> Tensor:
    return tensor(draw([list(courses)], frames))


def course(actor: Actor, start: tuple[float, float], end: tuple[float, float], radius: float = 4.5) -> Course:
    return Course(actor, radius, start, end, 5)


def strict(video: Tensor, spec: Spec) -> bool:
    return bool(verify(video, [spec])[1])


def specs_drawn(count: int, seed: int, kinds: tuple[str, ...] = KINDS) -> list[Spec]:
    rng = np.random.default_rng(seed)
    return [random_spec(rng, kinds) for _ in range(count)]


@cache
def scenes() -> tuple[list[Spec], Tensor]:
    specs = specs_drawn(SCENES, 7)
    return specs, tensor(render(specs, np.random.default_rng(8)))


def blurred(videos: Tensor) -> Tensor:
    frames = F.avg_pool2d(F.pad(videos.flatten(0, 1), (1, 1, 1, 1), mode="replicate"), 3, 1)
    return frames.unflatten(0, videos.shape[:2])


def pooled(videos: Tensor) -> Tensor:
    half = F.avg_pool2d(videos.flatten(0, 1), 2)
    return F.interpolate(half, scale_factor=2, mode="bilinear").unflatten(0, videos.shape[:2])


def test_right_videos_pass() -> None:
    specs, videos = scenes()
    verdict = verify(videos, specs)[1].numpy()
    assert verdict.mean() >= 0.99
    for kind in KINDS:
        assert verdict[[spec.kind == kind for spec in specs]].mean() >= 0.98, kind


def test_videos_of_corrupted_captions_do_not_pass() -> None:
    rng = np.random.default_rng(9)
    specs, videos = scenes()
    assert verify(videos, [corrupt(spec, rng) for spec in specs])[1].float().mean() < 0.002


def test_videos_of_other_captions_do_not_pass() -> None:
    """But for those that fit both captions, as what moves left slowly moves left."""
    specs, videos = scenes()

    def plain(spec: Spec) -> str:
        return meaning(replace(spec, actors=tuple(replace(actor, speed=None) for actor in spec.actors)))

    rows = [i for i in range(SCENES - 1) if plain(specs[i]) != plain(specs[i + 1])]
    assert len(rows) > 0.9 * SCENES
    assert verify(videos[rows], [specs[i + 1] for i in rows])[1].float().mean() < 0.002


def test_blur_noise_and_paleness_are_forgiven() -> None:
    specs, videos = scenes()[0][:240], scenes()[1][:240]
    noisy = (blurred(videos) + 0.03 * torch.randn(videos.shape)).clamp(0, 1)
    assert verify(noisy, specs)[1].float().mean() >= 0.97
    assert verify(0.85 * (noisy - GREY) + GREY, specs)[1].float().mean() >= 0.95
    assert verify(pooled(videos), specs)[1].float().mean() >= 0.97


JUMP = [0] * 5 + [8] * 4


@pytest.mark.parametrize(
    ("order", "kinds"),
    [
        pytest.param([0] * 9, KINDS, id="frozen first"),
        pytest.param([8] * 9, KINDS, id="frozen last"),
        pytest.param([*range(8, -1, -1)], KINDS, id="backwards"),
        pytest.param([4, 0, 8, 2, 6, 1, 7, 3, 5], KINDS, id="shuffled"),
        pytest.param([0, 8] * 4 + [8], KINDS, id="flicker"),
        pytest.param(JUMP, tuple(kind for kind in KINDS if kind != "change"), id="a jump is no motion"),
    ],
)
def test_frames_in_another_order_do_not_pass(order: list[int], kinds: tuple[str, ...]) -> None:
    specs = specs_drawn(200, 10, kinds)
    videos = tensor(render(specs, np.random.default_rng(11)))
    assert not verify(videos[:, order], specs)[1].any()


def test_noise_and_blank_videos_show_nothing() -> None:
    specs = scenes()[0][:60]
    shape = (60, 9, 3, SIZE, SIZE)
    for videos in (torch.rand(shape), torch.full(shape, GREY), torch.randn(shape), torch.zeros(shape)):
        scores, verdict = verify(videos, specs)
        assert not verdict.any()
        assert all(0 <= value <= 1 for score in scores for value in score.values())


STARTS = {"left": (22.0, 14.0), "right": (10.0, 14.0), "up": (14.0, 22.0), "down": (14.0, 10.0)}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_object_has_a_colour_a_shape_and_a_direction(shape: str, direction: str) -> None:
    start = STARTS[direction]
    end = start[0] + 10 * DIRECTIONS[direction][0], start[1] + 10 * DIRECTIONS[direction][1]
    video = film(course(Actor("green", shape, direction), start, end))
    for other in COLORS:
        assert strict(video, Spec("move", (Actor(other, shape, direction),))) == (other == "green")
    for other in SHAPES:
        assert strict(video, Spec("move", (Actor("green", other, direction),))) == (other == shape)
    for other in DIRECTIONS:
        assert strict(video, Spec("move", (Actor("green", shape, other),))) == (other == direction)
    assert not strict(video, Spec("change", (Actor("green", shape, becomes="blue"),)))


@pytest.mark.parametrize("frames", [5, 9, 17])
def test_speed_is_the_way_whatever_the_number_of_frames(frames: int) -> None:
    for way, word in ((5.5, "slowly"), (16.0, "quickly")):
        video = film(course(RED, (26.0, 10.0), (26.0 - way, 10.0)), frames=frames)
        for asked in ("slowly", "quickly"):
            assert strict(video, Spec("speed", (replace(RED, speed=asked),))) == (asked == word)


@pytest.mark.parametrize("frames", [5, 13])
def test_videos_of_other_lengths_pass(frames: int) -> None:
    specs = specs_drawn(120, 12)
    assert verify(tensor(render(specs, np.random.default_rng(13), frames)), specs)[1].float().mean() >= 0.97


def test_what_else_is_there_or_moves_is_seen() -> None:
    spec = Spec("still", (RED, BLUE))
    moving, still = course(RED, (24, 8), (12, 8)), course(BLUE, (10, 24), (10, 24))
    other = course(Actor("white", "cross"), (26, 24), (26, 24), 4)
    assert strict(film(moving, still), spec)
    assert not strict(film(moving, still, other), spec)
    assert not strict(film(moving), spec)
    assert not strict(film(moving, replace(still, end=(20, 24))), spec)
    there_and_back = film(moving, still)
    there_and_back[0, 2:7] = film(moving, replace(still, start=(18, 24), end=(18, 24)))[0, 2:7]
    assert not strict(there_and_back, spec)


def test_a_zigzag_is_no_way_to_the_left() -> None:
    frames = [film(course(RED, (24 - 1.5 * k, 14 + 5 * (k % 2)), (24 - 1.5 * k, 14 + 5 * (k % 2)))) for k in range(9)]
    straight = [film(course(RED, (24 - 1.5 * k, 14), (24 - 1.5 * k, 14))) for k in range(9)]
    zigzag = torch.cat([frame[:, :1] for frame in frames], 1)
    assert not strict(zigzag, Spec("speed", (replace(RED, speed="slowly"),)))
    assert not strict(zigzag, Spec("move", (replace(RED, motion="up"),)))
    assert strict(torch.cat([frame[:, :1] for frame in straight], 1), Spec("move", (RED,)))


def test_an_object_stays_itself() -> None:
    round_one, square = (course(Actor("red", shape), (24, 8), (12, 8)) for shape in ("circle", "square"))
    halves = torch.cat([film(round_one)[:, :5], film(square)[:, 5:]], 1)
    assert not strict(halves, Spec("move", (RED,)))
    assert not strict(halves, Spec("move", (replace(RED, shape="square"),)))
    turning = Actor("red", "circle", becomes="blue")
    spec = Spec("change", (turning,))
    assert strict(film(course(turning, (12, 12), (12, 12))), spec)
    elsewhere = torch.cat(
        [film(course(turning, (x, 12), (x, 12)))[:, part] for x, part in ((8, slice(5)), (22, slice(5, 9)))], 1
    )
    assert not strict(elsewhere, spec)


def test_a_line_through_what_was_seen() -> None:
    """A jump of h between the fifth and the sixth of nine: r^2 = (10 h)^2 / (60 * 20 / 9 h^2) = 3 / 4."""
    line = fit(np.array([3.0, 2.0, np.nan, 0.0, -1.0, -2.0, np.nan, -4.0, -5.0]))
    assert (line.first, line.last, line.steady) == pytest.approx((3, -5, 1))
    assert fit(np.array([0.0] * 5 + [7.0] * 4)).steady == pytest.approx(0.75)
    assert math.isnan(fit(np.array([1.0, 2.0, 3.0, 4.0] + [np.nan] * 5)).change)
    assert fit(np.full(9, 4.0)).steady == 0


def test_frames_are_drawn_as_pictures_are() -> None:
    specs = specs_drawn(12, 14)
    rng = np.random.default_rng(15)
    placed = [place(spec, rng) for spec in specs]
    for video, courses in zip(draw(placed), placed, strict=True):
        for k, frame in enumerate(video):
            spots = [np.array(c.start) * (1 - k / 8) + np.array(c.end) * k / 8 for c in courses]
            colors = [c.actor.becomes if c.actor.becomes and k >= c.change else c.actor.color for c in courses]
            items = [
                Placed(color, c.actor.shape, *spot, c.radius)
                for color, c, spot in zip(colors, courses, spots, strict=True)
            ]
            assert np.abs(frame.astype(int) - draw_picture(items)).max() <= 16, "a sixteenth of a pixel on an edge"
            assert np.mean(frame == draw_picture(items)) > 0.999


def test_scenes_are_drawn_as_asked() -> None:
    rng = np.random.default_rng(16)
    for spec in specs_drawn(300, 17):
        courses = place(spec, rng)
        assert [c.actor for c in courses] == list(spec.actors)
        for c in courses:
            assert all(c.radius + BORDER - 1e-6 <= x <= SIZE - c.radius - BORDER + 1e-6 for x in (*c.start, *c.end))
            if c.actor.motion in DIRECTIONS:
                way = np.subtract(c.end, c.start) @ DIRECTIONS[c.actor.motion]
                assert WAY[c.actor.speed][0] <= way <= WAY[c.actor.speed][1]
        if len(courses) == 2:
            one, other = courses
            ends = ((one.start, other.start), (one.end, other.end))
            gaps = [np.abs(np.subtract(*points)).max() - one.radius - other.radius for points in ends]
            far, near = gaps if spec.meeting == "meet" else gaps[::-1]
            if spec.meeting:
                assert MET[0] - 1e-6 <= near <= MET[1]
                assert CLOSING[0] - 1e-6 <= far - near <= CLOSING[1]
            else:
                assert min(gaps) >= APART


def specs_of(prompts: Prompts) -> list[Spec]:
    return [Spec.from_dict(record["spec"]) for record in prompts.metadata]


def prompts_for(*specs: Spec) -> Prompts:
    return Prompts(("x",) * len(specs), tuple({"spec": spec.to_dict()} for spec in specs))


def test_reward_is_the_mean_of_clauses_and_the_verdict() -> None:
    """A way of 12 to the left, 12 to the right, and none, for "moves left": object, motion, steady, nothing else.

    motion is the lower of logistic(12 - 3.5) and logistic(1 + 12 / 2), .9991; to the right it is 0; without a way it is
    logistic(-3.5) = .0293, and a line through a constant explains nothing.
    """
    ways = [((22.0, 14.0), (10.0, 14.0)), ((10.0, 14.0), (22.0, 14.0)), ((16.0, 14.0), (16.0, 14.0))]
    videos = torch.cat([film(course(RED, *way)) for way in ways])
    spec = Spec("move", (RED,))
    scores = ShapesVideoVerifier(strict_weight=0.25)(Media(videos), prompts_for(spec, spec, spec))
    clauses = torch.tensor([3.9991, 3.0, 2.0293]) / 4
    torch.testing.assert_close(scores.parts["clauses"], clauses, atol=3e-3, rtol=0)
    assert scores.parts["strict"].tolist() == [1, 0, 0]
    torch.testing.assert_close(scores.total, 0.75 * scores.parts["clauses"] + 0.25 * scores.parts["strict"])
    assert scores.valid.all()
    assert scores.parts["clause/motion"].tolist() == [1, 0, 0]
    assert scores.parts["clause/steady"].tolist() == [1, 1, 0]
    assert scores.parts["clause/object"].tolist() == scores.parts["clause/nothing else"].tolist() == [1, 1, 1]
    for missing in ("speed", "still", "meeting", "change"):
        assert scores.parts[f"clause/{missing}"].isnan().all(), "the caption says nothing of it"


def test_a_clause_rises_as_it_comes_nearer_to_holding() -> None:
    spec = Spec("move", (RED,))
    videos = torch.cat([film(course(RED, (16.0, 14.0), (16.0 - way, 14.0))) for way in (-4, 0, 2, 4, 8)])
    scores = [score["motion 0"] for score in verify(videos, [spec] * 5)[0]]
    assert scores == sorted(scores)
    assert len(set(scores)) == 5


def test_reward_reads_prompts_of_the_world() -> None:
    prompts, rng = held_out_prompts(100), np.random.default_rng(4)
    right = tensor(render(specs_of(prompts), rng))
    wrong = tensor(render([corrupt(spec, rng) for spec in specs_of(prompts)], rng))
    reward = ShapesVideoVerifier()
    assert reward(Media(right, fps=8.0), prompts).total.mean() > 0.97
    assert reward(Media(wrong), prompts).total.mean() < 0.5
    for scores in verify(right[:50], specs_of(prompts)[1:51])[0]:
        assert passes(scores) == all(passes({name: value}) for name, value in scores.items())
    assert not reward.differentiable


def test_a_prompt_without_a_spec_is_named() -> None:
    known = train_prompts(1)
    prompts = Prompts((*known.text, "a cat"), (*known.metadata, {"kind": "move"}))
    with pytest.raises(ValueError, match=r"prompt 1 \('a cat'\) has no metadata\['spec'\].*train_prompts or held_out"):
        ShapesVideoVerifier().score(Media(torch.rand(2, 9, 3, SIZE, SIZE)), prompts)


def test_what_is_wrong_with_a_spec_is_said() -> None:
    spec = {"kind": "move", "actors": [{"color": "red", "shape": "circle", "motion": "sideways"}]}
    with pytest.raises(
        ValueError, match=r"prompt 0 .*no scene: motion 'sideways' is none of left, right, up, down, still"
    ):
        ShapesVideoVerifier().score(Media(torch.rand(1, 9, 3, SIZE, SIZE)), Prompts(("x",), ({"spec": spec},)))


def test_a_broken_video_has_no_score() -> None:
    videos = torch.cat([film(course(RED, (22.0, 14.0), (10.0, 14.0)))] * 2)
    videos[0, 3, 0, 0, 0] = torch.nan
    assert ShapesVideoVerifier()(Media(videos), prompts_for(*[Spec("move", (RED,))] * 2)).valid.tolist() == [
        False,
        True,
    ]


def test_wrong_settings_and_sizes() -> None:
    with pytest.raises(ValueError, match=r"strict_weight must be in \[0, 1\], got 1.5"):
        ShapesVideoVerifier(1.5)
    reward, one = ShapesVideoVerifier(), train_prompts(1)
    with pytest.raises(ValueError, match=r"videos of 32 x 32, got \[64, 64\]"):
        reward.score(Media(torch.rand(1, 9, 3, 64, 64)), one)
    with pytest.raises(ValueError, match="ShapesVideoVerifier scores videos"):
        reward.score(Media(torch.rand(1, 3, 32, 32)), one)
    with pytest.raises(ValueError, match="at least 5 frames, and these videos have 4"):
        reward.score(Media(torch.rand(1, 4, 3, 32, 32)), one)


@dataclass(frozen=True)
class Target:
    reward: Reward


def test_configs_name_it_by_its_short_path() -> None:
    made = build(Target, {"reward": {"class": "rewards.ShapesVideoVerifier", "strict_weight": 0.25}}).reward
    assert isinstance(made, ShapesVideoVerifier)
    assert made.strict_weight == 0.25

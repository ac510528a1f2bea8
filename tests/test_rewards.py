"""The contract of rewards: sums, multiples and minima keep parts, values and gradients; a failure is no score."""

from __future__ import annotations

import ast
import inspect
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rewards
from flowalign.records import Media, Prompts, Scores
from rewards import Minimum, Reward, WeightedSum
from rewards.base import FunctionReward, as_reward, simple_scores


class Channel(Reward):
    """Mean of one colour channel."""

    differentiable = True

    def __init__(self, channel: int, name: str) -> None:
        self.channel, self.name = channel, name

    def score(self, media: Media, prompts: Prompts) -> Scores:
        return simple_scores(self.name, media.pixels[:, self.channel].mean((1, 2)))


class Length(Reward):
    """Letters of the prompt, unknown where it is empty; not differentiable."""

    name = "length"

    def score(self, media: Media, prompts: Prompts) -> Scores:
        return simple_scores(self.name, torch.tensor([len(t) if t else math.nan for t in prompts.text]))


PROMPTS = Prompts(("ab", "abcd"), ({}, {}))
RED, GREEN = Channel(0, "red"), Channel(1, "green")


def media(red: tuple[float, float] = (0.25, 0.5), green: tuple[float, float] = (0.75, 0.125)) -> Media:
    pixels = torch.zeros(2, 3, 4, 4)
    pixels[:, 0], pixels[:, 1] = torch.tensor(red)[:, None, None], torch.tensor(green)[:, None, None]
    return Media(pixels)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (RED + GREEN, (1.0, 0.625)),
        (RED - GREEN, (-0.5, 0.375)),
        (-RED, (-0.25, -0.5)),
        (2 * RED, (0.5, 1.0)),
        (RED * -2, (-0.5, -1.0)),
        (RED / 2, (0.125, 0.25)),
        (RED + 1, (1.25, 1.5)),
        (1 + RED, (1.25, 1.5)),
        (RED - 1, (-0.75, -0.5)),
        (1 - RED, (0.75, 0.5)),
        (1 - (RED + 1), (-0.25, -0.5)),
        (2 * (RED + 3), (6.5, 7.0)),
        (1 - 2 * (RED - 3 * GREEN), (5.0, 0.75)),
        ((RED + GREEN) - (RED - GREEN), (1.5, 0.25)),
        (sum([RED, GREEN], 0.0), (1.0, 0.625)),
        (Minimum([RED, GREEN]), (0.25, 0.125)),
        (2 * Minimum([RED, 1 - GREEN]) - GREEN, (-0.25, 0.875)),
        (WeightedSum([RED, GREEN], [1, -4], 0.5), (-2.25, 0.5)),
    ],
)
def test_arithmetic(reward: Reward, expected: tuple[float, float]) -> None:
    scores = reward.score(media(), PROMPTS)
    assert scores.total.tolist() == list(expected)
    assert scores.total.dtype == torch.float32
    assert scores.valid.all()
    assert scores.parts["red"].tolist() == [0.25, 0.5], "parts are as they were, without weight or constant"


def test_gradients_follow_the_weights() -> None:
    given = Media(media().pixels.requires_grad_())
    (3 * RED - GREEN / 2 + 7).score(given, PROMPTS).total.sum().backward()
    assert given.pixels.grad is not None
    assert given.pixels.grad.sum((2, 3)).tolist() == [[3.0, -0.5, 0.0]] * 2


def test_gradient_of_a_minimum_runs_through_the_least() -> None:
    given = Media(media().pixels.requires_grad_())
    Minimum([RED, GREEN]).score(given, PROMPTS).total.sum().backward()
    assert given.pixels.grad is not None
    assert given.pixels.grad.sum((2, 3)).tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_only_sums_of_differentiable_rewards_are_differentiable() -> None:
    assert (RED + 2 * GREEN).differentiable
    assert Minimum([RED, GREEN]).differentiable
    assert not (RED + Length()).differentiable
    assert not (Length() * 2).differentiable
    assert not Minimum([RED, Length()]).differentiable


def test_parts_whose_names_clash_get_numbers() -> None:
    scores = (RED + Channel(1, "red") + Channel(2, "red")).score(media(), PROMPTS)
    assert {name: value.tolist() for name, value in scores.parts.items()} == {
        "red": [0.25, 0.5],
        "red_2": [0.75, 0.125],
        "red_3": [0.0, 0.0],
    }


@pytest.mark.parametrize("reward", [RED + Length(), Minimum([RED, Length()]), 0 * Length() + RED, Length() - 1])
def test_one_invalid_term_makes_the_whole_invalid(reward: Reward) -> None:
    scores = reward.score(media(), Prompts(("", "abc"), ({}, {})))
    assert scores.valid.tolist() == [False, True]


def test_wrong_sums_and_minima() -> None:
    with pytest.raises(ValueError, match="as many weights as rewards, got 1 and 2"):
        WeightedSum([RED, GREEN], [1.0])
    with pytest.raises(ValueError, match="as many weights"):
        WeightedSum([], [])
    with pytest.raises(ValueError, match="at least one"):
        Minimum([])


def redness(media: Media, prompts: Prompts) -> Tensor:
    return media.pixels[:, 0].mean((1, 2))


def test_a_function_is_a_reward() -> None:
    scores = as_reward(redness).score(media(), PROMPTS)
    assert scores.total.tolist() == scores.parts["redness"].tolist() == [0.25, 0.5]
    assert as_reward(lambda media, prompts: [1.0, 2.0]).score(media(), PROMPTS).total.tolist() == [1.0, 2.0]
    assert as_reward(lambda media, prompts: RED.score(media, prompts)).score(media(), PROMPTS).parts.keys() == {"red"}
    assert (1 - 2 * as_reward(redness)).score(media(), PROMPTS).total.tolist() == [0.5, 0.0]
    assert as_reward(RED) is RED
    assert not as_reward(redness).differentiable


def test_a_function_keeps_its_gradient() -> None:
    given = Media(media().pixels.requires_grad_())
    FunctionReward(redness, differentiable=True).score(given, PROMPTS).total.sum().backward()
    assert given.pixels.grad is not None
    assert given.pixels.grad.sum((2, 3)).tolist() == [[1.0, 0.0, 0.0]] * 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_invalid_and_not_zero(bad: float) -> None:
    scores = as_reward(lambda media, prompts: [bad, 0.0]).score(media(), PROMPTS)
    assert scores.valid.tolist() == [False, True]
    assert not torch.isfinite(scores.total[0])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([1.0], r"one number for each of 2 samples, it returned the shape \(1,\)"),
        (torch.zeros(2, 1), r"it returned the shape \(2, 1\)"),
        (3.0, r"it returned the shape \(\)"),
        (simple_scores("x", torch.zeros(3)), r"it returned the shape \(3,\)"),
        (["a", "b"], r"must return numbers, it returned \['a', 'b'\]"),
        (None, "must return numbers, it returned None"),
        ({"a": 1}, "must return numbers"),
    ],
)
def test_a_function_that_returns_no_scores(made: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_reward(lambda media, prompts: made).score(media(), PROMPTS)


@pytest.mark.parametrize("given", [3, "rewards.ShapesVerifier", None, Length, [RED]])
def test_what_is_no_reward(given: object) -> None:
    """Without the tests' type checker, which users do not have and which would refuse most of these itself."""
    with pytest.raises(ValueError, match="must be a Reward or a callable"):
        inspect.unwrap(as_reward)(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", sorted(Path(rewards.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_import_is_light(path: Path) -> None:
    """What loads models is imported where it is used."""
    imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [text for text in map(ast.unparse, imports) if re.match(r"(import|from) (transformers|diffusers)", text)]


class Redness(Reward):
    """Differentiable; scores the first picture of what it is shown by nan where asked to."""

    name, differentiable = "redness", True

    def __init__(self, broken: int | None = None) -> None:
        self.broken, self.seen = broken, list[int]()

    def score(self, media: Media, prompts: Prompts) -> Scores:
        self.seen.append(len(media))
        total = media.pixels[:, 0].mean((1, 2)).double()
        if self.broken is not None:
            total = total.where(torch.arange(len(total)) != self.broken, torch.nan)
        return Scores(total, {"redness": total}, torch.ones(len(total), dtype=torch.bool))


def several(count: int) -> tuple[Media, Prompts]:
    pixels = torch.rand(count, 3, 4, 4, requires_grad=True)
    return Media(pixels, references=tuple(torch.full((1, 3, 2, 2), float(i)) for i in range(count))), Prompts(
        tuple(f"prompt {i}" for i in range(count)), ({},) * count, tuple(range(count))
    )


def test_a_call_is_float32_and_has_a_gradient_only_if_asked() -> None:
    media, prompts = several(3)
    plain, traced = Redness()(media, prompts), Redness()(media, prompts, grad=True)
    assert plain.total.dtype == traced.total.dtype == torch.float32
    assert not plain.total.requires_grad
    traced.total.sum().backward()
    assert media.pixels.grad is not None
    assert torch.equal(media.pixels.grad[:, 0], torch.full((3, 4, 4), 1 / 16))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_chunks_and_order_change_nothing(chunk: int) -> None:
    media, prompts = several(7)
    reward, whole = Redness(), Redness()(media, prompts)
    assert torch.equal(reward(media, prompts, chunk=chunk).total, whole.total)
    assert max(reward.seen) <= chunk
    order = [6, 0, 3, 1, 5, 2, 4]
    assert torch.equal(reward(media.rows(order), prompts.rows(order)).total, whole.total[order])
    assert media.rows(order).references[1][0, 0, 0, 0] == 0
    assert prompts.rows(order).groups == tuple(order)


def test_what_is_not_finite_is_not_valid_and_stays_so_in_sums() -> None:
    scores = (Redness(broken=1) * 2 + 1)(*several(3))
    assert scores.valid.tolist() == [True, False, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_media_that_are_not_finite_have_no_score_and_are_not_shown(bad: float) -> None:
    """A reward that paints nan black, as a PNG does, would score it. Without gradient it sees the others alone."""
    media, prompts = several(4)
    pixels = media.pixels.detach().clone()
    pixels[1, 2, 3, 0] = bad
    broken, reward = replace(media, pixels=pixels), Redness()
    whole, scores = reward(media, prompts), (reward * 2 + 1)(broken, prompts)
    assert scores.valid.tolist() == [True, False, True, True]
    assert torch.equal(scores.total[[0, 2, 3]], 2 * whole.total[[0, 2, 3]] + 1)
    assert scores.total[1].isnan()
    assert scores.parts["redness"][1].isnan()
    assert reward.seen == [4, 3]
    assert reward(broken.rows([1]), prompts.rows([1])).valid.tolist() == [False]
    assert reward(broken, prompts, grad=True).valid.tolist() == [True, False, True, True]


def test_none_is_no_score() -> None:
    scores = as_reward(lambda media, prompts: [None, 0.5])(media(), PROMPTS)
    assert scores.valid.tolist() == [False, True]
    assert scores.total[1] == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda media, prompts: Redness()(media, prompts.rows([0])), "Redness: 2 media but 1 prompts"),
        (lambda media, prompts: (-Length())(media, prompts, grad=True), "has no gradient"),
        (
            lambda media, prompts: (Redness() + 1)(Media(torch.zeros(2, 5, 3, 4, 4), 8.0), prompts),
            r"scores pictures, and these are videos: wrap it as rewards\.OnFrames",
        ),
        (lambda media, prompts: Media(media.pixels, references=()), "2 media but 0 sets of references"),
    ],
)
def test_a_wrong_call_says_what_to_do(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(*several(2))

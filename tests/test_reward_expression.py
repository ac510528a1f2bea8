"""Rewards as strings: what is written is what Python's operators make; what cannot be read is told in one line."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

from flowalign.config import ConfigError, build, locate, resolve
from flowalign.records import Media, Prompts, Scores
from rewards.algebra import (
    Clip,
    Gate,
    GroupNormalise,
    Mean,
    MeanMinusStd,
    Normalise,
    RunningNormalise,
    Spread,
    WorstCase,
)
from rewards.base import Minimum, Product, Reward, WeightedSum, as_reward, simple_scores
from rewards.expression import FUNCTIONS, MAX_DEPTH, MAX_LENGTH, REWARDS, ExpressionError, parse_reward
from rewards.jpeg import JPEGCompressibility
from rewards.shaping import PAR, LambdaHarmonic, LogSigmoid, TextNorm, UncertaintyWeighted


class Level(Reward):
    """Mean of one row of pixels."""

    differentiable = True

    def __init__(self, row: int, name: str) -> None:
        self.row, self.name = row, name

    def score(self, media: Media, prompts: Prompts) -> Scores:
        return simple_scores(self.name, media.pixels[:, :, self.row].mean((1, 2)))


P, H, CLIP, OCR = (Level(i, name) for i, name in enumerate(("pickscore", "hpsv2.1", "clip", "ocr")))
NAMED: dict[str, Reward] = {"pickscore": P, "hpsv2.1": H, "clip": CLIP, "ocr": OCR}
TEXTS = tuple(f"prompt {i}" for i in range(6))
PROMPTS = Prompts(TEXTS, ({"contrastive": ["other"]},) * 6, (0, 0, 0, 1, 1, 1))


def scores_of(reward: Reward, seed: int = 0) -> Scores:
    pixels = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return reward(Media(pixels), PROMPTS)


def same(expression: str, reward: Reward) -> None:
    parsed, direct = scores_of(parse_reward(expression, NAMED)), scores_of(reward)
    torch.testing.assert_close(parsed.total, direct.total, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert {name.split("_")[0] for name in parsed.parts} == {name.split("_")[0] for name in direct.parts}


@pytest.mark.parametrize(
    ("expression", "reward"),
    [
        ("pickscore/26 + 0.5*hpsv2.1 + min(clip, ocr)", P / 26 + 0.5 * H + Minimum([CLIP, OCR])),
        ("clip", CLIP),
        ("clip - ocr - hpsv2.1", CLIP - OCR - H),
        ("clip - (ocr - hpsv2.1)", CLIP - (OCR - H)),
        ("2*clip/4*3", CLIP * 1.5),
        ("1 - clip", 1 - CLIP),
        ("-clip*2 + +ocr", OCR - 2 * CLIP),
        ("clip - -ocr", CLIP + OCR),
        ("1/26*pickscore", P / 26),
        ("(1+2)*(clip+1)", 3 * CLIP + 3),
        ("clip*ocr*2*hpsv2.1", 2 * (CLIP * OCR * H)),
        (" clip\n  +\tocr\r\n", CLIP + OCR),
        ("1e-1*clip + .5*ocr + 2.*hpsv2.1 + 1.5E+1", 0.1 * CLIP + 0.5 * OCR + 2 * H + 15),
        ("clip(clip, 0.4, 0.6)", Clip(CLIP, 0.4, 0.6)),
        ("clip(clip, -0.6, 2*0.3)", Clip(CLIP, -0.6, 0.6)),
        ("gate(clip, ocr, 0.5)", Gate(CLIP, OCR, 0.5)),
        ("gate(clip, ocr, 0.5, -1)", Gate(CLIP, OCR, 0.5, -1.0)),
        ("group_normalise(clip)", GroupNormalise(CLIP)),
        ("group_normalise(clip, 0.1) - ocr", GroupNormalise(CLIP, 0.1) - OCR),
        ("harmonic(clip, ocr)", LambdaHarmonic(CLIP, OCR)),
        ("harmonic((clip+1)/2, ocr, 0.3)", LambdaHarmonic((CLIP + 1) / 2, OCR, 0.3)),
        ("log_sigmoid(clip)", LogSigmoid(CLIP)),
        ("log_sigmoid(clip, 0.2, 0.9)", LogSigmoid(CLIP, [0.2, 0.9])),
        ("mean(clip, ocr, hpsv2.1)", Mean([CLIP, OCR, H])),
        ("mean_minus_std(clip, hpsv2.1)", MeanMinusStd([CLIP, H])),
        ("mean_minus_std(clip, hpsv2.1, 0.5)", MeanMinusStd([CLIP, H], 0.5)),
        ("min(clip, hpsv2.1 + 1, -ocr)", Minimum([CLIP, H + 1, -OCR])),
        ("neg(clip)", -CLIP),
        ("normalise(pickscore, 21, 1.5)", Normalise(P, 21.0, 1.5)),
        ("par(clip, 0.2, 0.9)", PAR(CLIP, [0.2, 0.9])),
        ("product(clip, ocr)", Product([CLIP, OCR])),
        ("running_normalise(clip)", RunningNormalise(CLIP)),
        ("sigmoid(10*clip - 5)", PAR(CLIP, [0.5], 10.0)),
        ("spread(clip, hpsv2.1)", Spread([CLIP, H])),
        ("textnorm(clip, 0.5)", TextNorm(CLIP, 0.5)),
        ("uncertain(clip, spread(clip, hpsv2.1), 0.2)", UncertaintyWeighted(CLIP, Spread([CLIP, H]), 0.2)),
        ("worst(clip, ocr)", WorstCase([CLIP, OCR])),
    ],
)
def test_what_is_written_is_what_is_meant(expression: str, reward: Reward) -> None:
    same(expression, reward)


def test_every_function_is_tried_above() -> None:
    written = [mark.args[1] for mark in test_what_is_written_is_what_is_meant.pytestmark]  # type: ignore[attr-defined]
    text = " ".join(expression for expression, _ in written[0])
    assert not [name for name in FUNCTIONS if f"{name}(" not in text]


def grown(chance: random.Random, depth: int) -> tuple[str, Reward | float]:
    """A random expression, and the same made by Python's operators."""
    if depth == 0 or chance.random() < 0.2:
        name = chance.choice(sorted(NAMED))
        number = round(chance.uniform(0.1, 3), 2)
        return (name, NAMED[name]) if chance.random() < 0.7 else (str(number), number)
    (left, a), (right, b) = grown(chance, depth - 1), grown(chance, depth - 1)
    gap, mark = chance.choice(["", " "]), chance.choice("+-*/m")
    if mark == "m" and isinstance(a, Reward) and isinstance(b, Reward):
        return f"min({left},{gap}{right})", Minimum([a, b])
    if mark in "/m":
        return f"({left}){gap}/ 4", a / 4
    made: Reward | float = a + b if mark == "+" else a - b if mark == "-" else a * b
    return f"({left}){gap}{mark}{gap}({right})", made


def test_random_expressions_come_back_as_what_they_were_written_from() -> None:
    chance, count = random.Random(1), 0
    while count < 150:
        text, made = grown(chance, chance.randint(1, 4))
        if isinstance(made, Reward) and len(text) <= MAX_LENGTH:
            same(text, made)
            count += 1


def test_products_bind_tighter_and_quotients_go_from_the_left() -> None:
    same("clip + ocr*2", CLIP + 2 * OCR)
    same("(clip + ocr)*2", 2 * CLIP + 2 * OCR)
    same("8/2/2*clip", 2 * CLIP)
    same("-2*clip + 1", 1 - 2 * CLIP)


def test_what_flow_grpo_divides_by_is_exactly_the_same() -> None:
    assert torch.equal(scores_of(parse_reward("pickscore/26", NAMED)).total, scores_of(P / 26).total)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "the expression is empty"),
        (" \n ", "the expression is empty"),
        ("pikscore/26", r"unknown reward 'pikscore' at 1 in '>>>pikscore/26'; did you mean 'pickscore'\?"),
        ("clip + pikscore", r"unknown reward 'pikscore' at 8 in 'clip \+ >>>pikscore'; did you mean 'pickscore'\?"),
        ("nothing_like_it", "unknown reward 'nothing_like_it' at 1 .*; there are aesthetic, clip"),
        ("min + clip", r"unknown reward 'min' at 1 .*; the function is written min\(x, y, \.\.\.\)"),
        ("mim(clip)", r"unknown function 'mim' at 1 .*; did you mean 'min'\?"),
        ("__import__(clip)", "unknown function '__import__'"),
        ("clip.__class__", r"unknown reward 'clip\.__class__'"),
        ("clip / ocr", "only a number can divide, not a reward at 6"),
        ("1 / clip", "only a number can divide, not a reward at 3"),
        ("clip / (1 - 1)", "division by zero at 6"),
        ("clip / 5e-324", "the number is too large at 6"),
        ("1e999*clip", "the number is too large at 1"),
        ("1e308*1e308*clip", "the number is too large at 6"),
        ("clip + 1e308 + 1e308", "must be finite"),
        ("1 + 2", r"the expression '1 \+ 2' has no reward, only numbers"),
        ("clip +", "expected a reward, a number or '\\(', got the end at 7"),
        ("(clip", r"expected '\)' for what '\(' opens, got the end at 6"),
        ("min(clip", r"expected '\)' for what 'min' opens, got the end at 9"),
        ("clip)", r"expected an operator or the end, got '\)' at 5"),
        ("clip ocr", "expected an operator or the end, got 'ocr' at 6"),
        ("2clip", "expected an operator or the end, got 'clip' at 2"),
        ("clip, ocr", "expected an operator or the end, got ',' at 5"),
        ("min()", r"got '\)' at 5"),
        ("min(clip, 3)", r"'min' is written min\(x, y, \.\.\.\), rewards before numbers at 1"),
        ("clip(clip, 1)", r"'clip' is written clip\(x, low, high\)"),
        ("gate(clip, 0.5, ocr)", r"'gate' is written gate\(x, condition, threshold\[, floor\]\)"),
        ("ocr + clip(clip, 2, 1)", "low below high, got 2.0 and 1.0 at 7 in"),
        ("textnorm(group_normalise(clip))", "compares samples: swap them at 1"),
        ("clip ** 2", r"got '\*' at 7"),
        ("clip; ocr", "unexpected character ';' at 5"),
        ("clip + \u00e9", r"unexpected character '\\xe9' at 8 in 'clip \+ >>>\\xe9'"),
        ("clip[0]", r"unexpected character '\[' at 5"),
        ("'clip'", 'unexpected character "\'" at 1'),
        (
            "(" * (MAX_DEPTH + 1) + "clip",
            f"more than {MAX_DEPTH} parentheses, functions and signs .* at {MAX_DEPTH + 1}",
        ),
        ("-" * (MAX_DEPTH + 1) + "clip", f"more than {MAX_DEPTH} parentheses"),
        ("clip+" * 200 + "clip", f"at most {MAX_LENGTH} characters, this one has 1004"),
        ("running_normalise(clip) - running_normalise(clip)", "two running normalisers are called 'clip'"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_reward(expression, NAMED)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isascii()


def test_the_deepest_and_the_longest_expressions_can_be_scored() -> None:
    deepest = "".join(["min(ocr*2+1,1-" for _ in range(MAX_DEPTH)]) + "clip" + ")" * MAX_DEPTH
    assert scores_of(parse_reward(deepest, NAMED)).valid.all()
    longest = "clip*" * 199 + "clip"
    assert torch.equal(scores_of(parse_reward(longest, NAMED)).total, scores_of(Product([CLIP] * 200)).total)
    assert scores_of(parse_reward("ocr+" * 249 + "clip", NAMED)).valid.all()


def mutated(text: str, chance: random.Random) -> str:
    letters = [*text]
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(letters) + 1)
        piece = chance.choice(
            [*"+-*/(),. \t\n09eE_$\0\u00a0\u0663x", "min(", "clip", "1e300", "gate(", "ocr", "__", "-("]
        )
        letters[at : at + chance.randint(0, 3)] = piece if chance.random() < 0.7 else ""
    return "".join(letters)


def test_broken_strings_raise_value_errors_only() -> None:
    chance, parsed = random.Random(0), 0
    seeds = [
        "pickscore/26 + 0.5*hpsv2.1 + min(clip, ocr)",
        "gate(clip(clip, 0, 1), ocr, 0.5, -1) - mean(ocr, par(clip, .1, 2e-3))*3",
        "group_normalise((clip - 1)/2, 1e-4)*textnorm(ocr)",
    ]
    for _ in range(2000):
        text = mutated(chance.choice(seeds), chance)
        with suppress(ValueError):
            assert isinstance(parse_reward(text, NAMED), Reward)
            parsed += 1
    assert 50 < parsed < 1500, "both kinds have been tried"


def test_all_short_names_lead_to_rewards() -> None:
    for name, path in REWARDS.items():
        assert issubclass(locate(path), Reward), name
    assert [*REWARDS] == sorted(REWARDS)
    assert [*FUNCTIONS] == sorted(FUNCTIONS)


def test_each_named_reward_is_made_once_and_only_if_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = parse_reward("jpeg/10 + min(jpeg, 1 - jpeg)")
    assert isinstance(made, WeightedSum)
    assert isinstance(made.rewards[0], WeightedSum | JPEGCompressibility)
    monkeypatch.setitem(REWARDS, "clip", "rewards.jpeg.NoSuchReward")
    parse_reward("jpeg")
    with pytest.raises(ValueError, match="unknown reward 'orc'"):
        parse_reward("clip + orc")
    with pytest.raises(ValueError, match="NoSuchReward"):
        parse_reward("clip")


def test_given_rewards_come_first_and_need_names_that_can_be_written() -> None:
    assert parse_reward("jpeg", {"jpeg": CLIP}) is CLIP
    assert parse_reward("mine_v2.5", {"mine_v2.5": OCR}) is OCR
    for name in ("2fast", "a b", "a-b", "", "a."):
        with pytest.raises(ExpressionError, match="is no name of a reward"):
            parse_reward("jpeg", {name: CLIP})


def use(reward: Reward | Callable[..., Any] | str) -> Reward:
    """What a trainer does with its argument."""
    return as_reward(reward)


YAML = {"class": "rewards.expression.parse_reward", "expression": "0.5*jpeg - shapes"}


@pytest.mark.parametrize("given", ["0.5*jpeg - shapes", YAML])
def test_in_a_config(given: Any) -> None:
    reward = build(use, {"reward": given})
    assert isinstance(reward, WeightedSum)
    assert [term.name for term in reward.rewards] == ["jpeg_compressibility", "shapes"]
    assert reward.weights == (0.5, -1.0)
    again = resolve(use, {"reward": given})
    assert isinstance(build(use, again), WeightedSum)


def test_in_a_config_with_rewards_of_its_own() -> None:
    own = {
        "fine": {"class": "rewards.jpeg.JPEGCompressibility", "quality": 30},
        "shapes": "rewards.shapes.ShapesVerifier",
    }
    reward = build(use, {"reward": {**YAML, "expression": "fine + jpeg + shapes", "rewards": own}})
    assert isinstance(reward, WeightedSum)
    assert [getattr(term, "quality", None) for term in reward.rewards] == [30, 95, None]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0.5*jpg", "unknown reward 'jpg' at 5"),
        ({**YAML, "expression": "jpeg/shapes"}, "only a number can divide"),
        ({"class": "rewards.expression.parse_reward"}, "needs 'expression'"),
    ],
)
def test_wrong_in_a_config(given: Any, message: str) -> None:
    with pytest.raises(ConfigError if isinstance(given, dict) else ValueError, match=message):
        build(use, {"reward": given})


def test_a_string_is_a_reward() -> None:
    reward = as_reward("jpeg - 2*shapes")
    assert isinstance(reward, WeightedSum)
    assert reward.weights == (1.0, -2.0)
    with pytest.raises(
        ValueError, match=r"must be a Reward or a callable .*, or an expression .*: unknown reward 'orc'"
    ):
        as_reward("orc")

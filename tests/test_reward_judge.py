"""Judges: how answers are read, by hand, and whole judges on an endpoint that looks at the pictures it is sent."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from test_reward_remote import brightness, reply, served

from flowalign.config import build, parse, plain
from flowalign.records import Media, Prompts
from rewards.base import Reward
from rewards.judge import MAX_FAILURES, Endpoint, Judge, PairJudge
from rewards.judges import THREE_SCORES, QualityLevels, SoftTIFA, UnifiedReward, UnifiedRewardThink, VQAScore, spellings
from rewards.verdicts import (
    Answer,
    Unreadable,
    answer_probability,
    levels_expectation,
    pair_winner,
    regex_score,
    yes_no_log_odds,
)

KEY = "canary-key-0123456789"


def likely(**odds: float) -> Answer:
    return Answer("", tuple((token, math.log(p)) for token, p in odds.items()))


def test_log_odds() -> None:
    assert yes_no_log_odds(likely(Yes=0.6, No=0.2)) == pytest.approx(math.log(3))
    assert yes_no_log_odds(likely(No=0.6, Yes=0.2)) == pytest.approx(-math.log(3))
    spelled = Answer("", ((" Yes", math.log(0.3)), ("yes", math.log(0.1)), ("\u2581YES", math.log(0.2)), ("no", -1.0)))
    assert yes_no_log_odds(spelled) == pytest.approx(math.log(0.6) + 1)
    sure = Answer("", (("Yes", -1e-4), ("Yeah", -12.0), ("No", -9999.0)))
    assert yes_no_log_odds(sure) == pytest.approx(12 - 1e-4), "no more than the least that was listed"
    for top in ((), (("maybe", -0.1),), (("No", -9999.0),), (("Yes", math.nan),)):
        with pytest.raises(Unreadable):
            yes_no_log_odds(Answer("Yes", top))


def test_levels() -> None:
    assert levels_expectation(likely(excellent=1.0)) == 5
    assert levels_expectation(likely(Bad=0.5, other=0.5)) == 1
    mixed = likely(good=0.3, fair=0.1, the=0.5)
    assert levels_expectation(mixed) == pytest.approx((4 * 0.3 + 3 * 0.1) / 0.4)
    assert levels_expectation(Answer("", ((" exc", -1.0), ("f", -1.0)))) == 5, "a word's beginning, of three letters on"
    with pytest.raises(Unreadable, match="none of the levels"):
        levels_expectation(likely(the=1.0))


def test_probability_of_an_answer() -> None:
    two = answer_probability(spellings("two"))
    assert two(likely(two=0.5, Two=0.25, three=0.1)) == pytest.approx(0.75)
    assert two(Answer("", (("2", math.log(0.5)), ("t", math.log(0.4))))) == pytest.approx(0.5)
    assert two(likely(three=0.9)) == 0
    assert answer_probability(["giraffe"])(likely(gir=0.7, go=0.2)) == pytest.approx(0.7)
    assert spellings(["Red", "crimson"]) == ("Red", "crimson")
    with pytest.raises(ValueError, match="is empty"):
        answer_probability([" "])
    with pytest.raises(Unreadable, match="no log-probabilities"):
        two(Answer("two"))


def test_regex_score() -> None:
    score = regex_score(r"Final Score:\s*([0-9.]+)", 1, 5)
    assert score(Answer("Final Score: 2\nand so\nFinal Score: 4.25")) == 4.25
    assert score(Answer("<think>Final Score: 1</think>Final Score: 3")) == 3
    for text in ("", "Score: 3", "Final Score: 6", "Final Score: 0.5", "Final Score: 3.1.2", "Final Score: ."):
        with pytest.raises(Unreadable):
            score(Answer(text))
    three = regex_score(THREE_SCORES, 1, 5)
    text = "Alignment Score (1-5): 2.5\n\nCoherence Score (1-5): 3\nStyle Score (1-5): 5"
    assert three(Answer(text)) == three(Answer(f"{text}.")) == pytest.approx(3.5)
    for pattern, low, high in (("(", 1, 5), ("no group", 1, 5), ("(x)", 5, 1)):
        with pytest.raises(ValueError, match="pattern"):
            regex_score(pattern, low, high)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Image 1 is better", 1.0),
        ("image 2 is slightly better.", 0.0),
        ("Video 2 is better than Video 1", 0.0),
        ("<think>Image 1 is better at first</think><answer>Image 2 is better</answer>", 0.0),
        ("<think>Image 2 is better</think> Image 1 is better", 1.0),
        ("Both images are equally good", 0.5),
        ("Image 1 is not better than Image 2; Image 2 is clearly better.", 0.0),
    ],
)
def test_pair_winner(text: str, expected: float) -> None:
    assert pair_winner(Answer(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Image 1",
        "Image 2 is never better",
        "Image 1 is not better than Image 2.",
        "Image 3 is better",
        "Image 1 is better. Image 2 is better.",
        "<think>Image 1 is better",
    ],
)
def test_no_winner(text: str) -> None:
    with pytest.raises(Unreadable):
        pair_winner(Answer(text))


def completion(text: str | None, top: dict[str, float] | None = None) -> dict[str, Any]:
    choice: dict[str, Any] = {"message": {"content": text}}
    if top is not None:
        listed = [{"token": token, "logprob": math.log(p)} for token, p in top.items()]
        choice["logprobs"] = {"content": [{"token": text, "top_logprobs": listed}]}
    return {"choices": [choice]}


def shown(body: dict) -> list[float]:
    """The brightness of the pictures that a question shows."""
    parts = body["messages"][0]["content"]
    return [brightness(one["image_url"]["url"].partition(",")[2]) for one in parts if one["type"] == "image_url"]


def question(body: dict) -> str:
    return str(body["messages"][0]["content"][-1]["text"])


def answering(answer: Callable[[dict], dict]) -> Callable[[BaseHTTPRequestHandler, dict], None]:
    return lambda handler, body: reply(handler, 200, answer(body))


def grey(count: int) -> Media:
    """Pictures of 0.1, 0.2 ... of white, 8 x 8."""
    return Media(torch.arange(1, count + 1).div(10)[:, None, None, None].expand(count, 3, 8, 8))


def prompts(count: int, *groups: int) -> Prompts:
    return Prompts(tuple(f"prompt {i}" for i in range(count)), ({},) * count, groups or None)


def test_vqa_score() -> None:
    """P(yes) is the brightness, so that the score is its log-odds; the request is OpenAI's."""
    with served(answering(lambda body: completion("Yes", {"Yes": shown(body)[0], "No": 1 - shown(body)[0]}))) as (
        url,
        seen,
    ):
        reward = VQAScore(Endpoint(f"{url}/v1", "qwen", options={"seed": 3}))
        media, asked = grey(7), prompts(7)
        scores = reward(media, asked)
        singles = [reward(media.rows([i]), asked.rows([i])).total for i in range(7)]
    levels = (torch.arange(1, 8) / 10 * 255).round() / 255
    torch.testing.assert_close(scores.total, torch.logit(levels.double()).float(), rtol=0, atol=1e-5)
    assert torch.equal(torch.cat(singles), scores.total)
    assert scores.valid.all()
    body = seen[0]["body"]
    assert seen[0]["path"] == "/v1/chat/completions"
    assert "Authorization" not in seen[0]["headers"]
    assert {key: body[key] for key in ("model", "temperature", "logprobs", "top_logprobs", "max_tokens", "seed")} == {
        "model": "qwen",
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
        "max_tokens": 1,
        "seed": 3,
    }
    assert {question(one["body"]) for one in seen[:7]} == {
        f'Does this picture show "prompt {i}"? Please answer Yes or No.' for i in range(7)
    }


def test_levels_and_point_scores() -> None:
    with served(answering(lambda body: completion("good", {"good": shown(body)[0], "bad": 1 - shown(body)[0]}))) as (
        url,
        _,
    ):
        scores = QualityLevels(Endpoint(url, "m"))(grey(3), prompts(3))
    torch.testing.assert_close(scores.total, 1 + 3 * torch.tensor([26, 51, 76]) / 255, rtol=0, atol=1e-5)
    with served(answering(lambda body: completion(f"so\nFinal Score: {5 * shown(body)[0]:.2f}"))) as (url, _):
        scores = UnifiedReward(Endpoint(url, "m"))(grey(3), prompts(3))
    assert scores.total[1:].tolist() == pytest.approx([1.0, 1.49])
    assert scores.valid.tolist() == [False, True, True], "0.51 is no score from 1 to 5"


def test_what_cannot_be_read_is_invalid_and_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    texts = {"prompt 0": "Final Score: 4", "prompt 1": f"I cannot say, {KEY}", "prompt 2": None}

    def answer(body: dict) -> dict:
        return completion(next(text for name, text in texts.items() if name in question(body)))

    with served(answering(answer)) as (url, seen), caplog.at_level(logging.WARNING, "flowalign"):
        reward = UnifiedReward(Endpoint(url, "m", api_key="JUDGE_KEY", options={"max_tokens": None}))
        scores = reward(grey(3), prompts(3))
        for _ in range(MAX_FAILURES):
            reward(grey(2), prompts(2))
    assert scores.valid.tolist() == [True, False, False]
    assert "logprobs" not in seen[0]["body"]
    assert "max_tokens" not in seen[0]["body"], "taken away by its null"
    assert scores.total[0] == 4
    assert scores.total[1:].isnan().all(), "never a number"
    assert seen[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    assert len(reward.failures) == MAX_FAILURES, "no more are kept"
    failure = reward.failures[-1]
    assert (failure.prompt, failure.text, failure.reason) == ("prompt 1", "I cannot say, ***", "no score in it")
    assert "I cannot say, ***" in caplog.text
    assert KEY not in caplog.text + repr(reward.to) + repr(reward.endpoint) + repr(reward.failures)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"choices": []}, "no chat completion; does the url end with /v1?"),
        ({"error": {"message": "x"}}, "no chat completion"),
        ({"choices": [{"message": "text"}]}, "no chat completion"),
        ({"choices": [{"message": {"content": "a"}, "logprobs": {"content": [{"top_logprobs": [{}]}]}}]}, "no chat"),
        ([1], "no chat completion"),
    ],
)
def test_an_endpoint_that_is_none(given: Any, line: str) -> None:
    with served(answering(lambda body: given)) as (url, _), pytest.raises(ValueError, match="judge http") as caught:
        VQAScore(Endpoint(url, "m"))(grey(1), prompts(1))
    assert line in str(caught.value)


def test_faults_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for status, kind, line in (
        (401, ValueError, "refuses the token"),
        (500, OSError, "answers 500"),
        (302, ValueError, "redir"),
    ):
        with served(lambda handler, _, status=status: reply(handler, status, KEY.encode())) as (url, _):
            judge = VQAScore(Endpoint(url, "m", "JUDGE_KEY", budget=5.0, retries=0))
            with pytest.raises(kind, match=line) as caught:
                judge(grey(2), prompts(2))
        assert KEY not in str(caught.value)


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    for endpoint, line in (
        (Endpoint("http://h", "m", api_key="JUDGE_KEY"), "the environment variable 'JUDGE_KEY' holds no key"),
        (Endpoint("http://h", "m", in_flight=0), "must be at least 1"),
        (Endpoint("http://169.254.169.254", "m"), "never asked"),
        (Endpoint("h", "m"), "expected a url"),
    ):
        with pytest.raises(ValueError, match=line):
            VQAScore(endpoint)
    with pytest.raises(ValueError, match="needs a question"):
        Judge(Endpoint("http://h", "m"), " ")
    with pytest.raises(ValueError, match="opponents from 0 on"):
        PairJudge(Endpoint("http://h", "m"), "x", opponents=-1)


def test_out_of_a_config() -> None:
    config = {
        "class": "rewards.judge.Judge",
        "endpoint": {"url": "http://localhost:8000/v1", "model": "m", "options": {"seed": 1}},
        "template": "How good is it? {prompt}",
        "parse": {"class": "rewards.verdicts.regex_score", "pattern": "([0-9])", "low": 0, "high": 9},
    }

    def use(reward: Reward) -> Reward:
        return reward

    judge = build(use, {"reward": config})
    assert isinstance(judge, Judge)
    assert judge.parse(Answer("it is 7")) == 7
    assert build(use, {"reward": config | {"parse": "rewards.verdicts.levels_expectation"}}).parse is levels_expectation
    assert plain(parse(use, {"reward": config}))["reward"]["parse"] == config["parse"]


def test_videos_are_shown_as_frames() -> None:
    pixels = torch.linspace(0, 1, 9)[None, :, None, None, None].expand(1, 9, 3, 4, 4)
    with served(answering(lambda body: completion("Yes", {"Yes": 0.5, "No": 0.5}))) as (url, seen):
        VQAScore(Endpoint(url, "m", frames=3))(Media(pixels, 8.0), prompts(1))
    assert shown(seen[0]["body"]) == pytest.approx([0, 0.5, 1], abs=0.01)


def soft(handler: BaseHTTPRequestHandler, body: dict) -> None:
    light = shown(body)[0]
    known = {"colour?": {"red": light, "blue": 1 - light}, "count?": {"2": 0.5, "four": 0.25}, "odd?": {"x": 1.0}}
    reply(handler, 200, completion("", known[question(body).split()[0]]))


def test_soft_tifa() -> None:
    data = (
        {"vqa_list": [["colour?", "red"], ["count?", "two"]]},
        {"vqa_list": [["colour?", ["red", "blue"]], ["count?", "4"], ["odd?", "y"]]},
    )
    asked = Prompts(("a", "b"), data)
    with served(soft) as (url, seen):
        scores = SoftTIFA(Endpoint(url, "m"))(grey(2), asked)
        plain_mean = SoftTIFA(Endpoint(url, "m"), geometric=False)(grey(2), asked)
    light = 26 / 255
    assert scores.total.tolist() == pytest.approx([math.sqrt(light * 0.5), 1e-4], rel=1e-4)
    assert plain_mean.total.tolist() == pytest.approx([(light + 0.5) / 2, 1 / 3], rel=1e-4)
    assert torch.equal(plain_mean.total, scores.parts["soft_tifa_am"])
    assert torch.equal(scores.total, scores.parts["soft_tifa_gm"])
    assert question(seen[0]["body"]) in ("colour? Answer in one word.",)
    for metadata in ({}, {"vqa_list": []}, {"vqa_list": [["only a question"]]}):
        with pytest.raises(ValueError, match="vqa_list"):
            SoftTIFA(Endpoint("http://localhost:1", "m"))(grey(1), Prompts(("a",), (metadata,)))


def brighter(body: dict) -> dict:
    first, second = shown(body)
    return completion(f"<think>hm</think><answer>Image {1 if first > second else 2} is better</answer>")


def test_win_rates_rank_a_group() -> None:
    """Groups by themselves, in any order of rows: the k-th brightest of n wins against n - k."""
    order = [3, 0, 4, 1, 2]
    media = grey(5).rows(order)
    groups = (7, 7, 7, 7, 7)
    with served(answering(brighter)) as (url, seen):
        reward = UnifiedRewardThink(Endpoint(url, "m"))
        scores = reward(media, prompts(5, *groups))
        assert scores.total.tolist() == [value / 4 for value in order]
        assert len(seen) == 5 * 4
        assert scores.parts["agree"].tolist() == [1.0] * 5
        two = reward(grey(5), prompts(5, 1, 2, 1, 2, 2))
    assert two.total.tolist() == [0.0, 0.0, 1.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="needs their group numbers"):
        reward(grey(2), prompts(2))


def test_a_judge_who_likes_the_first_says_nothing() -> None:
    with served(answering(lambda body: completion("Image 1 is better"))) as (url, _):
        scores = PairJudge(Endpoint(url, "m"), "Which? {prompt}")(grey(4), prompts(4, 0, 0, 0, 0))
    assert scores.total.tolist() == [0.5] * 4
    assert scores.parts["agree"].tolist() == [0.0] * 4


def test_pairs_that_cannot_be_read_are_left_out() -> None:
    """Picture 1 (0.1) is never judged: it is invalid, and the others' rates are of the pairs that are left."""

    def answer(body: dict) -> dict:
        return completion("hm") if min(shown(body)) < 0.15 else brighter(body)

    with served(answering(answer)) as (url, _):
        judge = PairJudge(Endpoint(url, "m"), "Which? {prompt}")
        scores = judge(grey(4), prompts(4, 0, 0, 0, 0))
        alone = judge(grey(1), prompts(1, 0))
    assert scores.valid.tolist() == [False, True, True, True]
    assert scores.total[1:].tolist() == [0.0, 0.5, 1.0]
    assert len(judge.failures) == 6
    assert alone.valid.tolist() == [False], "one picture wins against none"


def test_a_broken_picture_is_not_asked_about_and_no_opponent() -> None:
    """As black it would be the darkest, against which all the others win."""
    media = grey(4)
    pixels = media.pixels.clone()
    pixels[1, 0, 0, 0] = math.nan
    with served(answering(brighter)) as (url, seen):
        scores = PairJudge(Endpoint(url, "m"), "Which? {prompt}")(Media(pixels), prompts(4, 0, 0, 0, 0))
    assert scores.valid.tolist() == [True, False, True, True]
    assert scores.total[[0, 2, 3]].tolist() == [0.0, 0.5, 1.0]
    assert len(seen) == 3 * 2


def test_fewer_opponents() -> None:
    with served(answering(brighter)) as (url, seen):
        scores = PairJudge(Endpoint(url, "m"), "Which? {prompt}", opponents=1)(grey(5), prompts(5, *[0] * 5))
    assert len(seen) == 2 * 5, "each with its neighbour in the circle, in both orders"
    assert scores.total.tolist() == [0.0, 0.5, 0.5, 0.5, 1.0]


def test_the_key_is_in_no_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def use(reward: Reward) -> Reward:
        return reward

    config = {"class": "rewards.judges.VQAScore", "endpoint": {"url": "http://h", "model": "m", "api_key": "JUDGE_KEY"}}
    assert KEY not in json.dumps(plain(parse(use, {"reward": config})))
    assert build(use, {"reward": config}).to.key == KEY

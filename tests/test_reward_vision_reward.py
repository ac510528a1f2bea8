"""VisionReward: its arithmetic by hand, over an endpoint and over a model on this machine, and its files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import vlm_tiny
from test_reward_judge import answering, completion, grey, prompts, question, shown
from test_reward_remote import served
from vlm_tiny import ByHand

from flowalign.config import build
from flowalign.records import Media
from rewards.base import Reward
from rewards.judge import Endpoint
from rewards.judges import VQA
from rewards.local_vlm import LocalVLM
from rewards.verdicts import Answer, Unreadable, yes_or_no
from rewards.vision_reward import Mask, VisionReward, VisionRewardVideo, read_questions, read_weights

# question 0 gates 2 and 3, question 1 gates 4; 5 is free
QUESTIONS = "Anyone there?\nHands?\nBody right?\nSafe?  \nHands right?\nBright?\n"
GATES = (Mask(0, (2, 3)), Mask(1, (4,)))
COEF, INTERCEPT = [2.0, 0.1, 0.3, 0.7, 1.5], -0.25  # of P(yes), and of questions 2 to 5


def files(folder: Path, questions: str = QUESTIONS, weights: object = None) -> tuple[str, str]:
    (folder / "qa.txt").write_text(questions)
    given = {"coef": COEF, "intercept": [INTERCEPT]} if weights is None else weights
    (folder / "weight.json").write_text(json.dumps(given))
    return str(folder / "qa.txt"), str(folder / "weight.json")


def test_yes_or_no() -> None:
    for text in ("Yes", "yes.", " Yes, it is", "**YES**", "<think>No</think> yes", "<answer>yes</answer>"):
        assert yes_or_no(Answer(text)) == 1
    for text in ("No", "no, yes", "\nNo."):
        assert yes_or_no(Answer(text)) == -1
    for text in ("", "Yesterday", "Nothing", "I say yes", "N/A", "<think>yes"):
        with pytest.raises(Unreadable):
            yes_or_no(Answer(text))


def reply_to(body: dict, known: dict[str, str], fit: float = 0.5) -> dict:
    asked = question(body)
    if asked.startswith("Does this picture show"):
        return completion("Yes", {"Yes": fit, "No": 1 - fit})
    return completion(known[asked])


@pytest.mark.parametrize(
    ("answers", "counted"),
    [
        (("yes", "Yes", "yes", "no", "no", "yes"), (1, -1, -1, 1)),
        (("no", "yes", "yes", "yes", "yes", "no"), (0, 0, 1, -1)),
        (("no", "no", "yes", "no", "yes", "yes"), (0, 0, 0, 1)),
        (("no", "no", "N/A", "there is nobody", "N/A", "yes"), (0, 0, 0, 1)),
        (("yes", "no", "no", "yes", "hm", "no"), (-1, 1, 0, -1)),
    ],
)
def test_by_hand(tmp_path: Path, answers: Sequence[str], counted: Sequence[int]) -> None:
    """Gates bring no term of their own, and what a gate closes may be unreadable."""
    known = dict(zip([line.strip() for line in QUESTIONS.splitlines()], answers, strict=True))
    with served(answering(lambda body: reply_to(body, known, shown(body)[0]))) as (url, seen):
        reward = VisionReward(Endpoint(url, "m"), *files(tmp_path), GATES)
        scores = reward(grey(3), prompts(3))
    listed = INTERCEPT + sum(w * a for w, a in zip(COEF[1:], counted, strict=True))
    light = (torch.tensor([0.1, 0.2, 0.3]) * 255).round() / 255
    torch.testing.assert_close(scores.total, listed + 2.0 * light, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.parts["checklist"], torch.full((3,), listed), rtol=0, atol=1e-6)
    torch.testing.assert_close(scores.parts["alignment"], light, rtol=0, atol=1e-6)
    assert scores.valid.all()
    assert len(seen) == 3 * (6 + 1)
    assert {one["body"]["max_tokens"] for one in seen} == {1}


@pytest.mark.parametrize("broken", range(6))
def test_an_open_question_or_gate_without_answer_is_invalid(tmp_path: Path, broken: int) -> None:
    lines = [line.strip() for line in QUESTIONS.splitlines()]
    known = dict.fromkeys(lines, "yes") | {lines[broken]: "maybe"}
    with served(answering(lambda body: reply_to(body, known))) as (url, _):
        reward = VisionReward(Endpoint(url, "m"), *files(tmp_path), GATES)
        scores = reward(grey(1), prompts(1))
    assert scores.valid.tolist() == [False]
    assert scores.total.isnan().all()
    assert scores.parts["alignment"].tolist() == [0.5]
    assert [(one.question, one.text) for one in reward.failures] == [(lines[broken], "maybe")]


def test_no_alignment_is_invalid_and_may_be_somebody_elses(tmp_path: Path) -> None:
    known = dict.fromkeys((line.strip() for line in QUESTIONS.splitlines()), "yes")
    with (
        served(answering(lambda body: completion(known[question(body)]))) as (url, seen),
        served(answering(lambda body: completion("Yes", {"Yes": 0.75}))) as (other, heard),
        served(answering(lambda body: completion("Yes"))) as (dumb, _),
    ):
        reward = VisionReward(Endpoint(url, "m"), *files(tmp_path), GATES, alignment=Endpoint(other, "m"))
        scores = reward(grey(2), prompts(2))
        mute = VisionReward(Endpoint(url, "m"), *files(tmp_path), GATES, alignment=Endpoint(dumb, "m"))
        unread = mute(grey(1), prompts(1))
    assert scores.total.tolist() == pytest.approx([INTERCEPT + sum(COEF[1:]) + 2 * 0.75] * 2)
    assert {question(one["body"]) for one in heard} == {VQA.replace("{prompt}", f"prompt {i}") for i in range(2)}
    assert "logprobs" not in seen[0]["body"]
    assert unread.valid.tolist() == [False]
    assert len(mute.failures) == 1


def test_a_list_of_the_authors_size(tmp_path: Path) -> None:
    """30 questions, 3 gates and 28 coefficients with their masks; the sum is written out as their code has it."""
    generator = torch.Generator().manual_seed(0)
    coef = torch.randn(28, generator=generator).tolist()
    texts = [f"question {k:02}?" for k in range(30)]
    paths = files(tmp_path, "\n".join(texts), {"coef": coef, "intercept": 0.5})
    for _ in range(5):
        said = torch.randint(0, 2, (30,), generator=generator).mul(2).sub(1).tolist()
        known = {text: "yes" if a > 0 else "no" for text, a in zip(texts, said, strict=True)}
        with served(answering(lambda body, known=known: reply_to(body, known, 0.25))) as (url, _):
            total = VisionReward(Endpoint(url, "m"), *paths)(grey(1), prompts(1)).total
        terms = list(said)
        for gate, closed in ((0, (22, 23, 24, 28, 29)), (1, (25, 26)), (2, (27,))):
            for k in closed:
                terms[k] *= said[gate] > 0
        expected = sum(c * x for c, x in zip(coef, [0.25, *terms[3:]], strict=True)) + 0.5
        assert float(total) == pytest.approx(expected, abs=1e-5)


def test_a_model_on_this_machine(tmp_path: Path) -> None:
    """Every answer is the likelier of yes and no by the logits; a batch is its singles."""
    folder = str(vlm_tiny.llava(tmp_path / "m", Yes=3.0, No=-3.0))
    media, asked, hand = Media(torch.randint(0, 256, (7, 3, 20, 24)) / 255), prompts(7), ByHand(folder)
    reward = VisionReward(LocalVLM(folder, dtype="float32", batch_size=5), *files(tmp_path), GATES)
    scores = reward(media, asked)
    expected = []
    for pixels, prompt in zip(media.pixels, asked.text, strict=True):
        a = [{"Yes": 1, "No": -1}[hand.word([pixels], line.strip())] for line in QUESTIONS.splitlines()]
        fit = hand.mass(hand.logits([pixels], VQA.replace("{prompt}", prompt)), ["Yes", f"{vlm_tiny.SPACE}yes"])
        kept = [a[2] * (a[0] > 0), a[3] * (a[0] > 0), a[4] * (a[1] > 0), a[5]]
        expected.append(2 * fit + sum(w * x for w, x in zip(COEF[1:], kept, strict=True)) + INTERCEPT)
    assert scores.total.tolist() == pytest.approx(expected, abs=1e-4)
    assert scores.parts["checklist"].unique().numel() > 1
    singles = torch.cat([reward(media.rows([i]), asked.rows([i])).total for i in range(7)])
    torch.testing.assert_close(singles, scores.total, rtol=0, atol=1e-4)


def test_videos(tmp_path: Path) -> None:
    paths = files(tmp_path, 'Is it "[[prompt]]"?\nSteady?\nClear?', [1.0, 0.5, -2.0])
    known = {'Is it "prompt 0"?': "Yes", "Steady?": "no", "Clear?": "no"}
    pixels = torch.linspace(0, 1, 9)[None, :, None, None, None].expand(1, 9, 3, 4, 4)
    with served(answering(lambda body: completion(known[question(body)]))) as (url, seen):
        reward = VisionRewardVideo(Endpoint(url, "m", frames=3), *paths)
        scores = reward(Media(pixels, 1.0), prompts(1))
        with pytest.raises(ValueError, match="scores videos"):
            reward(grey(1), prompts(1))
    assert scores.total.tolist() == pytest.approx([(1 - 0.5 + 2) / 3])
    assert shown(seen[0]["body"]) == pytest.approx([0, 0.5, 1], abs=0.01)
    assert list(scores.parts) == ["vision_reward_video"]


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    engine = Endpoint("http://localhost:1", "m")
    with pytest.raises(ValueError, match=r"has 5 coefficients, but .* needs 7"):
        VisionReward(engine, *files(tmp_path), masks=())
    with pytest.raises(ValueError, match="give its masks"):
        VisionReward(engine, *files(tmp_path))
    with pytest.raises(ValueError, match="must be a list of 6 numbers"):
        VisionRewardVideo(engine, *files(tmp_path))
    with pytest.raises(ValueError, match=r"questions .*gone.txt cannot be read"):
        read_questions(str(tmp_path / "gone.txt"))
    for text in ("", "\n", "a?\n\nb?"):
        with pytest.raises(ValueError, match="one question a line"):
            read_questions(files(tmp_path, text)[0])
    for held in (
        {"coef": [1.0]},
        {"coef": ["1"], "intercept": 0},
        {"coef": [True], "intercept": 0},
        {"coef": [math.inf], "intercept": 0},
        {"coef": [1], "intercept": [0, 0]},
        3,
        [[1]],
    ):
        with pytest.raises(ValueError, match="must hold"):
            read_weights(files(tmp_path, weights=held)[1])
    (tmp_path / "weight.json").write_text("{")
    with pytest.raises(ValueError, match=r"weights .* cannot be read"):
        read_weights(str(tmp_path / "weight.json"))
    assert read_weights(files(tmp_path, weights={"coef": [1, 2], "intercept": 3})[1]) == ((1.0, 2.0), 3.0)


def test_out_of_a_config(tmp_path: Path) -> None:
    questions, weights = files(tmp_path)
    config = {
        "class": "rewards.vision_reward.VisionReward",
        "endpoint": {"url": "http://localhost:8000/v1", "model": "m"},
        "questions": questions,
        "weights": weights,
        "masks": [{"gate": 0, "masked": [2, 3]}, {"gate": 1, "masked": [4]}],
    }

    def use(reward: Reward) -> Reward:
        return reward

    judge = build(use, {"reward": config})
    assert judge.checklist.masks == GATES
    assert judge.checklist.weights == (0.0, 0.0, *COEF[1:])

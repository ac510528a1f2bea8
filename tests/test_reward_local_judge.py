"""Judges over a model on this machine: against its logits by hand, in batches, in both orders, and where it is none."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vlm_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import is_torchvision_available
from vlm_tiny import ByHand

from flowalign.config import build, parse, plain
from flowalign.records import Media, Prompts
from rewards.base import Reward
from rewards.chat import Showing
from rewards.judge import Judge, PairJudge
from rewards.judges import PAIR, QUALITY, VQA, QualityLevels, SoftTIFA, UnifiedReward, VQAScore
from rewards.local_vlm import LocalVLM, padded_left
from rewards.verdicts import Answer, Unreadable, yes_no_log_odds

LEVELS = {"excellent": 5, f"{vlm_tiny.SPACE}good": 4, "Fair": 3, "fai": 3, "poor": 2, "bad": 1}
FAMILIES = ["llava", "idefics3"] + ["qwen2_5_vl"] * is_torchvision_available()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    makers = {"llava": vlm_tiny.llava, "idefics3": vlm_tiny.idefics3, "qwen2_5_vl": vlm_tiny.qwen2_5_vl}
    return {name: str(makers[name](tmp_path_factory.mktemp(name))) for name in FAMILIES}


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LLaVA that says nothing but Yes and No."""
    return str(vlm_tiny.llava(tmp_path_factory.mktemp("decided"), Yes=3.0, No=-3.0))


def local(folder: str, **settings: object) -> LocalVLM:
    return LocalVLM(folder, **({"dtype": "float32"} | settings))


def pictures(count: int, *frames: int) -> Media:
    return Media(torch.randint(0, 256, (count, *frames, 3, 20, 24)) / 255, 8.0 if frames else None)


def prompts(count: int, *groups: int) -> Prompts:
    return Prompts(tuple("cat and dog " * i + "!" for i in range(count)), ({},) * count, groups or None)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_odds_and_levels_are_those_of_the_logits(folders: dict[str, str], family: str) -> None:
    media, asked, hand, engine = pictures(3), prompts(3), ByHand(folders[family]), local(folders[family])
    odds = VQAScore(engine)(media, asked)
    texts = [VQA.replace("{prompt}", text) for text in asked.text]
    expected = [hand.log_odds([one], text) for one, text in zip(media.pixels, texts, strict=True)]
    assert odds.total.tolist() == pytest.approx(expected, abs=2e-5)
    assert len({round(value, 3) for value in expected}) == 3, "they differ"
    assert odds.valid.all()
    levels = QualityLevels(engine)(media, asked)
    for row, one in enumerate(media.pixels):
        logits = hand.logits([one], QUALITY)
        mass = {word: hand.mass(logits, [word]) for word in LEVELS}
        mean = sum(LEVELS[word] * p for word, p in mass.items()) / sum(mass.values())
        assert float(levels.total[row]) == pytest.approx(mean, abs=1e-5)
    assert len({round(value, 4) for value in levels.total.tolist()}) == 3, "it sees the pictures"


@pytest.mark.parametrize("family", FAMILIES)
def test_two_pictures_in_order(folders: dict[str, str], family: str) -> None:
    media, hand, engine = pictures(2), ByHand(folders[family]), local(folders[family])
    first, second = (VQAScore(engine).shown(media, row)[0] for row in range(2))
    showings = [Showing((first, second), ("Which one?",)), Showing((second, first), ("Which?", "Is it?"))]
    given = [answer for row in engine.answers(showings, True, 1) for answer in row]
    shown = [media.pixels, media.pixels.flip(0), media.pixels.flip(0)]
    expected = [hand.log_odds(one, text) for one, text in zip(shown, ("Which one?", "Which?", "Is it?"), strict=True)]
    assert [yes_no_log_odds(answer) for answer in given] == pytest.approx(expected, abs=2e-5)
    assert hand.log_odds(shown[1], "Which one?") != pytest.approx(expected[0], abs=1e-4), "their order tells"


def test_unlikely_words_are_listed_too(decided: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few alternatives listed the odds stay exact: an endpoint's would be a bound."""
    monkeypatch.setattr("rewards.local_vlm.LISTED", 1)
    media, asked, hand = pictures(3), prompts(3), ByHand(decided)
    expected = [hand.log_odds([media.pixels[i]], VQA.replace("{prompt}", asked.text[i])) for i in range(3)]
    assert VQAScore(local(decided))(media, asked).total.tolist() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_singles(folders: dict[str, str], family: str) -> None:
    media, asked = pictures(7), prompts(7)
    reward = VQAScore(local(folders[family], batch_size=4))
    whole = reward(media, asked).total
    singles = torch.cat([reward(media.rows([i]), asked.rows([i])).total for i in range(7)])
    torch.testing.assert_close(whole, singles, rtol=0, atol=2e-5)
    order = [4, 0, 6, 2, 1, 5, 3]
    torch.testing.assert_close(reward(media.rows(order), asked.rows(order)).total, whole[order], rtol=0, atol=2e-5)
    torch.testing.assert_close(reward(media, asked, chunk=3).total, whole, rtol=0, atol=2e-5)
    assert whole.std() > 0.01
    mask = reward.chat.inputs([(reward.shown(media, row), asked.text[row]) for row in range(7)])["attention_mask"]
    assert padded_left(mask), "so that they did go together"
    assert not mask.all()


def test_what_is_padded_on_the_right_is_asked_one_at_a_time(folders: dict[str, str]) -> None:
    media, asked = pictures(3), prompts(3)
    engine = local(folders["llava"])
    expected = VQAScore(engine)(media, asked).total
    processor = engine.processor

    class Right(SimpleNamespace):
        def __call__(self, **asked: object) -> dict[str, Tensor]:
            return processor(**(asked | {"padding_side": "right"}))

    engine.processor = Right(tokenizer=processor.tokenizer, apply_chat_template=processor.apply_chat_template)
    torch.testing.assert_close(VQAScore(engine)(media, asked).total, expected, rtol=0, atol=2e-5)


def test_padded_left() -> None:
    for row, left in (([0, 0, 1], True), ([1, 0, 0], False), ([1, 0, 1], False)):
        assert padded_left(torch.tensor([row, [1, 1, 1]])) is left


def test_bfloat16_towers_have_float32_log_probabilities(folders: dict[str, str]) -> None:
    media, asked = pictures(1), prompts(1)
    engine = LocalVLM(folders["llava"])
    assert engine.model.dtype == torch.bfloat16
    showing = Showing(VQAScore(engine).shown(media, 0), ("Is it?",))
    top = dict(engine.answers([showing], True, 1)[0][0].top)
    logits = ByHand(folders["llava"], torch.bfloat16).logits([media.pixels[0]], "Is it?")
    row = engine.processor.tokenizer.convert_tokens_to_ids("excellent")
    assert top["excellent"] == pytest.approx(float(logits.log_softmax(0)[row]), abs=1e-5)
    assert VQAScore(engine)(media, asked).total.dtype == torch.float32


def test_answers_are_greedy(tmp_path: Path) -> None:
    """Token for token the most likely one, whatever the model's generation settings say; then the answer ends."""
    folder = str(vlm_tiny.llava(tmp_path))
    GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=[7]).save_pretrained(folder)
    media, hand, engine = pictures(1), ByHand(folder), local(folder, max_tokens=6)
    inputs, made = hand.inputs([media.pixels[0]], "What is it?"), []
    for _ in range(6):
        with torch.no_grad():
            made.append(int(hand.model(**inputs).logits[0, -1].argmax()))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([made[-1:]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    showing = Showing(VQAScore(engine).shown(media, 0), ("What is it?",))
    decode = hand.processor.tokenizer.decode
    for most, count in ((None, 6), (2, 2), (999, 6)):
        assert engine.answers([showing], False, most)[0][0].text == decode(made[:count], skip_special_tokens=True)
    assert engine.model.generation_config.eos_token_id == sorted({7, hand.processor.tokenizer.eos_token_id})


class Overheard(LocalVLM):
    """A local model, and what it was shown."""

    def answers(self, showings: Sequence[Showing], logprobs: bool, tokens: int | None) -> list[list[Answer]]:
        self.showings = list(showings)
        return super().answers(showings, logprobs, tokens)


def says_yes(answer: Answer) -> float:
    if answer.text[:2] not in ("Ye", "No"):
        raise Unreadable("neither")
    return float(answer.text.startswith("Yes"))


def test_pairs_are_asked_in_both_orders(decided: str) -> None:
    """Win rates by hand from the logits, each order of pictures on its own."""
    media, asked, hand = pictures(4), prompts(4, 5, 5, 5, 5), ByHand(decided)
    engine = Overheard(decided, dtype="float32", max_tokens=1)
    judge = PairJudge(engine, "First or second? {prompt}", says_yes)
    scores = judge(media, asked)
    orders = [(a, b) for a in range(4) for b in range(4) if a != b]
    seen = [tuple(float(one.pixels.double().mean()) for one in showing.pictures) for showing in engine.showings]
    means = [float((one * 255).round().double().mean()) for one in media.pixels]
    assert sorted(seen) == sorted((means[a], means[b]) for a, b in orders), "every order, once"
    wins = {}
    for a, b in orders:
        shown, text = [media.pixels[a], media.pixels[b]], f"First or second? {asked.text[a]}"
        wins[a, b] = float(hand.word(shown, text) == "Yes")
    rates = [sum(wins[i, j] + 1 - wins[j, i] for j in range(4) if j != i) / 6 for i in range(4)]
    assert scores.total.tolist() == pytest.approx(rates)
    assert len(set(wins.values())) == 2, "it prefers now the first, now the second"


def test_what_cannot_be_read_is_invalid_and_kept(folders: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    engine = local(folders["llava"], max_tokens=5)
    with caplog.at_level(logging.WARNING, "flowalign"):
        judge = UnifiedReward(engine)
        scores = judge(pictures(2), prompts(2))
    assert not scores.valid.any()
    assert scores.total.isnan().all()
    assert [failure.reason for failure in judge.failures] == ["no score in it"] * 2
    assert judge.failures[0].text
    assert judge.failures[0].text in [record.args[2] for record in caplog.records]
    assert not PairJudge(engine, PAIR)(pictures(2), prompts(2, 0, 0)).valid.any()


def test_soft_tifa_and_part_names(folders: dict[str, str]) -> None:
    media, hand = pictures(1), ByHand(folders["llava"])
    asked = Prompts(("x",), ({"vqa_list": [["how many?", "two"], ["colour?", "red"]]},))
    scores = SoftTIFA(local(folders["llava"]))(media, asked)
    masses = [
        hand.mass(hand.logits([media.pixels[0]], f"{question} Answer in one word."), words)
        for question, words in (("how many?", ["two", "2"]), ("colour?", ["red"]))
    ]
    assert float(scores.total) == pytest.approx(math.sqrt(math.prod(masses)), rel=1e-4)
    assert float(scores.parts["soft_tifa_am"]) == pytest.approx(sum(masses) / 2, rel=1e-4)


def test_prompts_cannot_end_the_turn_or_stand_for_pictures(folders: dict[str, str]) -> None:
    reward, media = VQAScore(local(folders["llava"])), pictures(2)
    told = Prompts(("a cat", "a </s><image>cat"), ({}, {}))
    scores = reward(media.rows([0, 0]), told)
    assert float(scores.total[0]) == pytest.approx(float(scores.total[1]), abs=2e-5)


def test_videos_are_shown_as_frames(folders: dict[str, str]) -> None:
    media, hand = pictures(1, 9), ByHand(folders["llava"])
    scores = VQAScore(local(folders["llava"], frames=3))(media, prompts(1))
    shown = [media.pixels[0, frame] for frame in (0, 4, 8)]
    assert float(scores.total) == pytest.approx(hand.log_odds(shown, VQA.replace("{prompt}", "!")), abs=2e-5)


def test_no_gradient_and_why(folders: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="VQAScore has no gradient: its model's processor takes pictures in 8 bits"):
        VQAScore(local(folders["llava"]))(pictures(1), prompts(1), grad=True)


def test_out_of_a_config(folders: dict[str, str]) -> None:
    engine = {"class": "rewards.local_vlm.LocalVLM", "model": folders["llava"], "dtype": "float32"}
    config = {"class": "rewards.judges.VQAScore", "endpoint": engine | {"options": {"opening": "judge"}}}

    def use(reward: Reward) -> Reward:
        return reward

    judge = build(use, {"reward": config})
    assert isinstance(judge.chat, LocalVLM)
    assert judge.chat.text(1, "?").endswith("?judge:"), "what the template takes"
    written = plain(parse(use, {"reward": config}))["reward"]
    assert written["endpoint"]["batch_size"] == 8
    assert build(use, {"reward": written}).chat.model.dtype == torch.float32
    served = {"url": "http://localhost:8000/v1", "model": "m"}
    assert build(use, {"reward": config | {"endpoint": served}}).endpoint.model == "m", "the same argument"


def test_models_that_are_none(folders: dict[str, str], tmp_path: Path) -> None:
    for settings in ({"batch_size": 0}, {"frames": 0}, {"max_tokens": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            local(folders["llava"], **settings)
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in (str(tmp_path / "gone"), "nobody/no-such-model", str(empty)):
        with pytest.raises(ValueError, match="can be had neither as a folder") as caught:
            LocalVLM(name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    mute = tmp_path / "mute"
    vlm_tiny.llava(mute)
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no processor with a chat template"):
        LocalVLM(str(mute))


@pytest.mark.skipif(is_torchvision_available(), reason="it is installed")
def test_a_processor_that_needs_torchvision(tmp_path: Path) -> None:
    vlm_tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    named = '{"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}'
    (tmp_path / "preprocessor_config.json").write_text(named)
    with pytest.raises(ValueError, match=r"needs what is not installed: .*Torchvision") as caught:
        LocalVLM(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing(tmp_path: Path) -> None:
    file = vlm_tiny.llava(tmp_path) / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("layers.1.self_attn.q_proj.weight") and "language" in name)
    cut = {key: value for key, value in state.items() if key != name}
    save_file(cut, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit LlavaForConditionalGeneration: missing .*q_proj.weight"):
        LocalVLM(str(tmp_path))
    save_file(cut | {name: state[name][:5].clone()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"another shape of .*q_proj.weight"):
        LocalVLM(str(tmp_path))


def test_a_judge_of_ones_own_is_asked_by_its_template(folders: dict[str, str]) -> None:
    media, asked, hand = pictures(2), prompts(2), ByHand(folders["idefics3"])
    scores = Judge(local(folders["idefics3"], max_tokens=5), "Good: {prompt}")(media, asked)  # of five, the first
    expected = [hand.log_odds([media.pixels[i]], f"Good: {asked.text[i]}") for i in range(2)]
    assert scores.total.tolist() == pytest.approx(expected, abs=2e-5)

"""OCR: the score of a text that was read, what a prompt asks for, and RapidOCR where it is installed."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from flowalign.records import Media, Prompts
from rewards import OCR
from rewards.ocr import edit_distance, target_text, text_score


@pytest.mark.parametrize(
    ("read", "target", "score"),
    [
        ("Hello World!", "hello world!", 1.0),
        ("HELLO  WORLD !", "Hello World!", 1.0),  # blanks and case do not count
        ("SALE hello world! today", "Hello World!", 1.0),  # contained: what is around it costs nothing
        ("helo", "hello", 1 - 1 / 5),
        ("hxllo", "hello", 1 - 1 / 5),
        ("helloo", "hello", 1.0),
        ("hell oh", "hello", 1.0),  # contained without blanks
        ("", "hello", 0.0),
        ("a very long text about other things", "hello", 0.0),  # never below 0
        ("ollhe", "hello", 1 - 4 / 5),
    ],
)
def test_text_score(read: str, target: str, score: float) -> None:
    assert text_score(read, target) == pytest.approx(score)


def test_edit_distance_is_the_shortest_way() -> None:
    """Against all words of up to four letters by breadth-first search from one word."""
    words = ["".join(letters) for n in range(5) for letters in itertools.product("ab", repeat=n)]

    def neighbours(word: str) -> set[str]:
        cut = {word[:i] + word[i + 1 :] for i in range(len(word))}
        put = {word[:i] + c + word[i:] for i in range(len(word) + 1) for c in "ab"}
        swapped = {word[:i] + c + word[i + 1 :] for i in range(len(word)) for c in "ab"}
        return (cut | put | swapped) - {word}

    distance, edge = {"abba": 0}, ["abba"]
    while edge:
        near = {new for word in edge for new in neighbours(word) if len(new) <= 4} - set(distance)
        distance |= dict.fromkeys(near, distance[edge[0]] + 1)
        edge = sorted(near)
    assert {word: edit_distance("abba", word) for word in words} == distance
    assert edit_distance("kitten", "sitting") == edit_distance("sitting", "kitten") == 3


def one(prompt: str, **metadata: Any) -> Prompts:
    return Prompts((prompt,), (metadata,))


def test_target_is_the_metadata_or_the_first_quoted_text() -> None:
    assert target_text(one('A sign that says "Open" beside "Closed"'), 0) == "Open"
    assert target_text(one('A sign that says "Open"', text="Late"), 0) == "Late"
    assert target_text(one('A sign that says "Open'), 0) == "Open"


@pytest.mark.parametrize("text", ["a sign", "it's 'open'", 'a sign that says ""', 'a sign that says " "'])
def test_a_prompt_without_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"prompt 0 .* asks for no text"):
        target_text(one(text), 0)


@pytest.mark.skipif(importlib.util.find_spec("rapidocr") is not None, reason="rapidocr is installed")
def test_without_the_extra_it_says_how_to_get_it() -> None:
    with pytest.raises(ValueError, match=r"pip install 'flowalign-diffusion\[ocr\]'"):
        OCR()


def written(text: str) -> torch.Tensor:
    """A picture 128 high and 384 wide with a text in black, its paper yellow so that swapped channels would show."""
    image = Image.new("RGB", (384, 128), (250, 240, 150))
    ImageDraw.Draw(image).text((20, 30), text, fill="black", font=ImageFont.load_default(48))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def reward() -> OCR:
    pytest.importorskip("rapidocr", reason="reads with the extra [ocr]")
    return OCR()


def test_it_reads(reward: OCR) -> None:
    pixels = torch.stack([written("Hello World!"), written("Hello World!"), written("")])
    asked = ('a sign "Hello World!"', 'a sign "Hallo Welt!"', 'a sign "Hello World!"')
    scores = reward.score(Media(pixels), Prompts(asked, ({}, {}, {})))
    assert scores.total[0] == 1.0
    assert 0.3 < scores.total[1] < 0.9
    assert scores.total[2] == 0.0
    assert scores.valid.all()


@pytest.mark.parametrize(("right", "wrong"), [("Open", "Closed"), ("NASA 2049", "Bakery"), ("cat", "dog")])
def test_a_wrong_word_is_below_a_half(reward: OCR, right: str, wrong: str) -> None:
    pixels = written(right).repeat(2, 1, 1, 1)
    scores = reward(Media(pixels), Prompts((f'a sign "{right}"', f'a sign "{wrong}"'), ({}, {})))
    assert scores.total[0] == 1.0
    assert scores.total[1] < 0.5


def test_a_picture_it_fails_on_has_no_score(reward: OCR, caplog: pytest.LogCaptureFixture) -> None:
    working = reward.engine

    def breaks_on_narrow(image: Any, use_cls: bool) -> Any:
        if image.shape[1] < 200:
            raise RuntimeError("no such size")
        return working(image, use_cls=use_cls)

    reward.engine = breaks_on_narrow
    try:
        scores = reward.score(Media(torch.rand(1, 3, 64, 100)), one('"a"'))
        assert not scores.valid.any()
        assert "no such size" in caplog.text
        assert reward.score(Media(written("Open")[None]), one('"Open"')).valid.all()
    finally:
        reward.engine = working


def test_a_picture_that_is_not_finite_has_no_score(reward: OCR) -> None:
    pixels = written("Open").repeat(2, 1, 1, 1)
    pixels[1, 0, 0, 0] = torch.nan
    assert reward.score(Media(pixels), Prompts(('"Open"',) * 2, ({}, {}))).valid.tolist() == [True, False]

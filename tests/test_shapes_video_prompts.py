"""Prompts and training sets of the embedded world of videos: paraphrased, split by meaning, wrong only where asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from flowalign.records import Prompts
from flowalign.shapes.scenes import SIZE, UNSEEN
from flowalign.shapes.video import captioned, held_out_prompts, train_prompts
from flowalign.shapes.video.prompts import held_out, meaning
from flowalign.shapes.video.scenes import (
    DIRECTIONS,
    KINDS,
    UNSEEN_CHANGES,
    UNSEEN_MOTIONS,
    Actor,
    Spec,
    caption,
    corrupt,
    random_spec,
)
from flowalign.shapes.video.verifier import verify


def specs_drawn(count: int, seed: int, kinds: tuple[str, ...] = KINDS) -> list[Spec]:
    rng = np.random.default_rng(seed)
    return [random_spec(rng, kinds) for _ in range(count)]


@cache
def drawn() -> tuple[Prompts, Prompts]:
    return train_prompts(4000), held_out_prompts(4000)


def specs_of(prompts: Prompts) -> list[Spec]:
    return [Spec.from_dict(record["spec"]) for record in prompts.metadata]


def new_in(spec: Spec) -> bool:
    shown = {(a.color, a.shape) for a in spec.actors} | {(a.becomes, a.shape) for a in spec.actors}
    moved, turned = {(a.color, a.motion) for a in spec.actors}, {(a.color, a.becomes) for a in spec.actors}
    return bool(shown & UNSEEN or moved & UNSEEN_MOTIONS or turned & UNSEEN_CHANGES)


def test_no_held_out_meaning_is_trained_on() -> None:
    train, held = (specs_of(prompts) for prompts in drawn())
    assert {meaning(spec) for spec in train}.isdisjoint(meaning(spec) for spec in held)
    assert set(drawn()[0].text).isdisjoint(drawn()[1].text)
    assert {spec.kind for spec in held} == {spec.kind for spec in train} == set(KINDS)
    assert not any(new_in(spec) for spec in train)
    told = [record["unseen"] for record in drawn()[1].metadata]
    assert told == [new_in(spec) for spec in held]
    assert 0.2 < np.mean(told) < 0.9
    moved = {(a.color, a.motion) for spec in held for a in spec.actors}
    turned = {(a.color, a.becomes) for spec in held for a in spec.actors}
    assert moved >= UNSEEN_MOTIONS
    assert turned >= UNSEEN_CHANGES


def test_prompts_are_the_same_at_every_call_and_others_with_another_seed() -> None:
    assert train_prompts(20) == train_prompts(20)
    assert train_prompts(20).text != train_prompts(20, seed=1).text
    assert {record["kind"] for record in held_out_prompts(30, kinds=("change",)).metadata} == {"change"}


def test_equal_meanings() -> None:
    one, other = Actor("red", "circle", "left"), Actor("blue", "square", "right")
    assert meaning(Spec("opposite", (one, other))) == meaning(Spec("opposite", (other, one)))
    exchanged = (replace(one, motion="right"), replace(other, motion="left"))
    assert meaning(Spec("opposite", exchanged)) != meaning(Spec("opposite", (one, other)))
    assert meaning(Spec("meeting", (one, other), "meet")) != meaning(Spec("meeting", (one, other), "part"))


@pytest.mark.parametrize("kind", KINDS)
def test_captions_paraphrase_one_meaning(kind: str) -> None:
    rng = np.random.default_rng(0)
    for spec in specs_drawn(10, 18, (kind,)):
        texts = {caption(spec, rng) for _ in range(80)}
        assert len(texts) == {"meeting": 3, "change": 4}.get(kind, 6)
        for text in texts:
            assert not Counter(text)["{"]
            assert all(actor.shape in text and actor.color in text for actor in spec.actors)
            assert all(str(actor.becomes) in text for actor in spec.actors if actor.becomes)
            moving = [actor.motion for actor in spec.actors if actor.motion in DIRECTIONS]
            assert all(f"{direction}" in text for direction in moving)
            assert all(f"{actor.speed}" in text for actor in spec.actors if actor.speed)


@pytest.mark.parametrize("kind", KINDS)
def test_corrupt_always_changes_the_meaning(kind: str) -> None:
    rng = np.random.default_rng(1)
    for spec in specs_drawn(200, 19, (kind,)):
        wrong = corrupt(spec, rng)
        assert meaning(wrong) != meaning(spec)
        assert wrong.kind == kind
        assert Spec.from_dict(spec.to_dict()) == spec


def test_training_sets_have_wrong_captions_as_asked_and_nothing_held_out() -> None:
    made = captioned(300, seed=2, wrong={"move": 1.0, "change": 1.0})
    same = captioned(300, seed=2, wrong={"move": 1.0, "change": 1.0})
    assert (made.captions, made.specs) == (same.captions, same.specs)
    assert (made.videos == same.videos).all()
    assert made.videos.shape == (300, 9, 3, SIZE, SIZE)
    assert not any(held_out(spec) for spec in made.specs)
    assert verify(torch.from_numpy(made.videos) / 255, list(made.specs))[1].float().mean() > 0.98
    known = {text: spec for spec, text in zip(specs_of(drawn()[0]), drawn()[0].text, strict=True)}
    pairs = [(known[text], spec) for text, spec in zip(made.captions, made.specs, strict=True) if text in known]
    wrong = Counter(spec.kind for told, spec in pairs if meaning(told) != meaning(spec))
    assert wrong.keys() == {"move", "change"}
    assert wrong["move"] > 0.85 * sum(spec.kind == "move" for _, spec in pairs)
    assert captioned(2, frames=5).videos.shape[1] == 5
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        captioned(2, frames=1)

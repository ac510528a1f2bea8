"""The embedded world: a verifier that is right about pictures and hard to please, and prompts that do not leak."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from flowalign.config import build
from flowalign.records import Media, Prompts
from flowalign.shapes import held_out_prompts, train_prompts
from flowalign.shapes.prompts import held_out, meaning
from flowalign.shapes.scenes import (
    COLORS,
    GREY,
    KINDS,
    OPPOSITE,
    RADII,
    SHAPES,
    SIZE,
    UNSEEN,
    Group,
    Placed,
    Spec,
    caption,
    corrupt,
    draw,
    inside,
    place,
    random_spec,
    render,
)
from flowalign.shapes.verifier import LARGEST, Detected, clauses, detect, passes, verify
from rewards import JPEGCompressibility, ShapesVerifier
from rewards.base import Reward

SCENES = 5000


def tensor(*pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).float() / 255


def picture(*objects: Placed) -> Tensor:
    return tensor(draw(list(objects)))


def one(color: str, shape: str, x: float = 16.0, y: float = 16.0, radius: float = 5.0) -> Placed:
    return Placed(color, shape, x, y, radius)


def strict(pixels: Tensor, spec: Spec) -> bool:
    return bool(verify(pixels, [spec])[1])


@cache
def scenes() -> tuple[list[Spec], Tensor]:
    rng = np.random.default_rng(7)
    specs = [random_spec(rng) for _ in range(SCENES)]
    return specs, tensor(*(render(spec, rng) for spec in specs))


@cache
def found() -> list[list[Detected]]:
    return detect(scenes()[1])


def share_passing(specs: list[Spec], things: list[list[Detected]]) -> float:
    return float(np.mean([passes(clauses(*given)) for given in zip(specs, things, strict=True)]))


def test_right_pictures_pass() -> None:
    specs = scenes()[0]
    assert share_passing(specs, found()) >= 0.985
    for kind in KINDS:
        chosen = [i for i, spec in enumerate(specs) if spec.kind == kind]
        assert share_passing([specs[i] for i in chosen], [found()[i] for i in chosen]) >= 0.97, kind


def test_pictures_of_corrupted_captions_do_not_pass() -> None:
    rng = np.random.default_rng(8)
    wrong = [corrupt(spec, rng) for spec in scenes()[0]]
    assert share_passing(wrong, found()) < 0.002


def unsized(spec: Spec) -> str:
    return meaning(replace(spec, groups=tuple(replace(group, size=None) for group in spec.groups)))


def test_pictures_of_other_captions_do_not_pass() -> None:
    """But for those that fit both captions, as a small red circle is a red circle."""
    specs = scenes()[0]
    others = specs[1:] + specs[:1]
    different = [i for i, spec in enumerate(specs) if unsized(spec) != unsized(others[i])]
    assert len(different) > 0.9 * SCENES
    assert share_passing([others[i] for i in different], [found()[i] for i in different]) < 0.0005


def test_faint_noise_and_paleness_are_forgiven() -> None:
    specs, pixels = scenes()[0][:1000], scenes()[1][:1000]
    shaken = 0.85 * (pixels - GREY) + GREY + 0.02 * torch.randn(pixels.shape)
    assert verify(shaken.clamp(0, 1), specs)[1].float().mean() > 0.97


def test_noise_and_blank_pictures_show_nothing() -> None:
    specs = scenes()[0][:300]
    for pixels in (torch.rand(300, 3, SIZE, SIZE), torch.full((300, 3, SIZE, SIZE), GREY), torch.randn(300, 3, 32, 32)):
        assert not verify(pixels, specs)[1].any()
    assert detect(torch.full((1, 3, SIZE, SIZE), GREY)) == [[]]


@pytest.mark.parametrize("color", COLORS)
def test_a_filled_frame_is_no_square(color: str) -> None:
    plain = torch.tensor(COLORS[color])[None, :, None, None].expand(1, 3, SIZE, SIZE)
    assert [thing.shape for thing in detect(plain)[0]] == ["unknown"]
    for size in (None, "large"):
        assert not strict(plain, Spec("single", (Group(color, "square", size=size),)))


def test_the_largest_object_is_one() -> None:
    most = max(high for _, high in RADII.values())
    for x in np.linspace(15.5, 16.5, 5):
        things = detect(picture(one("white", "square", float(x), float(x), most)))[0]
        assert [(thing.shape, thing.extent <= LARGEST - 1) for thing in things] == [("square", True)]


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_object(color: str, shape: str) -> None:
    pixels = picture(one(color, shape))
    things = detect(pixels)[0]
    assert [(thing.color, thing.shape) for thing in things] == [(color, shape)]
    assert abs(things[0].x - 16) < 1
    assert strict(pixels, Spec("single", (Group(color, shape),)))
    for other in COLORS:
        assert strict(pixels, Spec("single", (Group(other, shape),))) == (other == color)
    for other in SHAPES:
        assert strict(pixels, Spec("single", (Group(color, other),))) == (other == shape)
    assert not strict(pixels, Spec("count", (Group(color, shape, count=2),)))


PLACES = {"left of": (7.0, 16.0), "right of": (25.0, 16.0), "above": (16.0, 7.0), "below": (16.0, 25.0)}


@pytest.mark.parametrize("relation", OPPOSITE)
def test_relations_have_a_direction(relation: str) -> None:
    pixels = picture(one("red", "circle", *PLACES[relation]), one("blue", "square", *PLACES[OPPOSITE[relation]]))
    for asked in OPPOSITE:
        spec = Spec("relation", (Group("red", "circle"), Group("blue", "square")), asked)
        turned = Spec("relation", (Group("blue", "square"), Group("red", "circle")), asked)
        assert strict(pixels, spec) == (asked == relation)
        assert strict(pixels, turned) == (asked == OPPOSITE[relation])


def test_something_else_and_a_wrong_size_are_seen() -> None:
    spec = Spec("size", (Group("red", "circle", size="small"),))
    small, large, extra = one("red", "circle", 9, 9, 4), one("red", "circle", 9, 9, 6), one("blue", "cross", 24, 24, 4)
    assert strict(picture(small), spec)
    assert not strict(picture(large), spec)
    assert not strict(picture(small, extra), spec)
    assert strict(picture(large), Spec("size", (Group("red", "circle", size="large"),)))


@cache
def drawn() -> tuple[Prompts, Prompts]:
    return train_prompts(4000), held_out_prompts(4000)


def specs_of(prompts: Prompts) -> list[Spec]:
    return [Spec.from_dict(record["spec"]) for record in prompts.metadata]


def named(spec: Spec) -> set[tuple[str, str]]:
    return {(group.color, group.shape) for group in spec.groups}


def test_no_held_out_meaning_is_trained_on() -> None:
    train, held = (specs_of(prompts) for prompts in drawn())
    assert {meaning(spec) for spec in train}.isdisjoint(meaning(spec) for spec in held)
    assert set(drawn()[0].text).isdisjoint(drawn()[1].text)
    assert not any(held_out(spec) for spec in train)
    assert {spec.kind for spec in held} == {spec.kind for spec in train} == set(KINDS)


def test_unseen_compositions_are_held_out() -> None:
    train, held = (specs_of(prompts) for prompts in drawn())
    assert not any(named(spec) & UNSEEN for spec in train)
    assert set.union(*(named(spec) for spec in held)) >= UNSEEN
    told = [record["unseen"] for record in drawn()[1].metadata]
    assert told == [bool(named(spec) & UNSEEN) for spec in held]
    assert 0.2 < np.mean(told) < 0.9


def test_prompts_are_the_same_at_every_call_and_others_with_another_seed() -> None:
    assert train_prompts(20) == train_prompts(20)
    assert train_prompts(20).text != train_prompts(20, seed=1).text
    assert {record["kind"] for record in train_prompts(30, kinds=("count",)).metadata} == {"count"}


def test_equal_meanings() -> None:
    a, b = Group("red", "circle"), Group("blue", "square")
    assert meaning(Spec("relation", (a, b), "left of")) == meaning(Spec("relation", (b, a), "right of"))
    assert meaning(Spec("relation", (a, b), "above")) == meaning(Spec("relation", (b, a), "below"))
    assert meaning(Spec("relation", (a, b), "left of")) != meaning(Spec("relation", (b, a), "left of"))
    assert meaning(Spec("pair", (a, b))) == meaning(Spec("pair", (b, a)))
    assert meaning(Spec("pair", (a, b))) != meaning(Spec("pair", (Group("red", "square"), Group("blue", "circle"))))


@pytest.mark.parametrize("kind", KINDS)
def test_captions_paraphrase_one_meaning(kind: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        spec = random_spec(rng, (kind,))
        texts = {caption(spec, rng) for _ in range(60)}
        assert len(texts) == {"pair": 4, "count_pair": 4}.get(kind, 6 if spec.relation else 2)
        plain = Counter(text.removeprefix("there is ").removeprefix("there are ") for text in texts)
        assert set(plain.values()) == {2}, "each wording with and without an opening"
        for text, group in ((text, group) for text in texts for group in spec.groups):
            assert f"{group.color} {group.shape}" in text
            assert {1: "a ", 2: "two ", 3: "three "}[group.count] + (f"{group.size} " if group.size else "") in text


@pytest.mark.parametrize("kind", KINDS)
def test_corrupt_always_changes_the_meaning(kind: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        spec = random_spec(rng, (kind,))
        wrong = corrupt(spec, rng)
        assert meaning(wrong) != meaning(spec)
        assert caption(wrong, rng) != caption(spec, rng)
        assert wrong.kind == kind


def test_specs_survive_plain_data() -> None:
    rng = np.random.default_rng(2)
    for spec in (random_spec(rng) for _ in range(50)):
        assert Spec.from_dict(spec.to_dict()) == spec


def test_scenes_are_drawn_as_asked() -> None:
    rng = np.random.default_rng(3)
    for spec in (random_spec(rng) for _ in range(300)):
        placed = place(spec, rng)
        wanted = Counter({(g.color, g.shape): g.count for g in spec.groups})
        assert Counter((item.color, item.shape) for item in placed) == wanted
        assert all(item.radius < min(item.x, item.y, SIZE - item.x, SIZE - item.y) for item in placed)
        if spec.relation in ("left of", "above"):
            first, second = placed
            assert first.x < second.x if spec.relation == "left of" else first.y < second.y


@pytest.mark.parametrize(("shape", "area"), [("circle", np.pi), ("square", 4), ("triangle", 2), ("cross", 20 / 9)])
def test_areas_of_the_shapes(shape: str, area: float) -> None:
    ticks = (np.arange(-300, 300) + 0.5) / 200
    assert inside(shape, ticks[None, :], ticks[:, None]).mean() * 9 == pytest.approx(area, rel=0.01)


def test_a_triangle_points_up() -> None:
    rows = np.abs(draw([one("black", "triangle", radius=8.0)]).astype(int) - 128).sum((0, 2))
    assert rows[10] < rows[16] < rows[22]


def prompts_for(*specs: Spec) -> Prompts:
    return Prompts(("x",) * len(specs), tuple({"spec": spec.to_dict()} for spec in specs))


def test_reward_is_the_mean_of_clauses_and_the_verdict() -> None:
    """Red circle left of blue square, as asked; then mirrored: five of six clauses hold (each object is there once,
    nothing else is, the relation is not); then without the square, so that one object of two is there.

    A relation's score is the logistic function of 4 (cosine - 1/2): .8808 straight to the left, .0025 to the right.
    """
    a, b = one("red", "circle", 7, 16), one("blue", "square", 25, 16)
    mirrored = one("red", "circle", 25, 16), one("blue", "square", 7, 16)
    spec = Spec("relation", (Group("red", "circle"), Group("blue", "square")), "left of")
    pixels = torch.cat([picture(a, b), picture(*mirrored), picture(a)])
    scores = ShapesVerifier(strict_weight=0.25).score(Media(pixels), prompts_for(spec, spec, spec))
    clauses = torch.tensor([5.8808, 5.0025, 2.5]) / 6
    torch.testing.assert_close(scores.parts["clauses"], clauses, atol=1e-4, rtol=0)
    assert scores.parts["strict"].tolist() == [1, 0, 0]
    torch.testing.assert_close(scores.total, 0.75 * clauses + 0.25 * scores.parts["strict"], atol=1e-4, rtol=0)
    assert scores.valid.all()
    kinds = {name: value.tolist() for name, value in scores.parts.items() if name.startswith("clause/")}
    assert kinds.pop("clause/size") == pytest.approx([math.nan] * 3, nan_ok=True), "the caption names no size"
    assert kinds == {
        "clause/object": [1, 1, 0], "clause/count": [1, 1, 0], "clause/relation": [1, 0, 0],
        "clause/nothing else": [1, 1, 0],
    }  # fmt: skip


def test_strict_weight_mixes_the_parts() -> None:
    specs, pixels = scenes()
    given, asked = Media(pixels[:200]), prompts_for(*specs[1:201])
    parts = ShapesVerifier(0.0).score(given, asked).parts
    for weight in (0.0, 0.5, 1.0):
        total = ShapesVerifier(weight).score(given, asked).total
        torch.testing.assert_close(total, (1 - weight) * parts["clauses"] + weight * parts["strict"])
    right = ShapesVerifier().score(given, prompts_for(*specs[:200])).parts
    assert right["clauses"][right["strict"] == 1].min() > 0.8
    assert parts["clauses"].std() > 0.1
    assert not ShapesVerifier().differentiable


def test_every_clause_of_the_share_is_the_verdicts() -> None:
    specs, pixels = scenes()
    for scores in verify(pixels[:200], specs[1:201])[0]:
        assert passes(scores) == all(passes({name: value}) for name, value in scores.items())


def test_reward_reads_prompts_of_the_world() -> None:
    prompts = held_out_prompts(100)
    rng = np.random.default_rng(4)
    right = tensor(*(render(spec, rng) for spec in specs_of(prompts)))
    wrong = tensor(*(render(corrupt(spec, rng), rng) for spec in specs_of(prompts)))
    reward = ShapesVerifier()
    assert reward.score(Media(right), prompts).total.mean() > 0.94
    assert reward.score(Media(wrong), prompts).total.mean() < 0.5
    both = (reward - 1).score(Media(right), prompts)
    assert {"clauses", "strict", "clause/relation"} <= both.parts.keys()


def test_a_prompt_without_a_spec_is_named() -> None:
    known = train_prompts(1)
    prompts = Prompts((*known.text, "a cat"), (*known.metadata, {"kind": "single"}))
    with pytest.raises(ValueError, match=r"prompt 1 \('a cat'\) has no metadata\['spec'\].*train_prompts or held_out"):
        ShapesVerifier().score(Media(torch.rand(2, 3, SIZE, SIZE)), prompts)
    with pytest.raises(ValueError, match=r"prompt 0 \('a dog'\)"):
        ShapesVerifier().score(Media(torch.rand(1, 3, SIZE, SIZE)), Prompts(("a dog",), ({"spec": "dog"},)))


RED = {"color": "red", "shape": "circle"}


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"kind": "single"}, "it has no 'groups'"),
        ({"kind": "single", "groups": [RED | {"color": "purplish"}]}, "color 'purplish' is none of red, green, blue"),
        ({"kind": "single", "groups": [RED | {"shape": "disc"}]}, "shape 'disc' is none of circle"),
        ({"kind": "size", "groups": [RED | {"size": "huge"}]}, "size 'huge' is none of small, large"),
        ({"kind": "count", "groups": [RED | {"count": 0}]}, "count must be a positive whole number, not 0"),
        ({"kind": "single", "groups": [RED | {"sizes": "large"}]}, "unexpected keyword argument 'sizes'"),
        ({"kind": "relation", "groups": [RED], "relation": "left of"}, "it has 1 groups, and needs at least 2"),
        ({"kind": "one", "groups": [RED]}, "kind 'one' is none of single"),
        (3, "metadata['spec'] is no scene"),
    ],
)
def test_what_is_wrong_with_a_spec_is_said(spec: object, told: str) -> None:
    with pytest.raises(ValueError, match=r"prompt 0 \('a dog'\)") as caught:
        ShapesVerifier().score(Media(torch.rand(1, 3, SIZE, SIZE)), Prompts(("a dog",), ({"spec": spec},)))
    assert told in str(caught.value)


def test_a_broken_picture_has_no_score() -> None:
    pixels = torch.cat([picture(one("red", "circle"))] * 2)
    pixels[0, 0, 0, 0] = torch.nan
    spec = Spec("single", (Group("red", "circle"),))
    assert ShapesVerifier().score(Media(pixels), prompts_for(spec, spec)).valid.tolist() == [False, True]


def test_wrong_settings_and_sizes() -> None:
    with pytest.raises(ValueError, match=r"strict_weight must be in \[0, 1\], got 1.5"):
        ShapesVerifier(1.5)
    with pytest.raises(ValueError, match=r"pictures of 32 x 32, got \[64, 64\]"):
        ShapesVerifier().score(Media(torch.rand(1, 3, 64, 64)), train_prompts(1))
    with pytest.raises(ValueError, match="ShapesVerifier scores pictures"):
        ShapesVerifier().score(Media(torch.rand(1, 2, 3, 32, 32)), train_prompts(1))


@dataclass(frozen=True)
class Target:
    reward: Reward


def test_configs_name_rewards_by_their_short_path() -> None:
    made = build(Target, {"reward": "rewards.ShapesVerifier"}).reward
    assert isinstance(made, ShapesVerifier)
    assert made.strict_weight == 0.5
    made = build(Target, {"reward": {"class": "rewards.ShapesVerifier", "strict_weight": 0.25}}).reward
    assert isinstance(made, ShapesVerifier)
    assert made.strict_weight == 0.25
    assert isinstance(build(Target, {"reward": "rewards.JPEGCompressibility"}).reward, JPEGCompressibility)
    with pytest.raises(ValueError, match="strict_weight must be in"):
        build(Target, {"reward": {"class": "rewards.ShapesVerifier", "strict_weight": 2}})

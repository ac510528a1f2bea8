"""GenEval: verdicts on objects made by hand, the read-out of a detector, colours, and a tiny Mask2Former throughout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import byte_tokenizer
from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from flowalign.records import Media, Prompts
from rewards import GenEval
from rewards.clip import CLIPScore
from rewards.geneval import COLORS, Colors, classify_colors, correct, cut_out, graded, kept, read_spec, relations
from rewards.mask2former import NAMES, Detection, Detector, Objects, instances, network_input

EMPTY = torch.zeros(1, 1, dtype=torch.bool)


def at(left: float, top: float, size: float = 10, score: float = 0.95) -> Detection:
    return Detection((left, top, left + size, top + size), score, EMPTY)


def spec(*include: dict[str, Any], exclude: tuple[dict[str, Any], ...] = (), tag: str = "any") -> Any:
    row = json.loads(json.dumps({"tag": tag, "include": include, "exclude": exclude}))
    return read_spec(Prompts(("a photo",), (row,)), 0)


def painted(**colors: list[str]) -> Colors:
    return lambda name, count: colors[name][:count]


def no_colors(name: str, count: int) -> list[str]:
    raise AssertionError("no colour was asked for")


def both(
    objects: Objects, wanted: Any, colors: Callable[[str, int], list[str]] = no_colors
) -> tuple[float, bool, bool]:
    soft, strict = graded(objects, wanted, colors)
    return soft, strict, correct(objects, wanted, colors)


@pytest.mark.parametrize(
    ("found", "soft", "strict", "benchmark"),
    [(0, 0.0, False, False), (1, 1.0, True, True), (2, 0.0, False, True), (3, -1.0, False, True)],
)
def test_a_single_object(found: int, soft: float, strict: bool, benchmark: bool) -> None:
    objects = {"cat": [at(0, 0)] * found} if found else {}
    assert both(objects, spec({"class": "cat", "count": 1})) == (soft, strict, benchmark)


@pytest.mark.parametrize(
    ("found", "soft", "strict", "benchmark"),
    [(1, 1 / 3, False, False), (2, 2 / 3, False, False), (3, 1.0, True, True), (4, 2 / 3, False, False)],
)
def test_counting_excludes_one_more(found: int, soft: float, strict: bool, benchmark: bool) -> None:
    wanted = spec({"class": "cat", "count": 3}, exclude=({"class": "cat", "count": 4},), tag="counting")
    got = both({"cat": [at(0, 0)] * found}, wanted)
    assert got[0] == pytest.approx(soft)
    assert got[1:] == (strict, benchmark)


def test_two_objects_are_averaged() -> None:
    wanted = spec({"class": "cat", "count": 1}, {"class": "dog", "count": 1})
    assert both({"cat": [at(0, 0)], "dog": [at(9, 9)]}, wanted) == (1.0, True, True)
    assert both({"dog": [at(9, 9)]}, wanted) == (0.5, False, False)


def test_colours_are_counted() -> None:
    wanted = spec({"class": "cat", "count": 2, "color": "red"})
    cats = {"cat": [at(0, 0), at(20, 0)]}
    assert both(cats, wanted, painted(cat=["red", "red"])) == (1.0, True, True)
    assert both(cats, wanted, painted(cat=["red", "blue"])) == (0.75, False, False)
    assert both(cats, wanted, painted(cat=["green", "blue"])) == (0.5, False, False)
    assert both({"cat": [at(0, 0)]}, wanted) == (0.25, False, False)  # (1/2 + one 0) / 2, and no colour is looked at
    # a third: for the benchmark the two surest decide, for the reward the count is wrong
    three = {"cat": [at(0, 0), at(20, 0), at(40, 0)]}
    assert both(three, wanted, painted(cat=["red", "red", "blue"])) == (0.25, False, True)


LEFT = ({"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]})


def test_positions_are_of_the_later_object_as_seen_from_the_earlier() -> None:
    wanted = spec(*LEFT)
    assert both({"cat": [at(0, 0)], "dog": [at(50, 0)]}, wanted) == (1.0, True, True)
    # wrong: 1, 1, and then a 0 and a 1 as in the authors' code
    assert both({"cat": [at(50, 0)], "dog": [at(0, 0)]}, wanted) == (0.75, False, False)
    assert graded({"cat": [at(50, 0)], "dog": [at(0, 0)]}, wanted, no_colors, False)[0] == pytest.approx(2 / 3)
    # no dog: 0, 1, 0
    soft, strict, benchmark = both({"cat": [at(0, 0)]}, wanted)
    assert (soft, strict, benchmark) == (pytest.approx(1 / 3), False, False)
    # no cat: 1, 0, and one 0 for the position
    assert both({"dog": [at(50, 0)]}, wanted)[0] == pytest.approx(1 / 3)


def test_every_object_has_to_be_placed() -> None:
    wanted = spec({"class": "dog", "count": 2}, {"class": "cat", "count": 1, "position": ["left of", 0]})
    dogs = [at(50, 0), at(80, 0)]
    assert both({"cat": [at(0, 0)], "dog": dogs}, wanted) == (1.0, True, True)
    assert both({"cat": [at(65, 0)], "dog": dogs}, wanted)[1:] == (False, False)


def test_a_wrong_colour_hides_the_position() -> None:
    wanted = spec(LEFT[0], {**LEFT[1], "color": "red"})
    objects = {"cat": [at(0, 0)], "dog": [at(50, 0)]}
    assert both(objects, wanted, painted(cat=["red"])) == (1.0, True, True)
    soft, strict, benchmark = both(objects, wanted, painted(cat=["blue"]))
    assert (soft, strict, benchmark) == (pytest.approx(2 / 3), False, False)  # 1, 1, 0


@pytest.mark.parametrize(
    ("left", "top", "expected"),
    [
        (-30, 0, {"left of"}),
        (30, 0, {"right of"}),
        (0, -30, {"above"}),  # rows count from the top
        (0, 30, {"below"}),
        (-30, -30, {"left of", "above"}),
        (30, 30, {"right of", "below"}),
        (30, 10, {"right of"}),
        (0, 0, set()),
        (2, 0, set()),  # exactly 0.1 of both extents, 10 + 10
        (3.9, 0, set()),  # what is left, 1.9, is less than half of the offset
        (4.1, 0, {"right of"}),
    ],
)
def test_relations(left: float, top: float, expected: set[str]) -> None:
    assert relations(at(left, top).box, at(0, 0).box) == expected


def test_wide_objects_need_more_room() -> None:
    wide = (-50.0, 0.0, 50.0, 10.0)
    assert relations((16.0, 0.0, 26.0, 10.0), wide) == set()  # offset 21, less 11: 10 of 21
    assert relations((18.0, 0.0, 28.0, 10.0), wide) == {"right of"}  # offset 23, less 11: 12 of 23


def test_counting_is_stricter_and_classes_are_cut_at_sixteen() -> None:
    cats = [at(i, 0, score=score) for i, score in enumerate([0.99, 0.95, 0.9, 0.6])]
    objects = {"cat": cats, "dog": [at(0, 0, score=0.5)] * 20}
    assert [len(found) for found in kept(objects, counting=False).values()] == [4, 16]
    assert kept(objects, counting=True) == {"cat": cats[:2]}


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"include": [{"class": "cat", "count": 1}]},
        {"tag": "x", "include": []},
        {"tag": "x", "include": [{"class": "cat"}]},
        {"tag": "x", "include": [{"class": "mouse", "count": 1}]},
        {"tag": "x", "include": [{"class": "cat", "count": 0}]},
        {"tag": "x", "include": [{"class": "cat", "count": 1, "color": "mauve"}]},
        {"tag": "x", "include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]},
        {"tag": "x", "include": [LEFT[0], {**LEFT[1], "position": ["beside", 0]}]},
        {"tag": "x", "include": "cat"},
    ],
)
def test_metadata_that_says_nothing_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"prompt 0 \('a photo'\) has no metadata as in GenEval"):
        read_spec(Prompts(("a photo",), (row,)), 0)


def test_names_are_cocos() -> None:
    assert len(set(NAMES)) == 80
    known = {0: "person", 15: "cat", 32: "sports ball", 63: "laptop", 64: "computer mouse", 67: "cell phone"}
    assert {i: NAMES[i] for i in known} == known
    assert (NAMES[66], NAMES[79]) == ("computer keyboard", "toothbrush")


def test_instances_are_read_out_by_hand() -> None:
    """Two queries of known classes on masks of 8 x 8 cells; the input has 32 x 32 pixels, 32 x 24 of them real."""
    cat, dog = NAMES.index("cat"), NAMES.index("dog")
    probability = torch.full((3, 81), 1e-9)
    probability[0, cat], probability[0, 80] = 0.8, 0.2
    probability[1, dog], probability[1, 80] = 0.6, 0.4
    probability[2, cat], probability[2, 80] = 0.25, 0.75  # too unsure
    logits = torch.full((3, 8, 8), -math.log(0.9 / 0.1))
    logits[0, 2:6, 1:3] = math.log(0.9 / 0.1)
    logits[1] = math.log(0.75 / 0.25)
    found = instances(probability.log(), logits, (32, 32), (32, 24), (64, 48))
    assert sorted(found) == ["cat", "dog"]
    (a_cat,), (a_dog,) = found["cat"], found["dog"]
    assert a_dog.box == (0, 0, 48, 64)  # the padding is gone, and pictures have twice the pixels of the input
    assert a_dog.score == pytest.approx(0.6 * 0.75, abs=1e-4)
    assert a_dog.mask.shape == (64, 48)
    # columns 1 to 2 and rows 2 to 5 of 8 picture pixels each; logits of opposite sign meet at a cell's edge
    assert a_cat.box == (8, 16, 24, 48)
    assert 0.9 * 16 * 32 < a_cat.mask.sum() <= 16 * 32
    assert 0.8 * 0.5 < a_cat.score < 0.8 * 0.9
    unsure = instances(probability[1:2].log(), torch.full((1, 8, 8), math.log(0.45 / 0.55)), (32, 32), (32, 32), (8, 8))
    assert unsure == {}  # a mask without pixels is no object


def test_the_network_sees_800_pixels_at_most_1333_and_padding_of_zero() -> None:
    white = torch.ones(1, 3, 30, 60)
    inputs, crop = network_input(white, 50)
    assert crop == (42, 83)  # 60 pixels become 83 = 50 * 1333 / 800 at most
    assert inputs.shape == (1, 3, 64, 96)
    assert inputs[0, 0, 41, 82] == pytest.approx((1 - 0.485) / 0.229)
    assert not inputs[:, :, 42:].any()
    assert not inputs[:, :, :, 83:].any()
    assert network_input(torch.rand(1, 3, 512, 512), 800)[0].shape == (1, 3, 800, 800)


def tiny_detector(folder: Path, sees: dict[str, float]) -> str:
    """A Mask2Former of ten queries with random weights, its classes biased; saved as from_pretrained reads it."""
    torch.manual_seed(4)
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=10, num_labels=80,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    for name, bias in sees.items():
        model.class_predictor.bias.data[NAMES.index(name)] += bias
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A detector that sees cats in every query, and a tiny CLIP with its tokenizer."""
    torch.manual_seed(5)
    tokenizer = byte_tokenizer(48)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 48, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    clip = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(clip)
    tokenizer.save_pretrained(clip)
    return tiny_detector(tmp_path_factory.mktemp("detector"), {"cat": 12.0}), str(clip)


@pytest.fixture(scope="module")
def reward(folders: tuple[str, str]) -> GenEval:
    return GenEval(*folders, short_side=64, batch_size=2)


def test_a_real_mask2former_gives_objects(reward: GenEval) -> None:
    pixels = torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(6))
    found = reward.detector(pixels)
    assert len(found) == 3
    cats = [cat for objects in found for cat in objects["cat"]]
    assert len(cats) > 3
    for cat in cats:
        left, top, right, bottom = map(int, cat.box)
        assert 0.3 < cat.score <= 1
        assert cat.mask.shape == (48, 40)
        assert cat.mask[top:bottom, left:right].sum() == cat.mask.sum() > 0
    assert all([cat.score for cat in o["cat"]] == sorted((c.score for c in o["cat"]), reverse=True) for o in found)
    alone = reward.detector(pixels[2:])[0]  # a picture's objects do not depend on those beside it
    assert [cat.box for cat in alone["cat"]] == [cat.box for cat in found[2]["cat"]]


def test_the_score_follows_from_what_is_detected(reward: GenEval) -> None:
    pixels = torch.rand(1, 3, 48, 40, generator=torch.Generator().manual_seed(6))
    count = len(reward.detector(pixels)[0]["cat"])
    asked = [
        {"tag": "x", "include": [{"class": name, "count": n}]}
        for name, n in (("cat", count), ("cat", count + 1), ("dog", 1))
    ]
    scores = reward.score(Media(pixels.repeat(3, 1, 1, 1)), Prompts(("a", "b", "c"), tuple(asked)))
    assert scores.total.tolist() == pytest.approx([1, count / (count + 1), 0])
    assert scores.parts["geneval_strict"].tolist() == [1, 0, 0]
    assert scores.parts["geneval_correct"].tolist() == [1, 0, 0]
    assert scores.valid.all()


def test_colours_reach_the_score(reward: GenEval) -> None:
    pixels = torch.rand(1, 3, 48, 40, generator=torch.Generator().manual_seed(6))
    cats = reward.detector(pixels)[0]["cat"]
    seen = classify_colors(reward.clip, (pixels[0] * 255).round() / 255, cats, "cat")
    asked = [{"tag": "x", "include": [{"class": "cat", "count": len(cats), "color": color}]} for color in COLORS]
    scores = reward.score(Media(pixels.repeat(10, 1, 1, 1)), Prompts(COLORS, tuple(asked)))
    expected = [(1 + seen.count(color) / len(cats)) / 2 for color in COLORS]
    assert scores.total.tolist() == pytest.approx(expected)
    assert max(expected) > 0.5


def test_half_credit_is_the_reward_s_to_give(reward: GenEval, folders: tuple[str, str]) -> None:
    strict, picture = GenEval(*folders, half_credit=False), torch.zeros(3, 8, 8)
    objects, wanted = {"cat": [at(50, 0)], "dog": [at(0, 0)]}, spec(*LEFT)
    assert reward._judge(picture, objects, wanted)[0] == 0.75
    assert strict._judge(picture, objects, wanted)[0] == pytest.approx(2 / 3)


def test_colours_are_looked_at_as_torchvision_crops(reward: GenEval) -> None:
    """16 x 19 leaves a margin of 3, which starts at round(1.5) = 2 there, and at 1 in transformers."""
    ramp = (torch.arange(19.0) / 255).expand(1, 3, 16, 19)
    seen, plain = reward.clip.prepare(ramp), CLIPScore(reward.clip.model.name_or_path).prepare(ramp)
    assert torch.equal(seen[..., :-1], plain[..., 1:])
    assert not torch.equal(seen, plain)


def test_a_picture_that_is_not_finite_has_no_score(reward: GenEval) -> None:
    pixels = torch.rand(2, 3, 48, 40)
    pixels[1, 0, 0, 0] = torch.nan
    row = {"tag": "x", "include": [{"class": "cat", "count": 1}]}
    assert reward.score(Media(pixels), Prompts(("a", "b"), (row, row))).valid.tolist() == [True, False]


def test_an_object_is_cut_out_on_grey() -> None:
    picture = torch.rand(3, 6, 8)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[2:5, 3:7] = True
    mask[2, 3] = False
    cut = cut_out(picture, Detection((3, 2, 7, 5), 1.0, mask))
    assert cut.shape == (3, 3, 4)
    assert torch.equal(cut[:, 1:], picture[:, 3:5, 3:7])
    assert (cut[:, 0, 0] * 255).tolist() == pytest.approx([153] * 3)


def test_the_colour_is_that_of_the_nearest_mean_of_three_texts(folders: tuple[str, str]) -> None:
    clip, model, tokenizer = CLIPScore(folders[1]), CLIPModel.from_pretrained(folders[1]).eval(), byte_tokenizer(48)
    pictures = (torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(7)) * 255).round() / 255
    whole = Detection((0, 0, 16, 16), 1.0, torch.ones(16, 16, dtype=torch.bool))
    seen = [classify_colors(clip, picture, [whole], "cat")[0] for picture in pictures]

    means = []
    for color in COLORS:
        words = [f"a photo of a {color} cat", f"a photo of a {color}-colored cat", f"a photo of a {color} object"]
        features = [model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output for text in words]
        means.append(F.normalize(torch.cat([F.normalize(feature) for feature in features]).mean(0), dim=0))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        images = F.normalize(model.get_image_features((pictures - mean) / std).pooler_output)
        nearest = (images @ torch.stack(means).T).argmax(1)
    assert seen == [COLORS[i] for i in nearest]
    assert len(set(seen)) > 1


def test_a_model_of_other_classes_is_refused(tmp_path: Path) -> None:
    path = Path(tiny_detector(tmp_path, {}))
    config = json.loads((path / "config.json").read_text())
    config["id2label"] |= {"15": "dog", "16": "cat"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"COCO's order: it has 80, \['dog', 'cat'\]"):
        Detector(str(path))


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither as a folder nor from the hub"):
        Detector(str(tmp_path / "none"))

"""Published benchmarks' own formats, from files made up here: prompts, categories, and how scores become a number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flowalign.config import build
from flowalign.evaluation import (
    Benchmark,
    DrawBench,
    DreamBench,
    GenEval,
    HPDv2,
    InceptionFeatures,
    PartiPrompts,
    PickAPic,
    Shapes,
    ShapesVideo,
    Sweep,
    T2ICompBench,
    TextRendering,
    VBench,
    plan,
)
from flowalign.media import shown
from flowalign.shapes.prompts import held_out_prompts
from rewards.geneval import read_spec


def written(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def geneval(folder: Path) -> str:
    rows: list[dict[str, Any]] = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}],
         "prompt": "a photo of two clocks"},
        {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "pink"}], "prompt": "a pink car"},
        {"tag": "position", "include": [{"class": "dog", "count": 1},
                                        {"class": "cat", "count": 1, "position": ["left of", 0]}],
         "prompt": "a photo of a cat left of a dog"},
    ]  # fmt: skip
    return written(folder / "evaluation_metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def test_geneval(tmp_path: Path) -> None:
    benchmark = GenEval(geneval(tmp_path))
    told = benchmark.load()
    assert told.prompts.text[1] == "a photo of two clocks"
    assert told.labels["task"] == ("single_object", "counting", "colors", "position")
    assert [read_spec(told.prompts, i).counting for i in range(4)] == [False, True, False, False]
    (scorer,) = benchmark.scorers()
    assert (scorer.reward, scorer.part, scorer.per) == ({"class": "rewards.GenEval"}, "geneval_correct", "task")
    assert "not the same" in benchmark.note
    assert benchmark.samples == 4


def test_t2i_compbench(tmp_path: Path) -> None:
    written(tmp_path / "color_val.txt", "a green bench and a red car\n\na blue cup\n")
    written(tmp_path / "3d_spatial_val.txt", "a cat in front of a dog\n")
    written(tmp_path / "color_train.txt", "not for evaluation\n")
    benchmark = T2ICompBench(str(tmp_path), reward={"class": "rewards.JPEGCompressibility"})
    told = benchmark.load()
    assert told.prompts.text == ("a cat in front of a dog", "a green bench and a red car", "a blue cup")
    assert told.labels["category"] == ("3d_spatial", "color", "color")
    assert benchmark.scorers()[0].per == "category"
    assert T2ICompBench(str(tmp_path)).scorers() == ()


def test_drawbench_and_partiprompts(tmp_path: Path) -> None:
    sheet = 'Prompts,Category\n"A cube, red",Colors\nTwo dogs,Counting\n,\n'
    told = DrawBench(written(tmp_path / "drawbench.csv", sheet)).load()
    assert told.prompts.text == ("A cube, red", "Two dogs")
    assert told.labels == {"Category": ("Colors", "Counting")}
    rows = (
        'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tone word\na "sign"\tArtifacts\tWriting & Symbols\t\n'
    )
    told = PartiPrompts(written(tmp_path / "PartiPrompts.tsv", rows)).load()
    assert told.prompts.text == ("bond", 'a "sign"')
    assert told.labels["Challenge"] == ("Basic", "Writing & Symbols")


def test_text_rendering_and_pickapic(tmp_path: Path) -> None:
    file = written(tmp_path / "test.txt", 'a board that says "Go"\na wall that says "Rivers and mountains"\n')
    told = TextRendering(file).load()
    assert told.labels["letters"] == ("up to 10", "over 10")
    with pytest.raises(ValueError, match="asks for no text"):
        TextRendering(written(tmp_path / "none.txt", "a board\n")).load()
    told = PickAPic(written(tmp_path / "captions.txt", "a cat\na dog\na cat\na bird\n")).load()
    assert told.prompts.text == ("a cat", "a dog", "a bird")


def test_hpdv2(tmp_path: Path) -> None:
    written(tmp_path / "anime.json", '["a girl", "a robot"]')
    written(tmp_path / "photo.json", '["a bus"]')
    benchmark = HPDv2(str(tmp_path))
    told = benchmark.load()
    assert told.labels["style"] == ("anime", "anime", "photo")
    assert benchmark.scorers()[0].per == "style"


def test_vbench(tmp_path: Path) -> None:
    rows = [
        {"prompt_en": "a person swims", "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"]},
        {"prompt_en": "a bird", "dimension": ["object_class"], "auxiliary_info": {"object_class": {"object": "bird"}}},
        {"prompt_en": "a still lake", "dimension": ["temporal_flickering"]},
        {"prompt_en": "alley", "dimension": ["background_consistency"]},
    ]
    file = written(tmp_path / "VBench_full_info.json", json.dumps(rows))
    benchmark = VBench(file)
    told = benchmark.load()
    assert told.prompts.text == ("a person swims", "a still lake", "alley")
    assert told.labels["dynamic_degree"] == ("dynamic_degree", "", "")
    assert benchmark.scorers()[0].only == ("subject_consistency", "subject_consistency")
    with pytest.raises(ValueError, match="VBench's object_class is not scored here"):
        VBench(file, ("object_class",)).scorers()
    own = VBench(file, ("object_class",), {"object_class": {"class": "rewards.TemporalFlickering"}})
    assert own.load().prompts.metadata[0]["auxiliary_info"] == {"object_class": {"object": "bird"}}
    assert own.scorers()[0].reward == {"class": "rewards.TemporalFlickering"}
    with pytest.raises(ValueError, match="no prompts of the dimension 'color'"):
        VBench(file, ("color",)).load()


DREAM = """Classes:
subject_name,class
rc_car,toy
dog6,dog
Prompts:

Object Prompts
prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
"a {0} {1} on top of a mirror".format(unique_token, class_token),
]

Live Subject Prompts
prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


def test_dreambench(tmp_path: Path) -> None:
    written(tmp_path / "prompts_and_classes.txt", DREAM)
    for subject in ("rc_car", "dog6"):
        (tmp_path / subject).mkdir()
        Image.new("RGB", (8, 8), "red").save(tmp_path / subject / "00.jpg")
    told = DreamBench(str(tmp_path)).load()
    assert told.prompts.text == ("a toy in the jungle", "a toy on top of a mirror", "a dog wearing a red hat")
    assert told.labels["subject"] == ("rc_car", "rc_car", "dog6")
    assert told.labels["kind"] == ("object", "object", "live")
    references = shown(torch.zeros(3, 3, 8, 8), told.prompts).references
    assert references is not None
    assert [len(one) for one in references] == [1, 1, 1]
    assert DreamBench(str(tmp_path), token="sks").load().prompts.text[0] == "a sks toy in the jungle"
    assert [scorer.name for scorer in DreamBench(str(tmp_path)).scorers()] == ["DINO", "CLIP-I", "CLIP-T"]
    (tmp_path / "dog6/00.jpg").unlink()
    with pytest.raises(ValueError, match="holds no pictures of the subject 'dog6'"):
        DreamBench(str(tmp_path)).load()


def test_the_embedded_worlds() -> None:
    told = Shapes(count=20).load()
    assert told.prompts.text == held_out_prompts(20).text
    assert {*told.labels["composition"]} == {"seen in training", "unseen in training"}
    assert ShapesVideo(count=3).load().prompts.metadata[2]["seed"] == 2
    assert ShapesVideo().kind == "video"


def test_a_limit_is_spread_evenly_and_leaves_each_its_noise() -> None:
    told = Shapes(count=10, limit=4).load()
    assert [row["seed"] for row in told.prompts.metadata] == [0, 2, 5, 7]
    assert told.prompts.text[2] == held_out_prompts(10).text[5]
    assert len(told.labels["kind"]) == 4


@pytest.mark.parametrize(
    ("benchmark", "content", "message"),
    [
        (GenEval, '{"tag": "single_object"}\n', 'x.jsonl:1: a line must be an object with a text under "prompt"'),
        (GenEval, '{"prompt": "a"\n', "x.jsonl:1: not JSON"),
        (GenEval, '{"prompt": "a", "tag": "odd", "include": []}\n', "'a' has no tag and include"),
        (GenEval, "", "holds no prompts"),
        (DrawBench, "text\na\n", "x.jsonl:1: it needs columns Prompts and Category; its header is text"),
        (PartiPrompts, "Prompt,Category\na,b\n", "it needs columns Prompt and Category and Challenge"),
        (VBench, '{"a": 1}', "is no list of prompt_en and dimension"),
        (VBench, "[", "x.jsonl:1: not JSON"),
    ],
)
def test_a_file_of_another_format_is_told(
    benchmark: type[Benchmark], content: str, message: str, tmp_path: Path
) -> None:
    file = written(tmp_path / "x.jsonl", content)
    with pytest.raises(ValueError) as told:
        benchmark(file).load()  # type: ignore[call-arg]
    assert message in str(told.value)


@pytest.mark.parametrize("benchmark", [HPDv2, T2ICompBench, DreamBench])
def test_an_empty_folder_is_told(benchmark: type[Benchmark], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no"):
        benchmark(str(tmp_path)).load()  # type: ignore[call-arg]


def test_a_sweep_file_names_them(tmp_path: Path) -> None:
    config = {
        "models": {"sd": "shapes"},
        "benchmarks": {
            "geneval": {"class": "flowalign.evaluation.GenEval", "file": geneval(tmp_path), "limit": 2},
            "remote": {
                "class": "flowalign.evaluation.GenEval",
                "file": geneval(tmp_path),
                "reward": {"class": "rewards.RemoteReward", "url": "http://127.0.0.1:8700"},
                "part": None,
            },
        },
    }
    planned = plan(build(Sweep, config))
    assert len(planned.sets["geneval"].prompts) == 2
    scorer = planned.sweep.benchmarks["remote"].scorers()[0]
    assert scorer.reward == {"class": "rewards.RemoteReward", "url": "http://127.0.0.1:8700"}
    assert scorer.part is None


def test_fid_without_its_network_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"FID needs the extra|is not a file: name the weights"):
        InceptionFeatures(str(tmp_path / "none.pth"))

"""Preferences between videos, end to end on the embedded world: made, looked at, learnt from, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flowalign.cli import main
from flowalign.fitting import fitted
from flowalign.preferences import Preferences, open_pair
from flowalign.records import Media, Prompts, Size
from rewards import ShapesVideoVerifier
from tests.jobs import digest, rows

SPECS = {"train": "train_prompts", "held_out": "held_out_prompts"}
SMALL = [
    "--optimizer.decay=4", "--sampling.batch_size=4", "--sampling.rows_per_call=4",
    "--sampling.steps=2", "--evaluation.every=1", "--evaluation.prompts.count=2", "--evaluation.pictures=1",
    "--seed=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Pairs of either set of prompts, as the config's header makes them, from fewer prompts."""
    folder: Path = tmp_path_factory.mktemp("preferences")
    for name, prompts in SPECS.items():
        drawn = f"{{class: flowalign.shapes.video.{prompts}, count: 5, kinds: [move, speed, change]}}"
        words = ["--reward", "{class: rewards.ShapesVideoVerifier, strict_weight: 0.3}", "--margin", "0.05"]
        words += ["--samples", "3", "--steps", "4", "--guidance-scale", "1", "--out", str(folder / name)]
        words += ["--prompts", drawn, "--model.grid", "flowalign.schedules.linear"]
        assert main(["prefer", "shapes-video", *words]) == 0
    return folder


def words(made: Path, folder: Path, *more: str) -> list[str]:
    pairs = [f"--pairs.preferences={made}/train/pairs.jsonl", f"--pairs.held_out={made}/held_out/pairs.jsonl"]
    return [
        "flow_dpo/shapes_video",
        *pairs,
        f"--pairs.cache={made}/latents",
        f"--folder={folder}",
        *SMALL,
        "--sampling.groups=4",
        *more,
    ]


def test_the_preferred_video_is_better_in_its_file_too(made) -> None:
    """Files are compressed, and four times as large; what is fitted to the model's size gets nearly the same score."""
    told, judge = Preferences(str(made / "train" / "pairs.jsonl")), ShapesVideoVerifier(0.3)
    pairs = told.rows(range(len(told)))
    assert len(pairs) >= 3
    for pair in pairs:
        held = open_pair(pair)
        media = torch.stack([fitted(one, Size(32, 32, 9)) for one in (held.first, held.second)])
        scores = judge(Media(media), Prompts((pair.prompt,) * 2, (pair.metadata,) * 2)).parts["clauses"]
        assert scores[0] > scores[1]
        assert pair.margin is not None
        assert pair.margin >= 0.05
    parts = [json.loads(line)["parts"] for line in (made / "train" / "pairs.jsonl").read_text().splitlines()]
    assert all({"clauses", "strict", "clause/motion"} <= {*one} for one in parts)
    assert (made / "train" / "sheet.png").stat().st_size > 1000


@pytest.mark.slow
def test_check_then_train_then_go_on(made, tmp_path, capsys) -> None:
    assert main(["check", *words(made, tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "a video               9 frames of 32 x 32 pixels, 8 a second" in shown
    assert "loss                  0.6931" in shown  # the policy is its reference still
    assert "embeddings kept" in shown
    assert main(["train", *words(made, tmp_path / "run", "--epochs=1")]) == 0
    assert main(["train", *words(made, tmp_path / "run", "--epochs=2")]) == 0
    assert main(["train", *words(made, tmp_path / "whole", "--epochs=2")]) == 0
    run, whole = digest(tmp_path / "run"), digest(tmp_path / "whole")
    assert run.pop("record") != whole.pop("record")  # which has the folder's name
    assert run == whole
    log = rows(tmp_path / "whole")
    assert [row["step"] for row in log if "held-out/pair_accuracy" in row] == [0, 1, 2]
    assert log[0]["held-out/pair_accuracy"] == 0.5  # nothing is learnt yet, and nothing preferred
    assert log[-1]["held-out/pair_lead"] != 0


def test_online_pairs_of_videos(tmp_path) -> None:
    more = ["--sampling.groups=2", "--sampling.group_size=3", "--epochs=2", "--refresh=1", "--prompts.count=8"]
    assert main(["train", "flow_dpo/shapes_video_online", f"--folder={tmp_path / 'run'}", *SMALL, *more]) == 0
    log = rows(tmp_path / "run")
    assert log[-1]["step"] == 2
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()

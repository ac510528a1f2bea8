"""`flowalign prefer`: the best against the worst of keyed samples, what is dropped, and going on after a stop."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.cli import main
from flowalign.interrupt import Stopped
from flowalign.models import SD3, Model, Wan
from flowalign.preferences import Preferences, all_pairs, best_and_worst, open_pair
from flowalign.preferences.folder import make_pairs
from flowalign.preferences.latents import PairLatents
from flowalign.preferences.making import Maker, Settings
from flowalign.randomness import key_noise
from flowalign.records import Media, Prompts
from flowalign.rollout import Policy, rollout
from flowalign.schedules import Path as Steps
from flowalign.transitions import ODE
from rewards.base import FunctionReward, Reward
from rewards.preference import load_pairs
from tests.tiny import tiny_sd3
from tests.tiny_wan import tiny_wan

PROMPTS = Prompts(
    ("a red circle", "two blue squares", "a star"), ({"kind": "single"}, {"seed": 41, "negative_prompt": "grey"}, {})
)


def redness(media: Media, prompts: Prompts) -> Tensor:
    """A spread that no sample has by chance, so that no two are equal."""
    return media.pixels.flatten(1).double().std(1).float()


@pytest.fixture(scope="module")
def model() -> SD3:
    return SD3(tiny_sd3(), max_sequence_length=12)


def settings(**more: Any) -> Settings:
    known: dict[str, Any] = {"samples": 3, "seed": 5, "batch_size": 4}
    return Settings(2, 1.0, **{"pairing": best_and_worst} | known | more)


def made(model: Model, folder: Path, reward: Reward | None = None, **more: Any) -> list[dict[str, Any]]:
    maker = Maker(model, reward or FunctionReward(redness), PROMPTS, settings(**more))
    path = make_pairs(maker, folder, {"model": "tiny"})
    return [json.loads(line) for line in path.read_text().splitlines()]


def drawn(model: SD3, number: int, member: int) -> Tensor:
    """A sample on its own, from its key."""
    noise = key_noise(5, "prefer", 41 if number == 1 else number, member, shape=model.latent_shape)
    condition = model.condition(PROMPTS.rows([number]))
    latents = rollout(model, condition, noise[None], model.sigmas(2), Steps((ODE(),) * 2), Policy(1.0)).latents
    return model.decode(latents)[0].mul(255).round().div(255).detach()


def test_the_best_is_preferred_to_the_worst(model, tmp_path, capsys):
    rows = made(model, tmp_path / "p")
    assert len(rows) == 3
    for number, row in enumerate(rows):
        samples = torch.stack([drawn(model, number, member) for member in range(3)])
        scores = redness(Media(samples), PROMPTS)
        best, worst = int(scores.argmax()), int(scores.argmin())
        key = 41 if number == 1 else number
        assert row["seeds"] == [[5, key, best], [5, key, worst]]
        assert row["scores"] == pytest.approx([float(scores[best]), float(scores[worst])], abs=1e-5)
        assert row["margin"] == pytest.approx(row["scores"][0] - row["scores"][1])
        assert row["parts"] == {"redness": row["scores"]}
    assert rows[0]["metadata"] == {"kind": "single"}
    assert (rows[1]["seed"], rows[1]["negative_prompt"]) == (41, "grey")
    found = Preferences(str(tmp_path / "p" / "pairs.jsonl")).rows(range(3))
    assert [(row.prompt, row.label) for row in found] == [(text, "first") for text in PROMPTS.text]
    pair = open_pair(found[0])
    assert (pair.first - drawn(model, 0, rows[0]["seeds"][0][2])).abs().max() < 1.5 / 255
    judged = redness(Media(torch.stack([pair.first, pair.second])), PROMPTS)
    assert judged.tolist() == pytest.approx(rows[0]["scores"], abs=1e-6)  # what is kept is what was judged
    assert len([*(tmp_path / "p" / "media").iterdir()]) == 6  # of other samples nothing is kept
    told = json.loads((tmp_path / "p" / "summary.json").read_text())
    assert told == {"prompts": 3, "samples": 3, "pairs": 3, "ties": 0, "invalid": 0, "without_a_pair": 0}
    assert "3 prompts of 3 samples: 3 pairs, 0 ties dropped" in capsys.readouterr().err
    assert Image.open(tmp_path / "p" / "sheet.png").width > 128
    assert [pair.label for pair in load_pairs(tmp_path / "p" / "pairs.jsonl")] == ["first"] * 3  # rewards learn from it


def test_all_pairs_and_a_margin(model, tmp_path):
    every = made(model, tmp_path / "all", pairing=all_pairs)
    assert len(every) == 9
    assert all(row["scores"][0] > row["scores"][1] for row in every)
    leads = sorted(row["margin"] for row in every)
    some = made(model, tmp_path / "some", pairing=all_pairs, margin=leads[4])
    assert sorted(row["margin"] for row in some) == leads[4:]
    told = json.loads((tmp_path / "some" / "summary.json").read_text())
    assert (told["pairs"], told["ties"]) == (5, 4)


def test_ties_and_invalid_scores_are_counted_and_never_used(model, tmp_path, capsys):
    def strange(media: Media, prompts: Prompts) -> Tensor:
        """Of the first prompt one score is valid, of the second all are equal, of the third one is nan."""
        assert prompts.groups is not None
        nan = float("nan")
        places = {0: [nan, 1.0, nan], 1: [2.0, 2.0, 2.0], 2: [nan, 0.5, 1.5]}
        return torch.tensor([places[group][i % 3] for i, group in enumerate(prompts.groups)])

    rows = made(model, tmp_path / "p", FunctionReward(strange))
    assert [row["prompt"] for row in rows] == ["a star"]
    assert rows[0]["scores"] == [1.5, 0.5]
    assert [seed[2] for seed in rows[0]["seeds"]] == [2, 1]
    told = json.loads((tmp_path / "p" / "summary.json").read_text())
    assert told == {"prompts": 3, "samples": 3, "pairs": 1, "ties": 1, "invalid": 3, "without_a_pair": 2}
    lines = [json.loads(line) for line in (tmp_path / "p" / "prompts.jsonl").read_text().splitlines()]
    assert lines[0]["scores"] == [None, 1.0, None]
    assert (
        "1 pairs, 1 ties dropped, 3 samples without a valid score, 2 prompts without a pair" in capsys.readouterr().err
    )
    made(model, tmp_path / "none", FunctionReward(lambda media, prompts: torch.ones(len(media))))
    assert not (tmp_path / "none" / "sheet.png").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in [folder / "pairs.jsonl", *folder.glob("media/*")]
    }


def test_a_stopped_making_ends_as_an_unbroken_one(model, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    made(model, whole)
    seen: list[str] = []

    def stopping(media: Media, prompts: Prompts) -> Tensor:
        seen.extend(prompts.text[::3])
        if len(seen) == 2:
            signal.raise_signal(signal.SIGTERM)
        return redness(media, prompts)

    stopping.__name__ = "redness"
    reward = FunctionReward(stopping)
    with pytest.raises(Stopped, match="run the same command again to go on"):
        made(model, folder, reward)
    assert len((folder / "prompts.jsonl").read_text().splitlines()) == 2
    assert (folder / "sheet.png").exists()
    with (folder / "pairs.jsonl").open("a") as pairs, (folder / "prompts.jsonl").open("a") as prompts:
        pairs.write('{"prompt": "half of a')  # as a kill leaves it
        prompts.write('{"number": 2')
    made(model, folder, reward)
    assert seen == [*PROMPTS.text]  # none twice
    assert contents(folder) == contents(whole)
    made(model, folder, reward, batch_size=9)  # all is done, and batch_size may change
    assert seen == [*PROMPTS.text]
    with pytest.raises(
        ValueError, match=r"made with another prefer\.seed, prefer\.samples|prefer\.samples, prefer\.seed"
    ):
        made(model, folder, reward, seed=6, samples=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        made(model, tmp_path / "other", reward)


def test_files_that_prompts_name_go_with_the_pairs(model, tmp_path, monkeypatch):
    """The pairs can be read, wherever their folder is: what they name is in it, once for each content."""
    for name, shade in (("a.png", 0), ("b.png", 255), ("c.png", 0)):
        Image.new("RGB", (32, 32), (shade,) * 3).save(tmp_path / name)
    a, b, c = (str(tmp_path / name) for name in ("a.png", "b.png", "c.png"))
    shown = "data:image/png;base64,AAAA"
    rows = {"references": [a, b], "media": c}, {"references": [b, b], "image": shown}, {"references": [a, b]}
    monkeypatch.setitem(globals(), "PROMPTS", Prompts(PROMPTS.text, rows))
    told = [row["metadata"] for row in made(model, tmp_path / "p")]
    one, other = told[0]["references"]
    assert told == [
        {"references": [one, other], "media": one},
        {"references": [other, other], "image": shown},
        {"references": [one, other]},
    ]
    assert (tmp_path / "p" / other).read_bytes() == (tmp_path / "b.png").read_bytes()
    assert len([*(tmp_path / "p" / "named").iterdir()]) == 2
    (tmp_path / "p").rename(tmp_path / "q")
    found = Preferences(str(tmp_path / "q" / "pairs.jsonl")).rows([0])[0].metadata
    assert found["media"] == str((tmp_path / "q" / one).resolve())


def test_what_shares_a_call_decides_nothing(model, tmp_path):
    few, many = made(model, tmp_path / "few", batch_size=1), made(model, tmp_path / "many", batch_size=64)
    for one, other in zip(few, many, strict=True):
        assert one["seeds"] == other["seeds"]
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)


def test_videos_become_pairs_and_latents(tmp_path):
    model = Wan(tiny_wan(), height=32, width=32, frames=5, max_sequence_length=12)
    (row, *_) = made(model, tmp_path / "p", samples=2, batch_size=2)
    assert row["first"].endswith(".mp4")
    pair = open_pair(Preferences(str(tmp_path / "p" / "pairs.jsonl")).rows([0])[0])
    assert pair.first.shape[0] == 5
    assert pair.fps == model.fps
    batch = PairLatents(model, str(tmp_path / "p" / "pairs.jsonl"), str(tmp_path / "cache"), batch_size=2).rows([0, 2])
    assert batch.first.shape == (2, *model.latent_shape)
    assert batch.sign.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 1}, "samples must be at least 2, got 1"),
        ({"margin": -0.1}, "margin must be at least 0"),
        ({"margin": float("nan")}, "margin must be at least 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_the_command(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a white circle and a green cross\ntwo cyan triangles\n")
    words = ["prefer", "shapes", "--prompts", str(prompts), "--steps", "2", "--guidance-scale", "1", "--samples", "3"]
    words += ["--reward", "rewards.JPEGIncompressibility", "--out", str(tmp_path / "p")]
    assert main([*words, "--batch-size", "3"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "p" / "pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "p" / "pairs.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a white circle and a green cross", "two cyan triangles"]
    assert all(row["scores"][0] > row["scores"][1] for row in rows)
    sizes = [np.asarray(Image.open(tmp_path / "p" / row["first"])).shape for row in rows]
    assert sizes == [(32, 32, 3)] * 2
    for more, message in (
        (["--seed", "1"], "another prefer.seed"),
        (["--model.lora.rank", "3"], "another model.lora"),
        (["--reward", "jpeg"], "another reward"),
        (["--reward", "jpeg +"], "reward"),
        (["--samples", "1"], "samples must be at least 2"),
        (["--sample", "3"], "--sample is no option of prefer"),
        (["--prompts", str(tmp_path / "none.txt")], "none.txt is not a file"),
        (["--lora", "x", "--base"], "exclude each other"),
    ):
        assert main([*words, *more]) == 2, more
        assert message in capsys.readouterr().err

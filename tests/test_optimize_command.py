"""`flowalign optimize`: configs by name, pipelines and runs as for `sample`, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowalign.cli import main, parse_named
from flowalign.config import arguments_of, dump_yaml, load_yaml
from flowalign.models.sd3 import SD3
from tests.tiny import randomise_policy

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = sorted(path for folder in ("reno", "best_of_n") for path in (CONFIGS / folder).glob("*.yaml"))
CLIP = "{class: rewards.CLIPScore, model: shapes}"
TOLD = ["--prompt", "a white circle and a green cross", "--prompt", "two cyan triangles", "--seed", "3"]


def resolved(path: Path) -> dict[str, Any]:
    config = load_yaml(path)
    call = parse_named(config, "search", "", "run")
    plain = arguments_of(call)
    assert arguments_of(parse_named({"search": call.path, **plain}, "search", "", "run")) == plain
    assert set(config) - {"search"} <= set(plain)
    return plain


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_resolves(path):
    assert resolved(path)["steps"] == 1


@pytest.mark.parametrize("name", ["sd_turbo", "sdxl_turbo", "flux_schnell"])
def test_the_authors_settings_do_not_drift(name):
    config = resolved(CONFIGS / "reno" / f"{name}.yaml")
    assert (config["iterations"], config["max_grad_norm"], config["regularisation"]) == (50, 0.1, 0.01)
    assert (config["optimizer"]["learning_rate"], config["optimizer"]["momentum"]) == (5.0, 0.9)
    assert config["guidance_scale"] == 0.0
    assert config["reward"]["expression"] == "5*hpsv2.1 + imagereward + clip_h + 0.05*pickscore"


def scores(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return sorted(rows, key=lambda row: row["number"])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_reno_on_a_pipeline_starts_from_what_sample_makes(tmp_path, capsys):
    settings = ["--steps", "2", "--guidance-scale", "1", "--model.grid", "flowalign.schedules.linear"]
    assert main(["sample", "shapes", *TOLD, *settings, "--out", str(tmp_path / "plain")]) == 0
    words = ["optimize", "shapes", *TOLD, *settings, "--reward", CLIP, "--iterations", "8", "--batch-size", "2"]
    words += ["--optimizer.learning_rate", "10"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "run" / "before_after.png")
    for i, row in enumerate(scores(tmp_path / "run")):
        assert row["score"] > row["before"]
        plain = pixels(tmp_path / "plain" / f"{i:04d}.png")
        assert np.abs(pixels(tmp_path / "run" / f"{i:04d}-before.png") - plain).max() <= 1
        assert np.abs(pixels(tmp_path / "run" / f"{i:04d}.png") - plain).max() > 10
    written = load_yaml(tmp_path / "run" / "config.yaml")
    assert (written["search"], written["iterations"], written["steps"]) == ("trainers.ReNO", 8, 2)
    assert written["optimizer"] == {"class": "trainers.noise_optim.Nesterov", "learning_rate": 10.0, "momentum": 0.9}
    assert main([*words, "--out", str(tmp_path / "run")]) == 0  # which is done
    assert main([*words, "--max_grad_norm", "0.2", "--out", str(tmp_path / "run")]) == 2
    assert "holds a search with another max_grad_norm; name another folder" in capsys.readouterr().err
    again = ["optimize", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "again")]
    assert main(again) == 0  # what a search writes down is a config again
    assert [row["score"] for row in scores(tmp_path / "again")] == [row["score"] for row in scores(tmp_path / "run")]


def test_a_shipped_config_by_name(tmp_path):
    changes = ["--model.pipeline", "shapes", "--iterations", "2", *TOLD, "--out", str(tmp_path / "run")]
    assert main(["optimize", "reno/shapes", *changes]) == 0
    assert [row["prompt"] for row in scores(tmp_path / "run")] == [TOLD[1], TOLD[3]]
    assert load_yaml(tmp_path / "run" / "config.yaml")["seed"] == 3


def test_best_of_n_on_a_run_s_policy(tmp_path):
    """A run's steps, guidance and LoRA, as `sample` takes them; any reward."""
    run = tmp_path / "run"
    model = SD3("shapes")
    randomise_policy(model)
    model.save(run / "lora")
    told = {"class": "flowalign.models.SD3", "pipeline": "shapes", "mixed_precision": "bf16"}
    config = {"trainer": "trainers.FlowGRPO", "model": told, "sampling": {"steps": 2, "guidance_scale": 2.0}}
    (run / "config.yaml").write_text(dump_yaml(config))
    assert main(["sample", str(run), *TOLD, "--out", str(tmp_path / "plain")]) == 0
    words = ["optimize", str(run), "--method", "best_of_n", "--samples", "3", "--reward", "jpeg", *TOLD]
    assert main([*words, "--out", str(tmp_path / "found")]) == 0
    for i, row in enumerate(scores(tmp_path / "found")):
        assert (row["tried"], row["compute"]["network"]) == (3, {"forward": 12, "gradient": 0})
        before = pixels(tmp_path / "found" / f"{i:04d}-before.png")
        assert np.abs(before - pixels(tmp_path / "plain" / f"{i:04d}.png")).max() <= 1


REWARD, PROMPT = ["--reward", CLIP], ["--prompt", "x"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shapes", *PROMPT], "optimize needs --reward REWARD"),
        (["shapes", *REWARD], "optimize needs --prompt TEXT or --prompts FILE"),
        (["shapes", *REWARD, *PROMPT, "--prompts", "f.txt"], "exclude each other"),
        (["shapes", *REWARD, "--prompts", "f.txt"], "f.txt"),
        (
            ["shapes", *PROMPT, "--reward", "jpeg", "--steps", "1"],
            "follows the reward's gradient, and jpeg_compressibility has none",
        ),
        (["shapes", *PROMPT, "--reward", "clop"], "clop"),
        (["shapes", *REWARD, *PROMPT, "--iteration", "5"], "did you mean 'iterations'?"),
        (["shapes", *REWARD, *PROMPT, "--model.heigt", "5"], "did you mean 'height'?"),
        (["shapes", *REWARD, *PROMPT, "--iterations", "0"], "iterations and patience must be at least 1"),
        (["shapes", *REWARD, *PROMPT, "--method", "magic"], "invalid choice: 'magic'"),
        (["shapes", *REWARD, *PROMPT, "--lora", "nowhere"], "nowhere does not exist"),
        (["reno/shapes", "--lora", "nowhere"], "nowhere does not exist"),
        (["reno/shapes", "--method", "reno"], "names its method by its key 'search'"),
        (["reno/shape"], "did you mean 'reno/shapes'"),
        (["flow_grpo/shapes"], "the key 'search' has to name a class, as in 'search: trainers.ReNO'"),
        (["reno/shapes", "--search", "trainers.search.Search"], "is abstract"),
        (["reno/shapes", "--search", "trainers.FlowGRPO"], "is no search"),
        (["./nowhere", *REWARD, *PROMPT], "nowhere is not a folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(words, message, tmp_path, capsys):
    out = tmp_path / "out"
    try:
        status = main(["optimize", *words, "--out", str(out)])
    except SystemExit as left:  # argparse's own
        status = left.code
    assert status == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if "building" not in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert not out.exists()

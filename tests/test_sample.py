"""`flowalign sample` against plain diffusers, from a run folder and from a bare pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import randomise_policy

from flowalign.cli import main
from flowalign.config import ConfigError, dump_yaml
from flowalign.models.sd3 import SD3
from flowalign.sample import read_prompts, start_noise
from flowalign.schedules import linear
from flowalign.shapes import held_out_prompts, text_to_image

PROMPTS = ["a red circle left of a blue square", "two green triangles", "a large white star"]
STEPS = 4


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as training leaves it: its config, and a policy that is not zero."""
    folder = tmp_path_factory.mktemp("run")
    model = SD3("shapes")
    randomise_policy(model)
    model.save(folder / "lora")
    config = {
        "trainer": "trainers.FlowGRPO",
        "model": {
            "class": "flowalign.models.SD3",
            "pipeline": "shapes",
            "grid": "flowalign.schedules.linear",
            "mixed_precision": "bf16",
        },
        "sampling": {"steps": STEPS, "guidance_scale": 2.0},
    }
    (folder / "config.yaml").write_text(dump_yaml(config))
    return folder


def sample(*words: str, out: Path) -> np.ndarray:
    told = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert main(["sample", *words, *told, "--seed", "3", "--batch-size", "2", "--out", str(out)]) == 0
    assert (out / "grid.png").is_file()
    return np.stack([np.asarray(Image.open(out / f"{i:04d}.png")) for i in range(len(PROMPTS))]).astype(int)


def diffusers_pictures(lora: Path | None, guidance_scale: float, sigmas: list[float] | None) -> np.ndarray:
    pipe = text_to_image()
    if lora is not None:
        pipe.load_lora_weights(str(lora))
        (config,) = pipe.transformer.peft_config.values()
        assert (config.r, config.lora_alpha) == (32, 64)
    model = SD3("shapes")
    made = pipe(
        prompt=PROMPTS,
        num_inference_steps=STEPS,
        sigmas=sigmas,
        guidance_scale=guidance_scale,
        latents=start_noise(model, 3, "sample", range(3)),
        output_type="pt",
    ).images
    return (made.permute(0, 2, 3, 1) * 255).round().int().numpy()


def test_a_run_s_pictures_are_those_of_plain_diffusers(run_folder, tmp_path):
    ours = sample(str(run_folder), out=tmp_path / "ours")
    theirs = diffusers_pictures(run_folder / "lora", 2.0, linear(STEPS)[:-1])
    assert np.abs(ours - theirs).max() <= 1
    before = sample(str(run_folder), "--base", out=tmp_path / "before")
    assert np.abs(before - diffusers_pictures(None, 2.0, linear(STEPS)[:-1])).max() <= 1
    assert np.abs(ours - before).max() > 50


def test_a_bare_pipeline_samples_as_diffusers_does_by_itself(run_folder, tmp_path):
    words = ["shapes", "--steps", str(STEPS), "--guidance-scale", "1"]
    assert np.abs(sample(*words, out=tmp_path / "a") - diffusers_pictures(None, 1.0, None)).max() <= 1
    lora = run_folder / "lora"
    with_lora = sample(*words, "--lora", str(lora), out=tmp_path / "b")
    assert np.abs(with_lora - diffusers_pictures(lora, 1.0, None)).max() <= 1


def test_a_picture_depends_on_its_number_and_not_on_its_batch(tmp_path):
    words = ["sample", "shapes", "--steps", "2", "--guidance-scale", "1"]
    told = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert main([*words, *told, "--batch-size", "3", "--out", str(tmp_path / "a")]) == 0
    assert main([*words, *told, "--batch-size", "1", "--out", str(tmp_path / "b")]) == 0
    for i in range(3):
        one, other = (np.asarray(Image.open(tmp_path / k / f"{i:04d}.png")).astype(int) for k in "ab")
        assert np.abs(one - other).max() <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs --prompt TEXT or --prompts FILE"),
        (["--prompt", "x", "--foo", "1"], "--foo is no option of sample"),
        (["--prompt", "x", "--model.heigt", "1"], "did you mean 'height'?"),
        (["--prompt", "x", "--lora", "nowhere"], "nowhere does not exist"),
        (["--prompt", "x", "--base", "--lora", "nowhere"], "exclude each other"),
        (["--prompt", "x", "--steps", "0"], "must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(words, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["sample", "shapes", *words, "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not out.exists()


def test_pictures_are_not_written_over_others(tmp_path, capsys):
    (tmp_path / "mine.png").touch()
    assert main(["sample", "shapes", "--prompt", "x", "--out", str(tmp_path)]) == 2
    assert "is in use" in capsys.readouterr().err


def test_start_noise_is_keyed(tmp_path):
    model = SD3("shapes")
    one = start_noise(model, 0, "sample", [0, 1])
    assert torch.equal(one[1], start_noise(model, 0, "sample", [1])[0])
    assert not torch.equal(one[0], start_noise(model, 1, "sample", [0])[0])


def test_prompts_may_be_named_as_in_a_config():
    told = read_prompts("{class: flowalign.shapes.held_out_prompts, count: 3, kinds: [count]}", False)
    assert told == held_out_prompts(3, kinds=("count",))
    with pytest.raises(ConfigError, match="conut"):
        read_prompts("{class: flowalign.shapes.held_out_prompts, conut: 3}", False)

"""A run from the command line on the embedded world: what it leaves behind, what it keeps, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flowalign.cli import main
from flowalign.config import load_yaml
from flowalign.models.sd3 import SD3
from flowalign.pictures import unzipped
from flowalign.records import Media, Prompts
from flowalign.schedules import FanOut
from flowalign.shapes import text_to_image
from flowalign.transitions import FlowSDE
from tests.jobs import rows
from trainers import Evaluation, FlowGRPO, Optimizer, Sampling

SHORT = [
    "--epochs=3", "--sampling.groups=4", "--sampling.group_size=3", "--sampling.batch_size=4", "--sampling.steps=3",
    "--evaluation.every=1", "--evaluation.prompts.count=12", "--evaluation.pictures=4", "--prompts.count=40",
]  # fmt: skip


def train(folder: Path, *words: str) -> int:
    return main(["train", "flow_grpo/shapes", "--folder", str(folder), *SHORT, *words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(folder) == 0
    return folder


def test_a_run_folder_is_complete(run):
    assert {path.name for path in run.iterdir() if path.name != ".lock"} == {
        "config.yaml", "environment.json", "events.jsonl", "metrics.jsonl", "histograms.jsonl", "samples",
        "evaluations", "lora", "best.json", "checkpoints", "report.html",
    }  # fmt: skip
    names = {path.name for path in (run / "samples").iterdir()}
    assert names == {f"epoch-{k:06d}.png" for k in range(4)} | {"before_after.png"}
    assert Image.open(run / "samples" / "before_after.png").size[0] > 128
    trained = [row for row in rows(run) if "reward" in row]
    assert [row["step"] for row in trained] == [1, 2, 3]
    assert all(row["ratio_max"] == 0 for row in trained)  # one update an epoch is on-policy
    assert all(row["grad_norm"] > 0 and row["invalid"] == 0 for row in trained)
    judged = [row for row in rows(run) if "held-out" in row]
    assert [row["step"] for row in judged] == [0, 1, 2, 3]
    assert all(row["held-out"] == row["held-out/strict"] for row in judged)


def test_the_best_policy_is_kept_and_few_others(run):
    judged = [row["held-out"] for row in rows(run) if "held-out" in row]
    told = json.loads((run / "best.json").read_text())
    assert judged[told["epoch"]] == told["held-out"] == max(judged)
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {f"step-{k:08d}-evaluated" for k in {2, 3, told["epoch"]}}
    file = "lora/pytorch_lora_weights.safetensors"
    chosen = load_file(run / file)
    for name, value in load_file(run / "checkpoints" / f"step-{told['epoch']:08d}-evaluated" / file).items():
        assert torch.equal(chosen[name], value)


def test_every_prompt_s_scores_and_pictures_are_kept(run):
    folder = run / "evaluations"
    prompts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == 12
    assert {"prompt", "spec", "kind"} <= prompts[0].keys()
    for epoch in range(4):
        scores = [json.loads(line) for line in (folder / f"epoch-{epoch:06d}.jsonl").read_text().splitlines()]
        mean = next(row["held-out"] for row in rows(run) if row["step"] == epoch and "held-out" in row)
        assert sum(row["strict"] for row in scores) / 12 == pytest.approx(mean)
        for row, prompt in zip(scores, prompts, strict=True):
            assert (row["clause/relation"] is None) == (prompt["spec"]["relation"] is None)
    best = json.loads((run / "best.json").read_text())["epoch"]
    assert {path.name for path in folder.glob("*.zip")} == {f"epoch-{k:06d}.zip" for k in {0, best, 3}}
    assert [one.shape for one in unzipped(folder / "epoch-000003.zip", 12)] == [(3, 32, 32)] * 12


def test_the_epochs_cost_no_more_than_the_floor(run):
    for row in rows(run):
        if "reward" in row:
            assert row["rows/forward"] == row["floor/forward"] > 0
            assert row["rows/gradient"] == row["floor/gradient"] == 4  # one trained step of 4 groups


def test_the_resolved_config_repeats_the_run(run, tmp_path):
    config = load_yaml(run / "config.yaml")
    assert config["model"]["lora"]["rank"] == 32
    assert config["clip_range"] == 1e-4  # a default that the config does not name
    assert main(["train", str(run / "config.yaml"), "--folder", str(tmp_path / "again")]) == 0
    assert rows(run) == rows(tmp_path / "again")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epoch", "3"], "did you mean 'epochs'?"),
        (["--sampling.rows_per_call", "0"], "sampling.rows_per_call must be at least 1"),
        (["--sampling.plan.steps", "[9]"], "step 9 is outside a rollout of 3 steps"),
        (["--model.pipeline", "./nowhere"], "./nowhere is not a folder"),
        (["--evaluation.metric", "beauty"], "evaluation.metric 'beauty' is no part of the reward"),
        (["--reward", "rewards.ShapeVerifier"], "ShapesVerifier"),
    ],
)
def test_a_mistake_is_one_line(words, message, tmp_path, capsys):
    assert train(tmp_path / "run", *words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line


def test_a_finished_run_is_not_made_again(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    assert train(run) == 0
    assert "has finished its 3 epochs; more --epochs go on" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


def blue(media: Media, prompts: Prompts) -> torch.Tensor:
    return media.pixels[:, 2].mean((1, 2)) - media.pixels[:, 0].mean((1, 2))


@pytest.mark.slow
def test_a_pipeline_a_function_and_a_list_of_prompts_are_enough(tmp_path):
    """The README's Python, on the embedded pipeline, and the reward rises."""
    pipe = text_to_image()
    trainer = FlowGRPO(
        model=SD3(pipe, max_sequence_length=0),
        reward=blue,
        prompts=["a large red circle", "a large blue square", "two green stars"],
        sampling=Sampling(FanOut(FlowSDE(1.0), (1,)), 8, 16, batch_size=8, steps=4, guidance_scale=1.0),
        optimizer=Optimizer(2e-3, betas=(0.9, 0.99), ema_decay=0.0),
        evaluation=Evaluation(["a red circle", "a white square", "two black triangles"] * 5, every=10),
        kl_coef=0.0,
        epochs=10,
        updates_per_epoch=1,
        folder=str(tmp_path / "run"),
    )
    trainer.train()
    first, last = trainer.state.history[0], trainer.state.history[-1]
    assert last["held-out"] > first["held-out"] + 0.05
    fresh = text_to_image()
    fresh.load_lora_weights(str(tmp_path / "run" / "lora"))

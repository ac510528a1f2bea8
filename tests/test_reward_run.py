"""`flowalign train` of a reward: what it leaves, that a stopped run ends as an unbroken one, and what is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowalign import checkpoint
from flowalign.cli import main
from flowalign.pictures import to_images
from rewards import LearntReward
from rewards.preference import load_pairs
from tests.test_reward_model import sized
from trainers.reward_model import Fitting, RewardFit
from trainers.reward_run import RewardModel, divide

CONFIG = """
trainer: trainers.RewardModel
model: shapes
pairs: {pairs}
share: 0.25
fit: {{epochs: 3, batch_size: 16, learning_rate: 1.0e-3, warmup: 2}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pairs in files, where large shapes are preferred, and the config."""
    folder = tmp_path_factory.mktemp("preferences")
    lines = []
    for i, pair in enumerate(sized(48, 0)):
        for side, pixels in (("first", pair.first), ("second", pair.second)):
            to_images(pixels[None])[0].save(folder / f"{i}-{side}.png")
        row = {"prompt": pair.prompt, "label": pair.label}
        lines.append(json.dumps(row | {side: f"{i}-{side}.png" for side in ("first", "second")}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    (folder / "reward.yaml").write_text(CONFIG.format(pairs=folder / "pairs.jsonl"))
    return folder


def train(data: Path, folder: Path, *words: str) -> int:
    return main(["train", str(data / "reward.yaml"), "--folder", str(folder), *words])


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    assert train(data, data / "run") == 0
    return data / "run"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "reward" / "model.safetensors") | load_file(folder / "reward" / "reward.safetensors")


def test_a_run_leaves_a_reward_and_its_numbers(data, run, capsys):
    report = json.loads((run / "report.json").read_text())
    assert report["before"] < 0.4
    assert report["after"] > 0.9
    assert 0 <= report["calibration"] < 0.3
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == report["losses"]
    reward = LearntReward(str(run / "reward"))
    assert reward.name == "learnt"
    assert train(data, run) == 0  # finished: nothing changes
    assert f"held-out agreement {report['before']:.3f} -> {report['after']:.3f}" in capsys.readouterr().err
    assert json.loads((run / "report.json").read_text()) == report


def test_a_stopped_run_ends_as_an_unbroken_one(data, run, monkeypatch):
    folder, stopped = data / "stopped", []
    whole = Fitting.run_epoch

    def interrupted(self, progress):
        whole(self, progress)
        if len(self.losses) == 2 and not stopped:
            stopped.append(True)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Fitting, "run_epoch", interrupted)
    assert train(data, folder) == 0
    assert not (folder / "reward").exists()
    assert train(data, folder) == 0
    expected, found = weights(run), weights(folder)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert (folder / "report.json").read_bytes() == (run / "report.json").read_bytes()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(data, run, monkeypatch, capsys):
    folder, whole = data / "damaged", Fitting.run_epoch

    def interrupted(self, progress):
        whole(self, progress)
        if len(self.losses) < 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Fitting, "run_epoch", interrupted)
        assert train(data, folder) == train(data, folder) == 0
    older, newer = checkpoint.names(folder / "checkpoints")
    path = folder / "checkpoints" / newer
    (path / "state.safetensors").write_bytes((path / "state.safetensors").read_bytes()[:-1] + b"?")
    capsys.readouterr()
    assert train(data, folder) == 0
    assert f"flowalign: skipped {path}: state.safetensors: its contents have changed" in capsys.readouterr().err
    expected, found = weights(run), weights(folder)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert (folder / "report.json").read_bytes() == (run / "report.json").read_bytes()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert checkpoint.names(folder / "checkpoints") == [older, "step-00000003"]
    for name in (older, "step-00000003"):
        (folder / "checkpoints" / name / "manifest.json").unlink()
    assert train(data, folder) == 2
    assert "no checkpoint in" in capsys.readouterr().err


def test_another_config_does_not_go_on_with_a_run(data, run, capsys):
    assert train(data, run, "--fit.learning_rate", "1e-4") == 2
    assert "another fit.learning_rate" in capsys.readouterr().err
    assert train(data, data / "typo", "--fit.epoch", "1") == 2
    assert "did you mean 'epochs'" in capsys.readouterr().err
    assert train(data, data / "none", "--pairs", str(data / "none.jsonl")) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_pairs_of_one_prompt_stay_together(data):
    pairs = load_pairs(data / "pairs.jsonl")
    some, rest = divide(pairs, 0.25)
    assert len(some) + len(rest) == 48
    assert not {pair.prompt for pair in some} & {pair.prompt for pair in rest}
    again, _ = divide(pairs[::-1], 0.25)
    assert {pair.prompt for pair in again} == {pair.prompt for pair in some}
    with pytest.raises(ValueError, match="1 prompts cannot be divided"):
        divide([pair for pair in pairs if pair.prompt == pairs[0].prompt], 0.5)


def test_a_head_alone_goes_on_too(data):
    """The state of `Fitting` as a checkpoint holds it: keys are texts, nothing else is kept."""
    pairs, settings = load_pairs(data / "pairs.jsonl"), RewardFit(4, 16, 0.05, full=False)
    trainer = RewardModel("shapes", str(data / "pairs.jsonl"), share=0.25)
    from flowalign.checkpoint import pack, unpack
    from flowalign.progress import Progress

    def fitted(stops: tuple[int, ...]) -> torch.Tensor:
        state = None
        for epochs in stops:
            reward = LearntReward("shapes", trainer.reward.head.hidden)
            with Fitting(reward, pairs, settings) as fitting:
                if state is not None:
                    fitting.load(unpack(json.loads(json.dumps(state[0])), state[1]))
                for _ in range(epochs):
                    fitting.run_epoch(Progress(fitting.steps))
                data, tensors = pack(fitting.state())
                state = data, {name: value.clone() for name, value in tensors.items()}
        return reward.head.linear.detach().clone()

    assert torch.equal(fitted((4,)), fitted((1, 2, 1)))
    assert not torch.equal(fitted((4,)), fitted((3,)))

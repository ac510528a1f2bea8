"""Every mistake that a user of `flowalign train` can make is one line: what was wrong, where, and what to do."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flowalign.checkpoint import names
from flowalign.cli import main
from tests.jobs import job
from tests.test_train import SHORT

TINY = [word for word in SHORT if not word.startswith(("--epochs", "--evaluation.every", "--prompts"))]
ROOT = Path(__file__).parents[1]
CONFIG = (ROOT / "configs" / "flow_grpo" / "shapes.yaml").read_text()


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command which fails with status 2 says."""
    capsys.readouterr()
    assert main(["train", *words]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("flowalign: error: ")]
    return line.removeprefix("flowalign: error: ")


PROMPT_LINE = "prompts: {class: flowalign.shapes.train_prompts, count: 8192"
SDE = "{class: flowalign.transitions.FlowSDE, noise_level: 1.0}"
PLAN = f"{{class: flowalign.schedules.FanOut, transition: {SDE}, steps: [1, 2]}}"
CONFIGS = {
    "a mistyped key": (("epochs: 170", "epoch: 170"), r"unknown key 'epoch' in FlowGRPO; did you mean 'epochs'\?"),
    "a mistyped key inside": (("  steps: 6", "  step: 6"), "sampling: unknown key 'step' .* did you mean 'steps'"),
    "a wrong type": (("epochs: 170", "epochs: many"), "epochs: expected int, got 'many'"),
    "a number in quotes": (("learning_rate: 1.2e-3", "learning_rate: '1e-4'"), "expected float, got '1e-4'"),
    "a key twice": (("epochs: 170", "epochs: 170\nepochs: 3"), r"c.yaml:\d+: the key 'epochs' is there twice"),
    "a class that is not there": (("trainers.FlowGRPO", "trainers.FlowGROP"), "did you mean .*FlowGRPO"),
    "no prompts": ((PROMPT_LINE, "prompts: [] #"), "prompts is empty"),
    "an empty prompt": ((PROMPT_LINE, "prompts: [a, ''] #"), "prompt 1 is empty"),
    "a prompt file that is not there": (
        (PROMPT_LINE, "prompts: nowhere.txt #"),
        "prompts: nowhere.txt is not a file",
    ),
    "a group of one": (("group_size: 12", "group_size: 1"), "group_size must be at least 2: an advantage compares"),
    "more optimizer steps than rows": (("updates_per_epoch: 1", "updates_per_epoch: 65"), r"must lie in 1 \.\.\. 64"),
    "a step outside the rollout": (("steps: [1, 2]", "steps: [1, 9]"), "step 9 is outside a rollout of 6 steps"),
    "a plan without noise": (
        (PLAN, "{class: flowalign.schedules.AllSteps, transition: flowalign.transitions.ODE}"),
        "no stochastic step to train on: a ratio of densities needs one",
    ),
    "no epochs": (("epochs: 170", "epochs: 0"), "epochs must be at least 1, got 0"),
    "a negative interval": (("epochs: 170", "checkpoints: {every: -1}\nepochs: 1"), "checkpoints.every .* at least 0"),
    "not a number": (("kl_coef: 0.0", "kl_coef: .nan"), "kl_coef: expected a finite number"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bad_config(name, tmp_path, monkeypatch, capsys):
    (old, new), message = CONFIGS[name]
    assert CONFIG.count(old) >= 1, old
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG.replace(old, new))
    line = refused(capsys, "c.yaml", "--folder", "run")
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").rglob("*.json*")), "nothing half-written"


def test_a_small_learning_rate_without_quotes_is_a_number(tmp_path, capsys):
    """PyYAML alone reads 1e-4 as text; that it is read as a number shows in the next mistake's being the one told."""
    (tmp_path / "c.yaml").write_text(
        CONFIG.replace("learning_rate: 1.2e-3", "learning_rate: 1e-4").replace("epochs: 170", "epochs: 0")
    )
    assert "epochs must be at least 1" in refused(capsys, str(tmp_path / "c.yaml"), "--folder", str(tmp_path / "run"))


PROMPTS = {
    "empty": ("p.txt", "", r"p\.txt is empty"),
    "empty lines": ("p.txt", "a circle\n\na square\n", r"p\.txt has empty prompts in line 2; remove them"),
    "an empty prompt": ("p.jsonl", '{"prompt": "a"}\n{"prompt": ""}\n', r"p\.jsonl:2: the prompt is empty"),
    "half a line": ("p.jsonl", '{"prompt": "a"}\n{"prom', r"p\.jsonl:2: not JSON"),
    "no prompt": ("p.jsonl", '{"text": "a"}\n', r'p\.jsonl:1: a line must be an object with a text under "prompt"'),
}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("key", ["prompts", "evaluation.prompts"])
def test_a_bad_prompt_file_is_told_before_a_model_is_loaded(name, key, tmp_path, capsys):
    file, content, message = PROMPTS[name]
    (tmp_path / file).write_text(content)
    words = ["flow_grpo/shapes", "--folder", str(tmp_path / "run"), f"--{key}", str(tmp_path / file)]
    assert re.search(message, refused(capsys, *words, "--model.pipeline", "./no-such-model"))


@pytest.mark.parametrize("key", ["preferences", "held_out"])
def test_preferences_that_are_not_there_are_told_before_a_model_is_loaded(key, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text("")
    known = {"preferences": tmp_path / "pairs.jsonl", "held_out": tmp_path / "pairs.jsonl"} | {key: tmp_path / "none"}
    named = [word for name, path in known.items() for word in (f"--pairs.{name}", str(path))]
    words = ["flow_dpo/shapes", "--folder", str(tmp_path / "run"), *named, "--model.pipeline", "./no-such-model"]
    assert f"preferences: {tmp_path / 'none'} is no file or folder; give a " in refused(capsys, *words)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *again(folder)]) == 0
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def again(run: Path, *words: str) -> list[str]:
    asked = " ".join(words)
    defaults = [word for word in ("--epochs=1", "--evaluation.every=1") if word.split("=")[0] not in asked]
    return ["flow_grpo/shapes", "--folder", str(run), *TINY, "--prompts.count=40", *defaults, *words]


def test_a_run_of_another_config(run, capsys):
    before = (run / "config.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes()
    line = refused(capsys, *again(run, "--kl_coef=0.5", "--optimizer.learning_rate=1e-4"))
    assert "holds a run with another optimizer.learning_rate, kl_coef; name another --folder" in line
    assert "--allow-change optimizer.learning_rate" in line
    line = refused(capsys, *again(run, "--kl_coef=0.5", "--allow-change", "optimizer"))
    assert "holds a run with another kl_coef" in line
    assert before == ((run / "config.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes())
    assert main(["train", *again(run, "--kl_coef=0.5", "--allow-change", "kl_coef", "--epochs=2")]) == 0


def test_a_run_of_other_prompts_in_the_same_file(tmp_path, capsys):
    rows = [json.dumps({"prompt": f"a {color} circle"}) for color in ("red", "blue", "green")]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    words = [
        "flow_grpo/shapes", "--folder", str(tmp_path / "run"), *TINY, "--epochs=1", "--evaluation.every=9",
        "--prompts", str(tmp_path / "p.jsonl"), "--reward", "rewards.JPEGCompressibility", "--evaluation.metric=total",
    ]  # fmt: skip
    assert main(["train", *words]) == 0
    (tmp_path / "p.jsonl").write_text("\n".join(rows[:2]))
    assert "holds a run with another prompts; name another" in refused(capsys, *words)


def alter(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b" ")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda path: os.truncate(path / "state.safetensors", 1000), "1000 bytes, the manifest says"),
    "altered": (lambda path: alter(path / "state.json"), "have changed"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_no_checkpoint_that_can_be_read(name, run, capsys):
    damage, message = DAMAGE[name]
    for path in (run / "checkpoints").iterdir():
        damage(path)
    line = refused(capsys, *again(run))
    assert re.search(rf"no checkpoint in .* can be read .*{message}.*move the run's folder away", line), line


def test_a_checkpoint_of_a_newer_format(run, capsys):
    path = run / "checkpoints" / names(run / "checkpoints")[-1] / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 7'))
    assert re.search("has format 7, written by FlowAlign .*; this is .* reads format 1", refused(capsys, *again(run)))


def test_no_room_on_the_disk(run, monkeypatch, capsys):
    """Of the last checkpoint's size; the run stops and can go on."""
    free = shutil.disk_usage(run)
    monkeypatch.setattr("flowalign.checkpoint.shutil.disk_usage", lambda folder: free._replace(free=1_000_000))
    kept = names(run / "checkpoints")
    line = refused(capsys, *again(run, "--epochs=2"))
    assert re.search(
        r"no room for a checkpoint in .*: 1 MB are free and the last one has \d+ MB; the last one stands", line
    )
    assert names(run / "checkpoints") == kept
    monkeypatch.undo()
    assert main(["train", *again(run, "--epochs=2")]) == 0


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "is a file; name another folder" in refused(capsys, *again(tmp_path / "file"))
    assert "is read-only or no folder" in refused(capsys, *again(tmp_path / "file" / "run"))
    assert (
        "/proc/run cannot be written: /proc is read-only" in refused(capsys, *again(Path("/proc/run")))
        or not os.geteuid()
    )


def test_a_read_only_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o500)
    if os.geteuid() == 0:  # root may write anywhere
        monkeypatch.setattr("flowalign.tracking.os.access", lambda path, mode: Path(path) != tmp_path / "locked")
    line = refused(capsys, *again(tmp_path / "locked" / "run"), "--model.pipeline", "./no-such-model")
    assert f"{tmp_path / 'locked'} is read-only or no folder; name another folder" in line


def test_a_folder_with_something_else_in_it(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    assert "is not empty and holds no run" in refused(capsys, *again(tmp_path))


def test_two_runs_in_one_folder(run, capsys):
    with (run / ".lock").open("w+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 12 on laptop")
        file.flush()
        before = (run / "metrics.jsonl").read_bytes()
        line = refused(capsys, *again(run, "--epochs=2"))
        assert "is in use by a run that is going on (process 12 on laptop)" in line
        assert (run / "metrics.jsonl").read_bytes() == before


def test_a_reward_that_is_not_a_number(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_reward.py").write_text(
        "import torch\n"
        "def sometimes(media, prompts):\n"
        "    scores = media.pixels.mean((1, 2, 3))\n"
        "    scores[0] = float('nan')\n"
        "    return scores\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["--allow-code", "--reward", "my_reward.sometimes", "--evaluation.metric", "total", "--evaluation.every=9"]
    line = refused(capsys, *again(tmp_path / "run", *words))
    assert re.search(r"\d of 12 scores of epoch 0 are not valid; mend the reward, or set on_invalid: drop", line)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    """A real process, a real SIGINT, and the same command again."""
    words = [sys.executable, "-m", "flowalign", "train", "flow_grpo/shapes", "--folder", str(tmp_path / "run"), *TINY]
    words += ["--epochs=400", "--evaluation.every=400", "--prompts.count=40"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environ, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoints").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    last = told.strip().splitlines()[-1]
    assert last.startswith("flowalign: stopped by SIGINT; all is saved in ")
    assert last.endswith("; run the same command again to go on")
    assert names(tmp_path / "run" / "checkpoints")


def test_prompts_that_are_cut_off_are_counted_and_told(tmp_path, capsys):
    """The tiny encoder reads 40 tokens, of a byte each; right-to-left letters and emoji pass as any others."""
    long = ["\U0001f984 a unicorn" * 5, "\u05e9\u05dc\u05d5\u05dd" * 20, "x" * 100_000]
    job(tmp_path / "run", prompts=["a red circle", *long], epochs=1).train(report=False)
    said = "3 prompts are longer than the 40 tokens that the text encoders read, and the rest of them is not seen"
    assert f"flowalign: {said}" in capsys.readouterr().err
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [row["detail"].startswith(said) for row in events if row["event"] == "prompts"] == [True]

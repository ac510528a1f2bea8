"""The command as a user meets it: a process, its output, its exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowalign.config import load_yaml

ROOT = Path(__file__).resolve().parents[1]

TRAINER = """
from __future__ import annotations
from pathlib import Path
from flowalign.config import dump_yaml

class Adapter:
    def __init__(self, rank: int = 4) -> None:
        self.rank = rank

def shout() -> None: ...

class Trainer:
    def __init__(self, folder: Path, adapter: Adapter, rate: float = 1e-3, fail: str = "") -> None:
        self.folder, self.adapter, self.rate, self.fail = folder, adapter, rate, fail

    def train(self, config=None, *, resume=False, allow_change=()):
        if self.fail == "interrupt":
            raise KeyboardInterrupt
        if self.fail:
            raise {"value": ValueError, "file": FileNotFoundError, "bug": TypeError}[self.fail]("it went\\nwrong")
        self.folder.write_text(dump_yaml(config))
        print(f"rank {self.adapter.rank} rate {self.rate}")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mytrainer.py").write_text(TRAINER)
    (tmp_path / "c.yaml").write_text("trainer: mytrainer.Trainer\nfolder: out.yaml\nadapter: mytrainer.Adapter\n")
    return tmp_path


def flowalign(cwd: Path, *words: str, path: str = str(ROOT)) -> subprocess.CompletedProcess[str]:
    # the console script has no current folder on its path; -P gives -m the same
    command = [sys.executable, "-P", "-m", "flowalign", *words]
    return subprocess.run(command, cwd=cwd, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert (done.returncode, done.stdout) == (2, "")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("code from outside")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("flowalign: error: ")
    return lines[0].removeprefix("flowalign: error: ")


def test_train_with_options_and_again_from_what_it_wrote(folder: Path) -> None:
    done = flowalign(folder, "train", "c.yaml", "--allow-code", "--adapter.rank", "8", "--rate=1e-4")
    assert (done.returncode, done.stdout) == (0, "rank 8 rate 0.0001\n")
    assert f"code from outside flowalign: mytrainer.Trainer ({folder}/mytrainer.py)" in done.stderr
    written = load_yaml(folder / "out.yaml")
    assert written == {
        "trainer": "mytrainer.Trainer",
        "folder": "out.yaml",
        "adapter": {"class": "mytrainer.Adapter", "rank": 8},
        "rate": 1e-4,
        "fail": "",
    }
    (folder / "out.yaml").rename(folder / "again.yaml")
    done = flowalign(folder, "train", "again.yaml", "--allow-code")
    assert done.stdout == "rank 8 rate 0.0001\n"
    assert load_yaml(folder / "out.yaml") == written


def test_foreign_code_needs_permission(folder: Path) -> None:
    line = refused(flowalign(folder, "train", "c.yaml"))
    assert line.startswith("c.yaml: mytrainer.Trainer is code from outside")
    assert not (folder / "out.yaml").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "c.yaml", "--allow-code", "--rat", "1"], "c.yaml (with options): unknown key 'rat' in Trainer; did"),
        (
            ["train", "c.yaml", "--allow-code", "--adapter.rnk", "1"],
            "c.yaml (with options): adapter: unknown key 'rnk'",
        ),
        (
            ["train", "c.yaml", "--allow-code", "--adapter.rank", "x"],
            "c.yaml (with options): adapter.rank: expected int",
        ),
        (
            ["train", "c.yaml", "--allow-code", "--trainer", "mytrainer.shout"],
            "c.yaml (with options): trainer: mytrain",
        ),
        (["train", "c.yaml", "--allow-code", "--trainer", "3"], "c.yaml (with options): the key 'trainer' has to name"),
        (["train", "c.yaml", "--allow-code", "--rate"], "--rate needs a value"),
        (["train", "c.yaml", "--allow-code", "extra"], "expected --key value, got 'extra'"),
        (["train", "d.yaml"], "no file and no shipped config 'd.yaml'"),
        (["train", "mytrainer.py"], "mytrainer.py:"),
        (["train"], "the following arguments are required: CONFIG"),
        (["trian", "c.yaml"], "argument COMMAND: invalid choice: 'trian'"),
        ([], "the following arguments are required: COMMAND"),
        (["train", "c.yaml", "--allow-code", "--fail", "value"], "it went wrong (--debug shows where)"),
        (["train", "c.yaml", "--allow-code", "--fail", "file"], "it went wrong (--debug shows where)"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_status_2(folder: Path, words: list[str], message: str) -> None:
    assert refused(flowalign(folder, *words)).startswith(message)


def test_debug_shows_the_traceback(folder: Path) -> None:
    done = flowalign(folder, "train", "c.yaml", "--allow-code", "--fail", "value", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "mytrainer.py" in done.stderr.split("Traceback")[1]


def test_a_bug_is_not_dressed_up_as_a_mistake(folder: Path) -> None:
    done = flowalign(folder, "train", "c.yaml", "--allow-code", "--fail", "bug")
    assert done.returncode == 1
    assert "TypeError" in done.stderr


def test_ctrl_c_is_one_line_and_status_130(folder: Path) -> None:
    done = flowalign(folder, "train", "c.yaml", "--allow-code", "--fail", "interrupt")
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "flowalign: stopped"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_help_has_an_example(tmp_path: Path, words: list[str]) -> None:
    done = flowalign(tmp_path, *words)
    assert done.returncode == 0
    assert "flowalign train flow_grpo/shapes --" in done.stdout


def test_a_folder_that_hides_ours_is_named(folder: Path) -> None:
    (folder / "mine" / "rewards").mkdir(parents=True)
    (folder / "mine" / "rewards" / "__init__.py").write_text("")
    line = refused(flowalign(folder, "train", "c.yaml", path=f"{folder / 'mine'}{os.pathsep}{ROOT}"))
    assert line.startswith(f"{folder / 'mine' / 'rewards'} hides flowalign's own package 'rewards'")

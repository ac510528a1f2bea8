"""`flowalign slurm`: the script that it writes, and what that does with a run that is warned, stopped, failed or done.

Slurm's own commands are stood in for by small scripts here, and bash runs the job; scripts/try_slurm.py does the same
with a real Slurm.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowalign.cli import main

ASKED = ["slurm", "flow_grpo/shapes", "--gpus", "0", "--time", "0:10:00"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_script_asks_for_what_it_was_told(here, capsys):
    words = ["--nodes", "2", "--gpus", "8", "--time", "1-12", "--partition", "h100", "--sbatch=--account=lab"]
    before = ["--before", "module load cuda", "--warning", "600", "--learning", "x"]
    assert main(["slurm", "flow_grpo/shapes", *words, *before]) == 2  # a key that the config does not have
    assert "learning" in capsys.readouterr().err
    assert main(["slurm", "flow_grpo/shapes", *words, *before[:-2], "--folder", "runs/a b"]) == 0
    text = (here / "flow_grpo_shapes.sbatch").read_text()
    for line in (
        "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=1-12", "--partition=h100", "--account=lab",
        "--signal=B:USR1@600", "--requeue", "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in text
    assert "\nmodule load cuda\nrun='runs/a b'\n" in text
    assert f"{sys.executable} -m flowalign train flow_grpo/shapes --folder 'runs/a b' &\n" in text
    assert subprocess.run(["bash", "-n", "flow_grpo_shapes.sbatch"]).returncode == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--time", "a day"], "--time is minutes, hours:minutes:seconds or days-hours"),
        (["--nodes", "0"], "--nodes must be at least 1"),
        (["--warning", "-5"], "--warning must be at least 1"),
        (["--sbatch", "account=lab"], "--sbatch takes an option of sbatch whole"),
        (["--partition", "a\n#SBATCH --uid=0"], "it must be one line"),
        (["--epochs", "many"], "epochs"),
    ],
)
def test_what_slurm_could_not_take_is_refused(words, told, here, capsys):
    assert main([*ASKED, *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not [*here.glob("*.sbatch")]


def test_no_script_is_written_over(here, capsys):
    assert main([*ASKED, "--out", "job.sbatch"]) == 0
    before = (here / "job.sbatch").read_text()
    assert main([*ASKED, "--out", "job.sbatch", "--epochs", "3"]) == 2
    assert "job.sbatch exists" in capsys.readouterr().err
    assert (here / "job.sbatch").read_text() == before


RUN = """\
import os, signal, sys, time
stopped = []
signal.signal(signal.SIGUSR1, lambda *rest: stopped.append(1))
open("begun", "w").close()
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end and not stopped:
    time.sleep(0.01)
if stopped:
    os.makedirs("runs/x", exist_ok=True)
    open("runs/x/PREEMPTED", "w").close()
sys.exit(int(sys.argv[2]))
"""


def submitted(
    here: Path, seconds: float, code: int, state: str = "RUNNING", stopped_before: bool = False, before: str = ":"
) -> subprocess.Popen[bytes]:
    """The script's job, with a stand-in for a training that ends by itself after some seconds."""
    assert main([*ASKED, "--out", "job.sbatch", "--folder", "runs/x", "--before", before]) == 0
    if stopped_before:
        (here / "runs/x").mkdir(parents=True)
        (here / "runs/x/PREEMPTED").touch()
    (here / "run.py").write_text(RUN)
    commands = {
        "srun": f'echo "$@" > asked; exec {sys.executable} run.py {seconds} {code}',
        "squeue": f"echo {state}",
        "scontrol": 'echo "$@" > queued; exit 1',  # ends the wait for Slurm to end the job
    }
    for name, body in commands.items():
        (here / name).write_text(f"#!/bin/bash\n{body}\n")
        (here / name).chmod(0o755)
    environ = os.environ | {"PATH": f"{here}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "6"}
    made = subprocess.Popen(["bash", "job.sbatch"], cwd=here, env=environ)
    for _ in range(1000):
        if (here / "begun").exists():
            return made
        time.sleep(0.01)
    raise AssertionError("the job has not begun")


def queued_again(here: Path) -> bool:
    return (here / "queued").exists() and (here / "queued").read_text() == "requeue 7\n"


def test_a_warned_run_stops_and_is_queued_again(here):
    made = submitted(here, 20, 0)
    made.send_signal(signal.SIGUSR1)
    assert made.wait(10) == 0
    assert queued_again(here)


def test_each_process_has_the_cpus_that_the_job_was_given(here):
    """As the job has them, which options of sbatch may have changed since the script was written."""
    made = submitted(here, 0.05, 0)
    assert made.wait(10) == 0
    assert "--cpus-per-task=6" in (here / "asked").read_text().split()


def test_a_warning_amid_the_imports_queues_it_again_too(here):
    made = submitted(here, 20, 1)
    made.send_signal(signal.SIGUSR1)
    assert made.wait(10) == 1
    assert queued_again(here)


def test_a_warning_amid_the_lines_that_come_first_starts_no_run_and_queues_it_again(here):
    made = submitted(here, 20, 0, before="touch begun; until [ -e warned ]; do sleep 0.05; done")
    made.send_signal(signal.SIGUSR1)
    (here / "warned").touch()
    assert made.wait(10) == 1
    assert not (here / "asked").exists()
    assert queued_again(here)


@pytest.mark.parametrize("code", [0, 2])
def test_a_run_that_is_done_or_has_failed_is_not(code, here):
    assert submitted(here, 0.05, code, stopped_before=True).wait(10) == code
    assert not queued_again(here)


def test_a_job_that_somebody_cancels_is_not(here):
    made = submitted(here, 20, 0, "COMPLETING")
    made.send_signal(signal.SIGUSR1)
    assert made.wait(10) == 0
    assert not queued_again(here)

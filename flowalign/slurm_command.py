"""`flowalign slurm`: a job script for Slurm that stops a run before its time is up, and queues it again until done."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.cli import add_allow_change, add_command, check_files, read_call
from flowalign.config import ConfigError

SLURM = """Write a job script for Slurm.

CONFIG and its options are those of train, and are checked now. Slurm sends the run a signal some minutes before the
job's time is up; the run saves all and stops, and the script puts the job back into the queue, where it goes on. So a
run may take many times the longest job that the cluster allows. A job that is preempted, or whose node fails, goes on
likewise, from its newest checkpoint; one that ends with an error stays ended.

  flowalign slurm flow_grpo/sd3.5_ocr --nodes 2 --gpus 8 --time 24:00:00 --partition h100
  sbatch flow_grpo_sd3.5_ocr.sbatch

Other settings of Slurm and commands that come first, each as often as needed:

  flowalign slurm my.yaml --gpus 4 --time 8:00:00 --sbatch=--account=lab --before "module load cuda/12.8"
"""
TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d(:\d\d)?)?")  # as sbatch --time takes it
SCRIPT = """\
#!/bin/bash
# Written by flowalign slurm. Submit it where it lies: sbatch {file}
{directives}

# SIGUSR1 comes {warning} seconds before the time is up. It is handed on to the run; one that comes amid the lines below
# is heeded after the command that it meets, and no run is started.
warned=
step=
trap 'if [ -n "$step" ]; then warned=yes; kill -USR1 "$step" 2> /dev/null; else warned=early; fi' USR1

cd {place} || exit 1
{before}run={run}
rm -f "$run/PREEMPTED"  # of an earlier stop; the run leaves a new one if a signal stops it

# One process a task, with the CPUs asked for above, which srun does not take from the job by itself since Slurm 22.05.
# They save and stop at SIGUSR1.
code=1
if [ -z "$warned" ]; then
    srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" {command} &
    step=$!
    [ "$warned" = early ] && kill -USR1 "$step" 2> /dev/null  # warned between these lines
    wait "$step"
    code=$?
    while kill -0 "$step" 2> /dev/null; do  # a signal ends a wait
        wait "$step"
        code=$?
    done
fi

# Back into the queue where the run was stopped before it was done, or was still starting when its time was up; not
# where it has failed, nor where somebody has cancelled the job.
state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
again=
[ -e "$run/PREEMPTED" ] && again=yes
[ -n "$warned" ] && [ "$code" != 0 ] && again=yes
if [ "$state" = RUNNING ] && [ -n "$again" ]; then
    scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
exit "$code"
"""


@dataclass(frozen=True)
class Job:
    """What a job asks Slurm for. gpus, processes: of each node. warning: seconds. extra: whole options of sbatch."""

    name: str
    nodes: int
    gpus: int
    processes: int
    cpus: int
    time: str
    partition: str | None
    warning: int
    extra: tuple[str, ...]

    def __post_init__(self) -> None:
        counts = {"nodes": self.nodes, "processes": self.processes, "cpus": self.cpus, "warning": self.warning}
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"--{name} must be at least 1, got {count}")
        if self.gpus < 0:
            raise ConfigError(f"--gpus must be at least 0, got {self.gpus}")
        if not TIME.fullmatch(self.time):
            raise ConfigError(
                f"--time is minutes, hours:minutes:seconds or days-hours, as in 24:00:00; got {self.time!r}"
            )
        told = [value for value in (self.partition, *self.extra) if value is not None]
        for value in told:
            if not value.isprintable():
                raise ConfigError(f"{value!r} is no option of sbatch: it must be one line")
        for value in self.extra:
            if not value.startswith("-"):
                raise ConfigError(
                    f"--sbatch takes an option of sbatch whole, as in --sbatch=--account=lab; got {value!r}"
                )

    def directives(self) -> str:
        """The lines at the head of its script."""
        asked = [
            f"--job-name={self.name}",
            f"--output={self.name}-%j.out",
            "--open-mode=append",  # one log, however often it is queued again
            f"--nodes={self.nodes}",
            f"--ntasks-per-node={self.processes}",
            *([f"--gpus-per-node={self.gpus}"] if self.gpus else []),
            f"--cpus-per-task={self.cpus}",
            f"--time={self.time}",
            f"--signal=B:USR1@{self.warning}",
            "--requeue",
            *([f"--partition={self.partition}"] if self.partition else []),
            *self.extra,
        ]
        return "\n".join(f"#SBATCH {one}" for one in asked)


def add_slurm(commands: Any) -> None:
    """flowalign slurm CONFIG --time T"""
    parser = add_command(commands, "slurm", "a job script for Slurm, which goes on with a run", SLURM)
    parser.usage = "flowalign slurm [-h] CONFIG --time T [options] [--key value ...] [--allow-code] [--debug]"
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped config")
    parser.add_argument("--time", required=True, metavar="T", help="of one job: minutes, h:mm:ss or days-hours")
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="of each node; 0 for a run on CPUs")
    parser.add_argument("--processes", type=int, metavar="N", help="of each node; one a GPU by default")
    parser.add_argument("--cpus", type=int, default=8, metavar="N", help="of each process; 8 by default")
    parser.add_argument("--partition", metavar="NAME", help="the cluster's own by default")
    parser.add_argument(
        "--warning", type=int, default=300, metavar="SECONDS", help="before the time is up; 300 by default"
    )
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="another option of sbatch")
    parser.add_argument("--before", action="append", default=[], metavar="COMMAND", help="a line that comes first")
    parser.add_argument("--out", type=Path, metavar="FILE", help="NAME.sbatch by default; must be new")
    parser.add_argument("--allow-code", action="store_true", help="let the config name classes outside flowalign")
    add_allow_change(parser)
    parser.set_defaults(run=slurm)


def slurm(arguments: argparse.Namespace, words: list[str]) -> None:
    """Check the config with its options, and write the script."""
    call = read_call(arguments, words)
    check_files(call)
    folder = (call.defaults | call.arguments).get("folder")
    if not isinstance(folder, str):
        raise ConfigError(f"{call.path} has no run folder: its script could not tell whether it is done")
    name = _name(arguments.config)
    job = Job(
        name, arguments.nodes, arguments.gpus, arguments.processes or max(arguments.gpus, 1), arguments.cpus,
        arguments.time, arguments.partition, arguments.warning, tuple(arguments.sbatch),
    )  # fmt: skip
    out: Path = arguments.out or Path(f"{name}.sbatch")
    if out.exists():
        raise ConfigError(f"{out} exists: take it away, or name another with --out")
    out.write_text(script(job, out, folder, _command(arguments, words), arguments.before))
    print(out)


def script(job: Job, file: Path, folder: str, command: str, before: list[str]) -> str:
    """The whole script, which runs where it is written now."""
    lines = "".join(f"{line}\n" for line in before)
    return SCRIPT.format(
        file=file, directives=job.directives(), place=shlex.quote(str(Path.cwd())), before=lines,
        run=shlex.quote(folder), warning=job.warning, command=command,
    )  # fmt: skip


def _command(arguments: argparse.Namespace, words: list[str]) -> str:
    """What each task runs: this python, so that the job has the same packages."""
    changes = [part for key in arguments.allow_change for part in ("--allow-change", key)]
    code = ["--allow-code"] if arguments.allow_code else []
    return shlex.join([sys.executable, "-m", "flowalign", "train", arguments.config, *words, *code, *changes])


def _name(config: str) -> str:
    """Of a config's name or file, fit for a job: flow_grpo_sd3.5_ocr."""
    path = Path(config)
    told = config if path.suffix not in (".yaml", ".yml") else f"{path.parent.name}_{path.stem}"
    return re.sub(r"[^\w.-]+", "_", told).strip("_.") or "flowalign"

"""`flowalign doctor`: what this machine has and can do, measured, as a report to paste into an issue."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowalign.cli import add_command
from flowalign.config import ConfigError

DOCTOR = """Look at this machine: versions, devices, attention backends, the disk, determinism; of many processes also
how they exchange. The report holds no secrets and can be pasted into an issue.

  flowalign doctor
  flowalign doctor --folder /scratch/runs
  torchrun --nproc-per-node 8 -m flowalign doctor

Exit status 2 where something is wrong, which is marked with an exclamation mark.
"""


def add_doctor(commands: Any) -> None:
    """flowalign doctor"""
    parser = add_command(commands, "doctor", "what this machine has and can do, and what is wrong with it", DOCTOR)
    parser.usage = "flowalign doctor [-h] [--folder FOLDER] [--debug]"
    parser.add_argument(
        "--folder", type=Path, default=Path("runs"), metavar="FOLDER", help="where runs will lie; runs/"
    )
    parser.set_defaults(run=doctor)


def doctor(arguments: argparse.Namespace, words: list[str]) -> None:
    """Print each section as it is found. Raises: ConfigError where something is wrong."""
    if words:
        raise ConfigError(f"{words[0]} is no option of doctor")
    from flowalign import distributed
    from flowalign.doctor import sections

    distributed.start()
    wrong = 0
    for probe in sections(arguments.folder):
        found = probe()
        wrong += len(found.findings)
        if distributed.rank() == 0:
            print(found.text(), flush=True)
    distributed.finish()
    if wrong and distributed.rank() == 0:
        raise ConfigError(f"{wrong} of the findings above, marked with !, would spoil a run")

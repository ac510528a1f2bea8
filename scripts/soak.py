"""Thousands of epochs of a tiny run: does it grow, or keep files and threads open?

    python scripts/soak.py --out build/soak --epochs 2000

The run is watched from outside, by /proc (Linux). What it holds after a tenth of its epochs, when all has happened once
(rollout, update, evaluation, checkpoint), is held against the last tenth: the median of memory, the most files and
threads. Exit status 1 where memory has grown by more than 5 % or more files or threads are open.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

CONFIG = [
    "flow_grpo/shapes", "--sampling.plan", "{class: flowalign.schedules.AllSteps, transition: {class: "
    "flowalign.transitions.FlowSDE, noise_level: 0.7}}", "--sampling.groups", "2", "--sampling.group_size", "2",
    "--sampling.batch_size", "4", "--sampling.rows_per_call", "4", "--sampling.steps", "2", "--kl_coef", "0.01",
    "--model.lora.rank", "4", "--evaluation.prompts.count", "4", "--evaluation.pictures", "4", "--evaluation.every",
    "50", "--checkpoints.every", "25",
]  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What the process held when it had made so many epochs."""

    epoch: int
    mebibytes: float
    files: int
    threads: int


def look(process: int, log: Path) -> Seen | None:
    """None where the process has gone, or has made no epoch."""
    place = Path("/proc") / str(process)
    try:
        pages = int((place / "statm").read_text().split()[1])
        files, threads = len([*(place / "fd").iterdir()]), len([*(place / "task").iterdir()])
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            epoch = json.loads(file.read().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return None  # a line may be half-written
    return Seen(epoch, pages * 4096 / (1 << 20), files, threads)


def watched(folder: Path, epochs: int) -> list[Seen]:
    """What a run held, twice a second."""
    command = [sys.executable, "-m", "flowalign", "train", *CONFIG, "--epochs", str(epochs), "--folder", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as run:
        seen = []
        while run.poll() is None:
            found = look(run.pid, folder / "metrics.jsonl")
            seen += [found] if found else []
            time.sleep(0.5)
    if run.returncode:
        raise SystemExit(f"the run has failed ({run.returncode}); see what it says: {' '.join(command)}")
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/soak"), help="must be new")
    parser.add_argument("--epochs", type=int, default=2000)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    began, tenth = time.monotonic(), arguments.epochs // 10
    seen = watched(arguments.out / "run", arguments.epochs)
    early = [one for one in seen if tenth <= one.epoch < 2 * tenth]
    late = [one for one in seen if one.epoch >= arguments.epochs - tenth]
    held, holds = (median(one.mebibytes for one in part) for part in (early, late))
    growth = holds / held - 1
    print(f"{arguments.epochs} epochs in {time.monotonic() - began:.0f} s, {len(seen)} looks")
    print(f"memory {held:.0f} MiB, in the end {holds:.0f} MiB: {growth:+.1%}")
    wrong = growth > 0.05
    for name in ("files", "threads"):
        before, after = (max(getattr(one, name) for one in part) for part in (early, late))
        print(f"{name} {before}, in the end {after}")
        wrong |= after > before
    raise SystemExit(int(wrong))


if __name__ == "__main__":
    main()

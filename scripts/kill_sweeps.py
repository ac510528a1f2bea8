"""Kill real sweeps, launched as a user launches them, and see whether the same command comes to the same table.

    python scripts/kill_sweeps.py --kills 20 --out build/sweep_kills

A sweep of the embedded models (configs/eval/shapes.yaml, fewer prompts) is killed with SIGKILL at random moments after
its first call has been kept, and started again until it has ended; then another, until there were so many kills. Each
has to come to the table of one that was left alone, to the last digit, without drawing or scoring again what was kept;
prices aside, which are measured by the clock. In the end one method is changed: nothing that was kept may be made anew.
Exit status 1 where any of this does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = [
    "--benchmarks.shapes.count=24", "--methods.reno.iterations=6", "--seeds=[0,1]",
]  # fmt: skip


def start(folder: Path, samples: int = 20) -> subprocess.Popen[bytes]:
    """The sweep, as a user would type it."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "flowalign", "eval", "eval/shapes", f"--folder={folder}", *OPTIONS]
    command += [f"--methods.best-of-n.samples={samples}"]
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, env=environ, stdout=log, stderr=log)


def finished(folder: Path, samples: int = 20) -> float:
    """The seconds that it takes, undisturbed. Raises: RuntimeError where it fails."""
    began = time.monotonic()
    if code := start(folder, samples).wait():
        raise RuntimeError(f"the sweep ended with {code}; see {folder.with_suffix('.log')}")
    return time.monotonic() - began


def table(folder: Path) -> list[dict[str, Any]]:
    """Without what the clock says."""
    rows: list[dict[str, Any]] = json.loads((folder / "table.json").read_text())
    return [{name: value for name, value in row.items() if name != "cost"} for row in rows]


def kept(folder: Path) -> dict[Path, int]:
    """When each call that was drawn or scored was kept."""
    done = [*folder.glob("cells/drawn/*/call.json"), *folder.glob("cells/scores/*.json")]
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in done}


def killed(folder: Path, wait: float) -> bool:
    """Start it and kill it so long after it has kept something new; whether it came to that before it ended."""
    before, sweep = kept(folder), start(folder)
    due: float | None = None
    while sweep.poll() is None:
        if due is None and kept(folder) != before:
            due = time.monotonic() + wait
        if due is not None and time.monotonic() >= due:
            sweep.send_signal(signal.SIGKILL)
            return sweep.wait() == -signal.SIGKILL
        time.sleep(0.02)
    if sweep.returncode:
        raise RuntimeError(f"the sweep ended with {sweep.returncode}; see {folder.with_suffix('.log')}")
    return False


def changed(folder: Path, before: dict[Path, int]) -> list[Path]:
    """What was kept and has been made anew, or is gone."""
    now = kept(folder)
    return [path for path, when in before.items() if now.get(path) != when]


def chain(folder: Path, most: int, longest: float, chance: random.Random) -> tuple[int, list[Path]]:
    """One sweep to its end, with `most` kills or fewer; what was made anew though it had been kept."""
    kills, again = 0, list[Path]()
    while True:
        before = kept(folder)
        hit = kills < most and killed(folder, chance.uniform(0, longest))
        if not hit:
            finished(folder)
        again += changed(folder, before)
        if not hit:
            return kills, again
        kills += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("build/sweep_kills"))
    asked = parser.parse_args()
    shutil.rmtree(asked.out, ignore_errors=True)
    asked.out.mkdir(parents=True)
    out, chance = asked.out.absolute(), random.Random(asked.seed)
    alone = out / "alone"
    print(f"left alone: {finished(alone):.0f} s, {len(kept(alone))} calls kept", flush=True)
    before = kept(alone)
    print(f"the same command again: {finished(alone):.0f} s", flush=True)
    bad, kills, number = changed(alone, before), 0, 0
    while kills < asked.kills:
        folder = out / f"killed-{number}"
        hit, again = chain(folder, asked.kills - kills, 3.0, chance)
        kills, number = kills + hit, number + 1
        same = table(folder) == table(alone)
        bad += again + ([] if same else [folder])
        told = f"tables {'equal' if same else 'DIFFER'}, {len(again)} calls made anew"
        print(f"sweep {number}: {hit} kills, {told}", flush=True)
    before = kept(alone)
    finished(alone, samples=10)
    more = kept(alone).keys() - before.keys()
    bad += changed(alone, before)
    print(f"another number of samples: {len(more)} calls more, {len(changed(alone, before))} made anew")
    print(f"{kills} kills of {number} sweeps, {'all is well' if not bad else f'NOT SO: {bad[:3]}'}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()

"""Kill real runs, launched as a user launches them, and see whether the same command makes them whole.

    python scripts/kill_runs.py --kills 20 --out build/kills

Half of the kills hit the launcher, half one training process; three of four come at a random moment of the run, every
fourth while a checkpoint is being written. After each kill the same command runs again, until the run has ended. Then
its policy, average, optimizer, metrics and pictures are compared by SHA-256 with those of a run that was left alone.
Exit status 1 if any differs.
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
from hashlib import sha256
from pathlib import Path

from safetensors.torch import load_file

OPTIONS = [
    "--epochs=12", "--sampling.groups=12", "--sampling.group_size=4", "--sampling.batch_size=2", "--sampling.steps=4",
    "--updates_per_epoch=2", "--evaluation.every=2", "--evaluation.prompts.count=16", "--evaluation.pictures=4",
    "--prompts.count=40", "--checkpoints.every=1", "--model.mixed_precision=no", "--model.decode_precision=no",
]  # fmt: skip
OF_THE_CLOCK = ("clock", "seconds", "logs", "facts")  # facts hold the folder's name
PLACES = ("anywhere", "anywhere", "anywhere", "save")


def command(folder: Path, processes: int) -> list[str]:
    """What a user would type."""
    train = ["-m", "flowalign", "train", "flow_grpo/shapes", f"--folder={folder}", *OPTIONS]
    if processes == 1:
        return [sys.executable, *train]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, *train]


def start(folder: Path, processes: int) -> subprocess.Popen[bytes]:
    """The run, in a session of its own so that a kill reaches nothing else."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    log = folder.with_suffix(".log").open("ab")
    return subprocess.Popen(command(folder, processes), env=environ, stdout=log, stderr=log, start_new_session=True)


def workers(launcher: int) -> list[int]:
    """The training processes that a launcher has started."""
    listed = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in listed]


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of what a run has come to, without what the clock says."""
    checkpoints = folder / "checkpoints"
    last = sorted(path.name for path in checkpoints.glob("step-*"))[-1]
    record = json.loads((checkpoints / last / "state.json").read_text())
    lora = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    found = {
        "policy, average, optimizer": (checkpoints / last / "state.safetensors").read_bytes(),
        "record": json.dumps(
            {k: v for k, v in record.items() if k not in ("clock", "seconds", "logs", "facts")}
        ).encode(),
        "lora": b"".join(name.encode() + value.numpy().tobytes() for name, value in sorted(lora.items())),
    }
    for name in ("metrics.jsonl", "histograms.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        kept = [{k: v for k, v in row.items() if k != "seconds" and not k.startswith("time/")} for row in rows]
        assert len({(row["step"], row.get("name"), "reward" in row) for row in kept}) == len(kept), (
            f"{name} has doubles"
        )
        found[name] = json.dumps(kept).encode()
    for path in sorted([*(folder / "evaluations").iterdir(), *(folder / "samples").iterdir()]):
        found[path.name] = path.read_bytes()
    return {name: sha256(content).hexdigest() for name, content in found.items()}


def moment(folder: Path, place: str, after: float, process: subprocess.Popen[bytes]) -> None:
    """Wait until a checkpoint is being written, or one is there, and then some seconds."""
    making = folder / "checkpoints"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        seen = any(making.glob(".making-*")) if place == "save" else making.is_dir() and any(making.glob("step-*"))
        if seen:
            break
        time.sleep(0.002)
    time.sleep(after)


def seconds(folder: Path) -> float:
    """How long a run took, its start left out."""
    return float(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["seconds"])


def kill_one(folder: Path, processes: int, after: float, place: str, of_launcher: bool, rng: random.Random) -> str:
    """One kill, and the same command again; what happened in words."""
    process = start(folder, processes)
    moment(folder, place, after, process)
    if process.poll() is not None:
        return "had ended"
    victims = [] if processes == 1 else workers(process.pid)
    victim = process.pid if of_launcher or not victims else rng.choice(victims)
    os.kill(victim, signal.SIGKILL)
    if victim == process.pid:  # a launcher that is killed leaves its processes behind: as a scheduler would, end them
        time.sleep(0.2)
        for orphan in victims:
            try:
                os.kill(orphan, signal.SIGKILL)
            except ProcessLookupError:
                continue
    process.wait()
    time.sleep(0.2)
    saved = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    return (
        f"killed the {'launcher' if victim == process.pid else 'process'}; last saved: {saved[-1] if saved else 'none'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("build/kills"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)
    rng, failures = random.Random(arguments.seed), 0
    for processes in arguments.processes:
        whole = arguments.out / f"whole-{processes}"
        began = time.monotonic()
        assert start(whole, processes).wait() == 0, f"see {whole}.log"
        print(f"{processes} processes: unbroken run {time.monotonic() - began:.0f} s", flush=True)
        wanted = digest(whole)
        for number in range(arguments.kills // len(arguments.processes)):
            folder = arguments.out / f"run-{processes}-{number}"
            place = PLACES[number % len(PLACES)]
            after = rng.uniform(0, 0.03 if place == "save" else 0.8 * seconds(whole))
            told = kill_one(folder, processes, after, place, number % 2 == 0, rng)
            code = start(folder, processes).wait()
            differs = [name for name, value in digest(folder).items() if wanted.get(name) != value]
            failures += bool(differs or code)
            print(f"  {place:8} {told}; again: exit {code}, {differs or 'all equal'}", flush=True)
    print(f"{failures} of {arguments.kills} differ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

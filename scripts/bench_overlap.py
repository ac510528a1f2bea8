"""What it saves to score a micro-batch while the next is rolled out: seconds an epoch without and with it, in one run.

    python scripts/bench_overlap.py
    python scripts/bench_overlap.py --epochs 5 --delays 0.5 1 2 --json build/overlap.json

The job: Flow-GRPO's rollouts on the embedded world. The reward is that world's verifier, and sleeps besides, as long as
the rollout of one micro-batch takes times each of `delays`. It is asked in three places: a server on this machine
(`flowalign serve`, as a user starts it), a process of its own, and this process. Each epoch is rolled out and scored
twice, without overlap and with it, in turn; the scores of both must be equal to the last bit. `compute` in the place of
a delay stands for a CLIP reward in float32 and no sleep: what there is to gain without anything to wait for.

Per place and delay: medians of the seconds an epoch, their ratio, and the least that any order of the same work takes
with one call at a time: the longer of all rollouts with a last score, and a first rollout with all scores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import yaml
from diffusers.utils import logging as diffusers_logging

from flowalign.models import SD3
from flowalign.records import Media, Prompts, Scores
from flowalign.schedules import AllSteps, linear
from flowalign.shapes import train_prompts
from flowalign.transitions import FlowSDE
from rewards import CLIPScore, ShapesVerifier
from rewards.base import Reward
from rewards.process import OwnProcess, ending
from rewards.remote import RemoteReward
from trainers import FlowGRPO, Sampling
from trainers.state import State

HERE = "bench_overlap"  # this module, as the other processes import it
PLACES = ("server", "process", "here")


class Dawdling(ShapesVerifier):
    """The verifier, which takes so many seconds more for each call."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(strict_weight=0.3)
        self.seconds = seconds

    def score(self, media: Media, prompts: Prompts) -> Scores:
        time.sleep(self.seconds)
        return super().score(media, prompts)


@dataclass(frozen=True)
class Found:
    """Medians of seconds: an epoch's rollouts and scores one after another, and overlapped; a rollout, and a score."""

    place: str
    delay: str
    calls: int
    apart: float
    overlapped: float
    rollout: float
    score: float
    batches: int

    @property
    def least(self) -> float:
        """What one call at a time and one rollout at a time cannot go below."""
        return max(self.batches * self.rollout + self.score, self.rollout + self.batches * self.score)


def trainer(reward: Reward, folder: str, groups: int) -> FlowGRPO:
    """Micro-batches of 16 pictures."""
    plan = AllSteps(FlowSDE(0.7))
    sampling = Sampling(plan, groups, group_size=8, batch_size=16, rows_per_call=16, steps=6, guidance_scale=1.0)
    prompts = train_prompts(count=256)
    return FlowGRPO(SD3("shapes", max_sequence_length=0, grid=linear), reward, prompts, sampling, folder=folder)


@contextmanager
def served(named: dict[str, object], folder: Path) -> Iterator[str]:
    """The url of `flowalign serve` with this reward."""
    config = folder / "reward.yaml"
    config.write_text(yaml.safe_dump(named))
    scripts = Path(__file__).parent
    options = ["--port", "0", "--allow-code", "--concurrency", "8"]
    command = [sys.executable, "-m", "flowalign", "serve", str(config), *options]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{scripts.parent}{os.pathsep}{scripts}"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().split()[-1]
    finally:
        server.terminate()
        server.wait()


@contextmanager
def placed(place: str, named: dict[str, object], folder: Path, in_flight: int) -> Iterator[Reward]:
    """The reward where it is to be asked."""
    if place == "server":
        with served(named, folder) as url:
            yield RemoteReward(url, exact=True, in_flight=in_flight)
    elif place == "process":
        with ending(reward := OwnProcess(named)):
            yield reward
    else:
        made = CLIPScore("shapes") if "CLIPScore" in str(named["class"]) else Dawdling(float(str(named["seconds"])))
        yield made


def seconds_of(job: FlowGRPO, number: int, overlap: int) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Of rolling out and scoring an epoch, its scores, and the seconds of its phases."""
    job.sampling, job.state = replace(job.sampling, overlap=overlap), State()
    job.model.meter.take()
    started = time.perf_counter()
    parts = job.fill(job.collection.epoch(number), None)
    return time.perf_counter() - started, torch.cat([part.scores.total for part in parts]), job.state.seconds


def measure(job: FlowGRPO, place: str, delay: str, calls: int, epochs: int) -> Found:
    """Epochs without and with overlap in turn, after one to warm up."""
    times, phases = {0: list[float](), 1: list[float]()}, list[dict[str, float]]()
    batches = job.collection.micro_batches(job.collection.epoch(0))
    for number in range(epochs + 1):
        spent = {on: seconds_of(job, number, on * max(calls, 1)) for on in ((0, 1) if number % 2 else (1, 0))}
        if not torch.equal(spent[0][1], spent[1][1]):
            raise SystemExit(f"{place}, {delay}: the scores differ")
        if number:
            phases.append(spent[0][2])
            for on in (0, 1):
                times[on].append(spent[on][0])
    rollout = statistics.median(one["rollout"] + one["decode"] for one in phases) / batches
    score = statistics.median(one["reward"] for one in phases) / batches
    apart, overlapped = (statistics.median(times[on]) for on in (0, 1))
    return Found(place, delay, calls, apart, overlapped, rollout, score, batches)


def cases(delays: Sequence[str], rollout: float) -> Iterator[tuple[str, dict[str, object]]]:
    """Each delay, as it is told, and the reward."""
    for delay in delays:
        if delay == "compute":
            yield delay, {"class": "rewards.CLIPScore", "model": "shapes"}
        else:
            yield f"{float(delay):g} rollouts", {"class": f"{HERE}.Dawdling", "seconds": float(delay) * rollout}


def show(found: Found) -> str:
    ratio = found.overlapped / found.apart
    return (
        f"{found.place:8}{found.delay:14}{found.calls:6d}{found.rollout:9.3f}{found.score:8.3f}{found.apart:9.3f}"
        f"{found.overlapped:12.3f}{ratio:7.2f}{found.least / found.apart:8.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="timed, each twice")
    parser.add_argument("--groups", type=int, default=16, help="of 8 samples in an epoch; two are a micro-batch")
    parser.add_argument("--delays", nargs="+", default=["0.5", "1", "2", "compute"], help="in rollouts, or compute")
    parser.add_argument("--places", nargs="+", default=list(PLACES), choices=PLACES)
    parser.add_argument("--in-flight", type=int, default=1, help="calls of the server at once")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    diffusers_logging.disable_progress_bar()
    found = list[Found]()
    with tempfile.TemporaryDirectory() as folder:
        job = trainer(Dawdling(), folder, arguments.groups)
        rollout = measure(job, "here", "0", 1, 1).rollout
        print("place   delay          calls  rollout   score    apart  overlapped  ratio   least")
        for delay, named in cases(arguments.delays, rollout):
            for place in arguments.places:
                with placed(place, named, Path(folder), arguments.in_flight) as reward:
                    job.reward = job.collection.reward = reward
                    calls = arguments.in_flight if place == "server" else 1
                    found.append(measure(job, place, delay, calls, arguments.epochs))
                print(show(found[-1]), flush=True)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps([asdict(one) for one in found], indent=1))


if __name__ == "__main__":
    main()

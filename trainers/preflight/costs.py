"""What the whole run will take: seconds from the trial's measurements, bytes from shapes."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from flowalign import checkpoint
from flowalign.pictures import to_bytes, zipped
from flowalign.videos import mp4
from trainers.long_prompts import GLANCED_AT
from trainers.preflight.geometry import Geometry
from trainers.preflight.trial import Encoding, Judging, Learning, Rollouts
from trainers.state import State

if TYPE_CHECKING:
    from trainers.base import Trainer


class Phases(NamedTuple):
    """Seconds of an epoch; of the rewards those that are not made beside the rollouts."""

    rollout: float
    decode: float
    reward: float
    update: float


@dataclass(frozen=True)
class Trial:
    """All that the tiny step has shown. peak: bytes, the most that was in use."""

    rollouts: Rollouts
    learning: Learning
    judging: Judging | None
    encoding: Encoding
    saving: Saving
    peak: int


@dataclass(frozen=True)
class Saving:
    """One checkpoint without rollouts: seconds, and bytes with the moments that the optimizer does not have yet."""

    seconds: float
    size: int


@dataclass(frozen=True)
class Times:
    """Seconds of an epoch by phase, the mean over the run's first epochs, and of what comes beside the epochs."""

    rollout: float
    decode: float
    reward: float
    update: float
    evaluation: float
    evaluations: int
    checkpoint: float
    checkpoints: int
    encoding: float
    epochs: int

    @property
    def epoch(self) -> float:
        """All phases of an epoch."""
        return self.rollout + self.decode + self.reward + self.update

    @property
    def run(self) -> float:
        """The whole run."""
        beside = self.evaluations * self.evaluation + self.checkpoints * self.checkpoint + self.encoding
        return self.epochs * self.epoch + beside


@dataclass(frozen=True)
class Space:
    """Bytes of a run: of the device's memory, of the host's, and of the disk.

    peak: the trial's. moments: of the optimizer. rollouts: an epoch's, as this process keeps them. embeddings: of all
    prompts the run will have encoded. pictures: of an evaluation, on the host. checkpoint: the largest one.
    memory, disk: all in all; limit, free: what there is. stored: embeddings in a folder of the model's own, which has
    room for stored_free more.
    """

    peak: int
    moments: int
    rollouts: int
    embeddings: int
    pictures: int
    memory: int
    limit: int
    checkpoint: int
    kept: int
    evaluations: int
    disk: int
    free: int
    stored: int = 0
    stored_free: int = 0


def evaluations(trainer: Trainer) -> int:
    """How many the run makes, the one before the first epoch and the one at the end among them."""
    if not trainer.evaluates():
        return 0
    every = trainer.evaluation.every
    return 1 + trainer.epochs // every + (trainer.epochs % every > 0)


def times(trainer: Trainer, cut: Geometry, trial: Trial) -> Times:
    """An estimate; of the busiest process where there are several."""
    phases = trainer.preflight().phases(cut, trial)
    groups = len(cut.shares)
    judged, evaluation = evaluations(trainer), _evaluation_seconds(trainer, trial.judging, groups)
    evaluation += trainer.preflight().judged_beside(trial, groups)
    saves = judged + _saves(trainer, trainer.epochs * sum(phases))
    encoding = _prompts_encoded(trainer) * trial.encoding.seconds
    return Times(*phases, evaluation, judged, trial.saving.seconds, saves, encoding, trainer.epochs)


def _evaluation_seconds(trainer: Trainer, judging: Judging | None, processes: int) -> float:
    evaluator = trainer.evaluator
    if judging is None or evaluator.prompts is None:
        return 0.0
    calls = -(-len(evaluator.prompts) // evaluator.rows)
    held = min(-(-calls // processes) * evaluator.rows, len(evaluator.prompts))
    sigmas = trainer.model.sigmas(evaluator.steps)[:-1]
    rows = held * sum(trainer.model.calls(evaluator.guidance_scale, sigma) for sigma in sigmas)
    return rows * judging.seconds_per_row + held * judging.seconds_per_picture


def _saves(trainer: Trainer, seconds: float) -> int:
    """Checkpoints by count and by time, about."""
    settings = trainer.checkpoints
    by_count = trainer.epochs * trainer.updates_per_epoch // settings.every if settings.every else 0
    by_time = int(seconds / (60 * settings.minutes)) if settings.minutes else 0
    return max(by_count, by_time) + 1


def _prompts_encoded(trainer: Trainer) -> int:
    """Different prompts that the run encodes, those of the evaluation among them; each once, if all can be kept."""
    drawn, total = trainer.epochs * trainer.sampling.groups, len(trainer.prompts)
    if drawn >= total:
        some = trainer.prompts.some(GLANCED_AT)
        drawn = round(len(set(some.text)) / len(some) * total)
    held_out = trainer.evaluator.prompts
    return drawn + (len(set(held_out.text)) if held_out is not None else 0)


def save_once(trainer: Trainer, folder: Path) -> Saving:
    """Write a checkpoint of the trainer as it is into a temporary folder in `folder`; the run folder is left alone."""
    state = State()
    trainer.optimizer.capture(state)
    shared, own = state.trees()

    def policy(at: Path) -> None:
        trainer.model.save(at / "lora")

    with tempfile.TemporaryDirectory(prefix=".check-", dir=folder) as temporary:
        started = time.perf_counter()
        path = checkpoint.save(Path(temporary), "step-00000000", shared, own, policy, lambda: {"step-00000000"})
        seconds = time.perf_counter() - started
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Saving(seconds, size + moments(trainer))


def moments(trainer: Trainer) -> int:
    """Bytes of AdamW's two moments."""
    each = 1 if trainer.optimizer.settings.eight_bit else 4
    return 2 * each * sum(value.numel() for value in trainer.model.trainable().values())


def space(trainer: Trainer, cut: Geometry, trial: Trial) -> Space:
    """Upper bounds, but for the peak, which was measured, and the pictures' files, whose first ones were."""
    held = trainer.preflight().kept_bytes(cut)
    kept_already = sum(step.latents.nbytes + step.latents_next.nbytes for step in trial.rollouts.batch.steps)
    whole, folder = _prompts_encoded(trainer) * trial.encoding.size, trainer.model.embeddings_folder
    embeddings = int(min(whole, trainer.model.embeddings_limit))
    prompts = trainer.evaluator.prompts
    count = len(prompts) if prompts is not None else 0
    pictures = count * trial.rollouts.pixels[0].numel()  # in 8 bits
    on_device = trial.peak + moments(trainer) + max(held - kept_already, 0)
    memory = on_device if trainer.model.device.type == "cuda" else on_device + embeddings + pictures
    largest = trial.saving.size + held * cut.processes
    kept = (trainer.checkpoints.keep + 2) * largest  # the best policy's, and the one being written
    files = _evaluation_files(trainer, trial, count)
    free = shutil.disk_usage(existing(trainer.folder)).free
    return Space(
        trial.peak, moments(trainer), held, embeddings, pictures, memory, memory_limit(trainer.model.device),
        largest, kept, files, kept + files, free,
        0 if folder is None else whole, 0 if folder is None else shutil.disk_usage(folder).free,
    )  # fmt: skip


def _evaluation_files(trainer: Trainer, trial: Trial, count: int) -> int:
    """The pictures and videos of three evaluations and the one being written, and each evaluation's sheet."""
    if not count:
        return 0
    shown, fps, pixels = trainer.evaluation.pictures, trainer.model.fps, trial.rollouts.pixels
    film = 0 if fps is None or not shown else len(mp4(trial.rollouts.medium, fps))
    whole = shown if fps is None else count  # strips of videos are all kept as they are
    large, small = (len(zipped(to_bytes(pixels), number)) / len(pixels) for number in (len(pixels), 0))
    each = min(whole, count) * large + max(count - whole, 0) * small
    return int(4 * (each + min(shown, count) * film) + evaluations(trainer) * shown * large)


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def memory_limit(device: torch.device) -> int:
    """Bytes of the device's memory; 0 where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if sys.platform == "win32":
        return 0
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup/memory.max")  # a container's own
    told = group.read_text().strip() if group.is_file() else "max"
    return total if told == "max" else min(total, int(told))

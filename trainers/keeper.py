"""Keeping a run: checkpoints at safe points, stopping on a signal, and going on from the newest that verifies."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowalign import checkpoint
from flowalign.accounting import Rows
from flowalign.config import load_yaml
from flowalign.distributed import gather_text, is_first, largest, on_main, rank, sum_over_data
from flowalign.interrupt import Stopped
from flowalign.progress import Progress
from flowalign.tracking import Run, write_atomically
from trainers.alarms import GO_ON, over
from trainers.facts import changed, facts, refusal
from trainers.state import State

if TYPE_CHECKING:
    from trainers.base import Trainer

MARKER = "PREEMPTED"  # in the run folder, for a job script: the run was told to stop and can go on

# Of the record, what optimizer steps change
UPDATED = ("policy", "average", "moments", "steps", "scaler", "skipped", "older", "kl_coef")


@dataclass(frozen=True)
class Checkpoints:
    """When to save all that a run has become, so that the same command goes on from there.

    every: optimizer steps between two; 0 for none by count.
    minutes: a checkpoint is due when the last is older, also amid the rollouts of an epoch; 0 for none by time.
    keep: how many of the newest stay, besides that of the best policy.

    Each evaluation, a stop and the end save too.
    """

    every: int = 0
    minutes: float = 10.0
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every < 0 or self.minutes < 0 or self.keep < 1:
            raise ValueError(
                f"checkpoints.every and checkpoints.minutes must be at least 0 and checkpoints.keep at least 1; "
                f"got {self.every}, {self.minutes} and {self.keep}"
            )


class Keeper:
    """Saves and restores a trainer's record in its run folder; every method is called by all processes together."""

    def __init__(self, trainer: Trainer, run: Run, config: Mapping[str, Any] | None, settings: Checkpoints) -> None:
        self.trainer, self.run, self.config, self.settings = trainer, run, config, settings
        self.folder = run.folder / "checkpoints"
        self.facts = facts(trainer, config)  # once: a file of prompts is read for it
        self.progress = Progress(trainer.epochs)
        self._broken: set[str] = set()  # and those of settings that have been changed
        self._published = ""
        self._place: tuple[int, int] | None = None  # of the last save
        self._saved = time.monotonic()

    def poll(self, what: str = "", done: int = 0, total: int = 0, settle: Callable[[], None] | None = None) -> None:
        """A safe point: stop if a signal asked any process to, save if a checkpoint is due; show how far a phase is.

        Args:
            settle: called before anything is saved, for what is still under way to come into the record.
        """
        if what:
            self.progress.within(what, done, total)
        late = self.settings.minutes > 0 and time.monotonic() - self._saved > 60 * self.settings.minutes
        asked, due = largest([self.trainer.stop.asked, rank() == 0 and (late or self._at_interval())])
        if settle is not None and (asked or due):
            settle()
        if asked:
            self.stop()
        if due:
            self.save()

    def asked(self, what: str, done: int, total: int) -> bool:
        """Show how far a phase is; whether a signal asked any process to stop."""
        self.progress.within(what, done, total)
        return largest([self.trainer.stop.asked])[0] > 0

    def stop(self) -> None:
        """Save and leave. Raises: Stopped."""
        number = int(largest([self.trainer.stop.asked])[0])
        path, name = self.save(), signal.Signals(number).name
        message = f"stopped by {name}; all is saved in {path}; run the same command again to go on"
        self.run.note("stop", message)
        if number != signal.SIGINT:
            on_main(lambda: write_atomically(self.run.folder / MARKER, f"{name}\n".encode()))
        raise Stopped(number, message)

    def _at_interval(self) -> bool:
        state = self.trainer.state
        done = state.epoch * self.trainer.updates_per_epoch + state.part
        between = state.part > 0 or not state.buffer
        due = self.settings.every > 0 and between and done > 0 and done % self.settings.every == 0
        return due and self._place != (state.epoch, state.part)

    def save(self) -> Path:
        """Write a checkpoint of the present record; returns its path."""
        trainer, state = self.trainer, self.trainer.state
        with trainer.model.meter.phase("checkpoint"):
            trainer.optimizer.capture(state)
            state.normalisers = {name: one.state_dict() for name, one in trainer.normalisers.items()}
            state.logs, state.clock = self.run.written(), self.run.seconds
            shared, own = state.trees(is_first())
            name, shared = self.name(), shared | {"facts": self.facts}
            anew = name in self._broken
            self._broken.discard(name)
            if anew:
                self._published = ""
            path = checkpoint.save(self.folder, name, shared, own, self._policy_writer(), self._kept, anew)
        self._saved, self._place = time.monotonic(), (state.epoch, state.part)
        on_main(self._publish)
        return path

    def _policy_writer(self) -> Callable[[Path], None]:
        """What writes the averaged policy into a folder, on the first process; all ask for it together."""
        model, averaged = self.trainer.model, self.trainer.optimizer.averaged
        with averaged():
            write = model.export()

        def written(folder: Path) -> None:
            with averaged():
                write(folder / model.policy_folder)

        return written

    def name(self) -> str:
        """Of a checkpoint of the present record: one for each place in a run, in the order of the run."""
        state = self.trainer.state
        held = torch.tensor([len(state.buffer)])
        sum_over_data([held])
        name = f"step-{state.epoch * self.trainer.updates_per_epoch + state.part:08d}"
        if int(held) and not state.part:
            return f"{name}-rollout-{int(held):06d}"
        if not state.part and state.history and state.history[-1]["epoch"] == state.epoch:
            return f"{name}-evaluated"
        calibrated = 0 if state.epoch or state.part else len(state.noise.get("rounds", ()))
        return f"{name}-calibration-{calibrated:06d}" if calibrated else name

    def _kept(self) -> set[str]:
        return {*self._good()[-self.settings.keep :], self.trainer.state.best_checkpoint}

    def _good(self) -> list[str]:
        return [name for name in checkpoint.names(self.folder) if name not in self._broken]

    def _publish(self) -> None:
        """Leave the best policy, or the newest where none is evaluated, in the run's folder, if it is whole."""
        good, own = self._good(), self.trainer.model.policy_folder
        name = self.trainer.state.best_checkpoint or (good[-1] if good else "")
        if name == self._published or name not in checkpoint.names(self.folder):
            return
        self._published = name
        problem = checkpoint.verify(self.folder / name, own)
        if problem is not None:
            self.tell("skip", f"{self.folder / name}: {problem}; {self.run.folder / own} is not made of it")
            return
        (self.run.folder / own).mkdir(exist_ok=True)
        for file in (self.folder / name / own).iterdir():
            write_atomically(self.run.folder / own / file.name, file.read_bytes())
        if self.trainer.state.best is not None:
            told = {"epoch": self.trainer.state.best_epoch, "held-out": self.trainer.state.best}
            write_atomically(self.run.folder / "best.json", json.dumps(told).encode())

    def resume(self, allow_change: Sequence[str]) -> None:
        """Put the trainer where the newest checkpoint that verifies was; without any checkpoint, at the start.

        Raises: ValueError where none verifies, where it is of a newer format, or of a run with another config.
        """
        found: list[Path] = []

        def look() -> None:
            checkpoint.sweep(self.folder)
            path, problems = checkpoint.newest(self.folder)
            for problem in problems:
                self.tell("skip", f"skipped {problem}")
            if path is None:
                self._check_nothing_is_lost(problems)
            self._broken = {name for name in checkpoint.names(self.folder) if path is not None and name > path.name}
            found.extend([path] if path is not None else [])

        on_main(look)
        name = gather_text(str(found[0]) if found else "")[0]
        if name:
            self._restore(Path(name), allow_change)
        else:
            self._check_config(self._known_config(), allow_change)
            self.run.rewind({}, 0.0)
        if self.config is not None:
            self.run.configure(self.config)
        if rank() == 0:
            (self.run.folder / MARKER).unlink(missing_ok=True)
        self.progress = Progress(self.trainer.epochs, done=min(self.trainer.state.epoch, self.trainer.epochs))

    def _check_nothing_is_lost(self, problems: Sequence[str]) -> None:
        """A run that had a checkpoint, and has none that can be read, is not started anew over what it wrote."""
        anew = "move the run's folder away to start anew"
        if problems:
            raise ValueError(f"no checkpoint in {self.folder} can be read ({'; '.join(problems)}); {anew}")
        if (self.run.folder / self.trainer.model.policy_folder).exists():
            raise ValueError(f"{self.run.folder} holds a run whose {self.folder.name}/ has gone; {anew}")
        if (self.run.folder / "metrics.jsonl").stat().st_size:
            self.tell("resume", f"{self.run.folder} was stopped before its first checkpoint: it starts anew")

    def _known_config(self) -> Mapping[str, Any]:
        """The config of a run that was stopped before its first checkpoint."""
        path = self.run.folder / "config.yaml"
        return {"config": load_yaml(path)} if path.is_file() else {}

    def _restore(self, path: Path, allow_change: Sequence[str]) -> None:
        trainer = self.trainer
        shared, own = checkpoint.load(path)
        names = self._check_config(shared.pop("facts"), allow_change)
        epoch = trainer.epoch_of(shared["epoch"], shared.get("rounds", ()))
        shared = trainer.optimizer.placed(shared)
        state = State.from_trees(shared, own, trainer.mine(epoch), rank() == 0, trainer.model.device)
        if names and state.part:
            raise ValueError(
                f"{self.run.folder} was stopped between two optimizer steps of an epoch, whose rollouts were made with "
                f"the old {names[0]}: let that epoch end with the old settings first (--epochs {state.epoch + 1})"
            )
        if names:  # rollouts that were made with other settings
            state.buffer, state.rounds, state.rows, state.seconds = {}, [], Rows(), {}
        trainer.state = state
        trainer.optimizer.restore(state)
        for name, normaliser in trainer.normalisers.items():
            if name in state.normalisers:  # else it has come with a changed reward, and starts here
                normaliser.load_state_dict(state.normalisers[name])
        self.run.rewind(state.logs, state.clock)
        self._saved, self._place = time.monotonic(), (state.epoch, state.part)
        if names:
            first = self.name()
            self._broken |= {name for name in checkpoint.names(self.folder) if name >= first}
        on_main(self._publish)
        if state.epoch >= trainer.epochs and not state.part:
            self.tell("resume", f"{self.run.folder} has finished its {trainer.epochs} epochs; more --epochs go on")
        elif over(trainer.evaluation.watch, state.history):
            self.tell("resume", f"{self.run.folder} was ended by its watch; {GO_ON}")
        else:
            self.tell("resume", f"going on from {path}, epoch {state.epoch} of {trainer.epochs}")

    def roll_back(self) -> None:
        """Put the policy and all that its updates go by where they were at the best evaluation; epochs and logs stay.

        Raises: ValueError where that checkpoint cannot be read.
        """
        trainer, state = self.trainer, self.trainer.state
        path = self.folder / state.best_checkpoint
        if problem := checkpoint.verify(path):
            raise ValueError(f"{path} cannot be rolled back to: {problem}")
        shared, _ = checkpoint.load(path)
        shared = trainer.optimizer.placed(shared)
        for name in UPDATED:
            setattr(state, name, shared[name])
        trainer.optimizer.restore(state)
        for name in trainer.normalisers.keys() & shared["normalisers"].keys():  # one may have come to the reward since
            trainer.normalisers[name].load_state_dict(shared["normalisers"][name])

    def _check_config(self, known: Mapping[str, Any], allow_change: Sequence[str]) -> list[str]:
        """The keys that have changed, all of them allowed to."""
        names = changed(known, self.facts)
        problem = refusal(self.run.folder, names, allow_change)
        if problem is not None:
            raise ValueError(problem)
        return names

    def tell(self, event: str, message: str) -> None:
        self.run.note(event, message)
        if rank() == 0:
            print(f"flowalign: {message}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """The run's last checkpoint."""
        name = self.name()
        missing = rank() == 0 and name not in checkpoint.names(self.folder)
        if largest([missing])[0]:  # of the first process's view of the disk
            self.save()
        self.run.note("finish", f"{self.trainer.state.epoch} epochs")

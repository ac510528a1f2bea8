"""`flowalign train` of a reward: preferences in a file, a run folder out, resumable epoch by epoch."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowalign import checkpoint
from flowalign.distributed import world_size
from flowalign.interrupt import Stopped, StopRequest
from flowalign.progress import Progress
from flowalign.randomness import key_generator
from flowalign.tracking import Run, TrackerName, json_lines, write_atomically
from rewards.preference import LearntReward, Pair, load_pairs
from trainers.facts import refusal
from trainers.last_two import LastTwo
from trainers.reward_model import Fitting, Report, RewardFit, agreement, decided, outcomes

FREE = ("folder", "log_with")


class RewardModel:
    """A CLIP-type reward from preferences (`trainers.reward_model`); the result is `rewards.LearntReward` of `reward/`.

    Args:
        model: a folder or hub id of a CLIPModel, or "shapes", to start from.
        pairs: a JSON Lines file of {"prompt", "first", "second", "label"}, see `rewards.preference.load_pairs`.
        held_out: another one, to look at only; without it `share` of the prompts of `pairs` is held out.
        share: in (0, 1); pairs of one prompt are never divided.
        fit: see `RewardFit`.
        hidden, scale: of the head, see `rewards.LearntReward`.
        folder: where the run is written: `reward/`, `report.json`, a line of `metrics.jsonl` each epoch, and the last
            two checkpoints, each of three times the weights (as the optimizer has two moments of each).

    Raises: ValueError for files that are no preferences, and on more than one process.
    """

    def __init__(
        self,
        model: str,
        pairs: str,
        held_out: str | None = None,
        share: float = 0.1,
        fit: RewardFit = RewardFit(),
        hidden: int = 0,
        scale: float = 10.0,
        device: str | None = None,
        batch_size: int = 32,
        folder: str = "runs/reward_model",
        log_with: tuple[TrackerName, ...] = (),
    ) -> None:
        if not 0 < share < 1:
            raise ValueError(f"share must lie between 0 and 1, got {share}")
        if world_size() > 1:
            raise ValueError("a reward is trained by one process; start it without a launcher")
        self.settings, self.folder, self.log_with = fit, Path(folder), log_with
        known = load_pairs(Path(pairs))
        self.pairs, self.held_out = divide(known, share) if held_out is None else (known, load_pairs(Path(held_out)))
        decided(self.pairs, self.held_out)
        self.reward = LearntReward(model, hidden, scale, device, batch_size)
        self.checkpoints = LastTwo(self.folder / "checkpoints")

    def train(
        self, config: Mapping[str, Any] | None = None, *, resume: bool = False, allow_change: Sequence[str] = ()
    ) -> Report:
        """Run all epochs, or those that a stopped run in the same folder has left; returns what training gave.

        Raises: Stopped where a signal asked for it, the last whole epoch being saved; ValueError for another run.
        """
        with StopRequest() as stop, Run(self.folder, resume=resume, log_with=self.log_with) as run:
            before = agreement(*outcomes(self.reward, decided(self.pairs, self.held_out)))
            with Fitting(self.reward, self.pairs, self.settings) as fitting:
                self._resume(run, fitting, config, allow_change)
                done = len(fitting.losses)
                progress = Progress(fitting.steps, done=fitting.schedule.last_epoch)
                while done < self.settings.epochs:
                    fitting.run_epoch(progress)
                    done = len(fitting.losses)
                    run.log(done, {"loss": fitting.losses[-1]})
                    if stop.asked or done == self.settings.epochs or run.seconds - self._saved > 600:
                        self._save(run, fitting, config)
                    if stop.asked and done < self.settings.epochs:
                        name = signal.Signals(stop.asked).name
                        told = f"stopped by {name} after epoch {done}; run the same command again to go on"
                        raise Stopped(stop.asked, f"{told} from {self.checkpoints.folder}")
                progress.close()
            report = fitting.report(before, self.held_out)
            self._publish(report)
        print(f"held-out agreement {report.before:.3f} -> {report.after:.3f} ({report.pairs} pairs)", file=sys.stderr)
        return report

    def _save(self, run: Run, fitting: Fitting, config: Mapping[str, Any] | None) -> None:
        logs, seconds = run.written(), run.seconds
        told = {"fitting": fitting.state(), "logs": logs, "clock": seconds, "config": config}
        self.checkpoints.save(f"step-{len(fitting.losses):08d}", told)
        self._saved = seconds

    def _resume(
        self, run: Run, fitting: Fitting, config: Mapping[str, Any] | None, allow_change: Sequence[str]
    ) -> None:
        """Put the fitting where the newest checkpoint that verifies is, if there is one."""
        path, problems = self.checkpoints.newest(run)
        if path is None and problems:
            where, why = self.checkpoints.folder, "; ".join(problems)
            raise ValueError(f"no checkpoint in {where} can be read ({why}); move {self.folder} away")
        known: dict[str, Any] = checkpoint.load(path)[0] if path is not None else {"logs": {}, "clock": 0.0}
        if config is not None and known.get("config") is not None:
            plain = json.loads(json.dumps(config))
            names = [n for n in checkpoint.told_apart(known["config"], plain) if n.split(".")[0] not in FREE]
            problem = refusal(self.folder, names, allow_change)
            if problem is not None:
                raise ValueError(problem)
        if config is not None:
            run.configure(config)
        run.rewind(known["logs"], known["clock"])
        self._saved = run.seconds
        if "fitting" in known:
            fitting.load(known["fitting"])

    def _publish(self, report: Report) -> None:
        """Leave the trained reward in `reward/`, where none is yet, and its numbers in `report.json`."""
        making, made = self.folder / ".making-reward", self.folder / "reward"
        if not made.exists():
            shutil.rmtree(making, ignore_errors=True)  # of a kill
            self.reward.save(making)
            making.rename(made)
        write_atomically(self.folder / "report.json", json_lines([asdict(report)]))


def divide(pairs: Sequence[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and about `share` of the prompts' to hold out, by a draw that does not depend on their order.

    Raises: ValueError for a single prompt.
    """
    prompts = sorted({pair.prompt for pair in pairs})
    if len(prompts) < 2:
        raise ValueError(f"{len(prompts)} prompts cannot be divided; name other pairs as held_out")
    count = min(max(round(share * len(prompts)), 1), len(prompts) - 1)
    chosen = {prompts[i] for i in key_generator(0, "reward_held_out").permutation(len(prompts))[:count]}
    return [pair for pair in pairs if pair.prompt not in chosen], [pair for pair in pairs if pair.prompt in chosen]

"""A search's folder: what each prompt has come to, written as it ends, and what is under way, to go on with.

config.yaml, environment.json   as of every run
results.jsonl                   a line for each prompt that has ended, in the order they did
0000.png, 0000-before.png       a prompt's best sample, and its plain one; of videos strips of frames, with MP4s
noise/0000.safetensors          what the best was made from (`Search.remake`)
before_after.png                the first prompts, with the best so far; rewritten now and then
summary.json                    at the end: means, costs, and the prompts without a valid sample
metrics.jsonl, events.jsonl     a line each call; what happened
checkpoints/                    the last two states; what a kill loses after the last is made again, bit by bit
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from flowalign import checkpoint
from flowalign.config import load_yaml
from flowalign.interrupt import Stopped, StopRequest
from flowalign.progress import Progress
from flowalign.tracking import Run, json_lines, write_atomically
from flowalign.videos import check_writable, mp4
from trainers.facts import under
from trainers.keeper import MARKER
from trainers.last_two import LastTwo
from trainers.search_sheet import SHOWN, png, sheet, strip
from trainers.search_state import Candidate, Found, SearchState

if TYPE_CHECKING:
    from trainers.search import Search

FREE = ("folder", "save_seconds")  # may be another when a search goes on
SHEET_SECONDS = 20.0  # between two sheets; drawing one takes about a tenth of one


def run(search: Search, config: Mapping[str, Any] | None = None) -> Path:
    """See `Search.run`."""
    if search.model.fps is not None:
        check_writable()
    with StopRequest() as stop, Run(search.folder, resume=True) as held:
        record = Record(search, held, config)
        state = record.resume()
        progress = Progress(len(search.prompts), done=state.finished)
        for found in search.rounds(state):
            for one in found:
                record.write(one)
                progress.update(one.tried, record.shown())
            record.keep(state, bool(found))
            progress.within("try", max((line.tried for line in state.open), default=state.most), state.most)
            if stop.asked and state.finished < len(search.prompts):
                record.stop(state, stop.asked)
        progress.close()
        record.finish(state)
    return search.folder


class Record:
    """Writes a search's folder, and reads back where it has stopped."""

    def __init__(self, search: Search, run: Run, config: Mapping[str, Any] | None) -> None:
        self.search, self.run, self.config = search, run, config
        self.checkpoints, self.results = LastTwo(run.folder / "checkpoints"), run.folder / "results.jsonl"
        self.rows: list[dict[str, Any]] = []
        self._saved = self._drawn = time.monotonic()

    def resume(self) -> SearchState:
        """The state of the newest checkpoint that verifies, or an empty one, which is saved at once.

        Raises: ValueError for a folder of another search, and where no checkpoint can be read.
        """
        self._check_config()
        path, problems = self.checkpoints.newest(self.run)
        lost = "; ".join(problems) or ("none is there" if self.results.exists() else "")
        if path is None and lost:
            raise ValueError(f"{self.run.folder} holds results but no checkpoint ({lost}); name another folder")
        new: dict[str, Any] = {"logs": {}, "clock": 0.0, "results": 0}
        known: dict[str, Any] = checkpoint.load(path)[0] if path is not None else new
        if "facts" in known:
            self._refuse(checkpoint.told_apart(known["facts"], self._facts()))
        state = SearchState.from_tree(known["state"]) if path is not None else self.search.start()
        self.run.rewind(known["logs"], known["clock"])
        with self.results.open("ab") as file:
            file.truncate(known["results"])
        self.rows = [json.loads(line) for line in self.results.read_text().splitlines()]
        if self.config is not None:
            self.run.configure(self.config)
        (self.run.folder / MARKER).unlink(missing_ok=True)
        if path is None:
            self._save(state)
        self.run.note("start", f"{state.finished} of {len(self.search.prompts)} prompts are done")
        return state

    def _facts(self) -> dict[str, Any]:
        """What makes a search another one, for those that have no config too."""
        search = self.search
        own = {"search": type(search).__name__, "prompts": search.prompts.fingerprint(), "tries": search.tries}
        own |= {"batch_size": search.batch_size, "budget": search.budget, "prices": repr(search.prices)}
        own |= {"seed": search.sampler.seed, "guidance_scale": search.sampler.policy.guidance_scale}
        own |= {"steps": repr(search.sampler.path), "recompute": search.sampler.recompute}
        return dict(json.loads(json.dumps(own | dict(search.settings()))))

    def _check_config(self) -> None:
        file = self.run.folder / "config.yaml"
        if self.config is None or not file.is_file():
            return
        known = load_yaml(file)
        if "search" not in known:
            raise ValueError(f"{self.run.folder} holds a run that is no search; name another folder")
        self._refuse(checkpoint.told_apart(known, json.loads(json.dumps(self.config))))

    def _refuse(self, names: Any) -> None:
        changed = [name for name in names if not under(name, FREE)]
        if changed:
            told = "search" if "search" in changed else ", ".join(changed)
            raise ValueError(f"{self.run.folder} holds a search with another {told}; name another folder")

    def write(self, found: Found) -> None:
        """Files of a prompt that has ended, then its line of the results."""
        folder, name = self.run.folder, f"{found.number:04d}"
        if found.best is not None:
            self._write_media(name, found.best)
            (folder / "noise").mkdir(exist_ok=True)
            write_atomically(folder / "noise" / f"{name}.safetensors", save({"noise": found.best.noise.contiguous()}))
        if found.first is not None:
            self._write_media(f"{name}-before", found.first)
        self.rows.append(self._row(found, name))
        with self.results.open("ab") as file:
            file.write(json_lines(self.rows[-1:]))
            file.flush()
            os.fsync(file.fileno())

    def _write_media(self, name: str, candidate: Candidate) -> None:
        write_atomically(self.run.folder / f"{name}.png", png(strip(candidate.media)))
        if self.search.model.fps is not None:
            write_atomically(self.run.folder / f"{name}.mp4", mp4(candidate.media, self.search.model.fps))

    def _row(self, found: Found, name: str) -> dict[str, Any]:
        """A line of the results; what is not known is null."""
        key = self.search.prompts.rows([found.number]).noise_keys([found.number])[0]
        spent, best, first = found.spent, found.best, found.first
        counted = {"network": spent.network, "decodes": spent.decodes, "rewards": spent.rewards}
        rows = {kind: {"forward": one.forward, "gradient": one.gradient} for kind, one in counted.items()}
        return {
            "number": found.number,
            "prompt": found.prompt,
            "score": None if best is None else best.score,
            "before": None if first is None else first.score,
            "parts": None if best is None else _known(best.parts),
            "parts_before": None if first is None else _known(first.parts),
            "best_try": None if best is None else best.number,
            "tried": found.tried,
            "invalid": found.invalid,
            "stopped": found.stopped or None,
            "seed": self.search.sampler.seed,
            "noise_key": key,
            "noise": None if best is None else f"noise/{name}.safetensors",
            "compute": {"cost": round(found.cost, 3), **rows},
            "seconds": round(found.seconds, 3),
        }

    def shown(self) -> dict[str, float | None]:
        """Means of the prompts that have ended, for the progress."""
        return {"before": _mean(self.rows, "before"), "after": _mean(self.rows, "score")}

    def keep(self, state: SearchState, ended: bool) -> None:
        """After a call: log it, save where a prompt has ended or a checkpoint is due, and draw a sheet now and then."""
        bests = [line.best.score for line in state.open if line.best is not None]
        under_way = sum(bests) / len(bests) if bests else None
        self.run.log(state.rounds, {"finished": float(state.finished), "open": under_way} | self.shown())
        now = time.monotonic()
        if ended or now - self._saved >= self.search.save_seconds:
            self._save(state)
        if now - self._drawn >= SHEET_SECONDS:
            self._draw(state)

    def _save(self, state: SearchState) -> None:
        told = {"state": state, "logs": self.run.written(), "clock": self.run.seconds, "facts": self._facts()}
        told["results"] = self.results.stat().st_size
        self.checkpoints.save(f"step-{state.rounds:08d}", told)
        self._saved = time.monotonic()

    def _draw(self, state: SearchState) -> None:
        lines = {line.number: (line.first, line.best) for line in state.open}
        drawn = sheet(self.run.folder, self.search.prompts.text[:SHOWN], self.rows, lines)
        if drawn is not None:
            write_atomically(self.run.folder / "before_after.png", drawn)
        self._drawn = time.monotonic()

    def stop(self, state: SearchState, number: int) -> None:
        """Save and leave. Raises: Stopped."""
        self._save(state)
        self._draw(state)
        name = signal.Signals(number).name
        message = f"stopped by {name}; all is saved in {self.run.folder}; run the same command again to go on"
        self.run.note("stop", message)
        if number != signal.SIGINT:
            write_atomically(self.run.folder / MARKER, f"{name}\n".encode())
        raise Stopped(number, message)

    def finish(self, state: SearchState) -> None:
        """The last sheet and the summary; what had no valid sample is told."""
        self._draw(state)
        without = sorted(row["number"] for row in self.rows if row["score"] is None)
        cut = sorted(row["number"] for row in self.rows if row["invalid"] or "finite" in (row["stopped"] or ""))
        both = [row for row in self.rows if row["score"] is not None and row["before"] is not None]
        told = {
            "prompts": len(self.rows),
            "before": _mean(both, "before"),
            "after": _mean(both, "score"),
            "better": sum(row["score"] > row["before"] for row in both),
            "without_valid_sample": without,
            "with_invalid_samples": cut,
            "cost": round(sum(row["compute"]["cost"] for row in self.rows), 3),
            "prices": {"decode": state.prices.decode, "reward": state.prices.reward},
            "calls": state.rounds,
            "padding": state.padding,
            "seconds": round(self.run.seconds, 3),
        }
        write_atomically(self.run.folder / "summary.json", json.dumps(told, indent=1).encode())
        _tell(told)


def _tell(told: Mapping[str, Any]) -> None:
    if told["before"] is not None:
        print(f"{told['prompts']} prompts: mean score {told['before']:.4f} -> {told['after']:.4f}", file=sys.stderr)
    for name, what in (("without_valid_sample", "no valid sample"), ("with_invalid_samples", "samples left out")):
        if told[name]:
            numbers = ", ".join(map(str, told[name]))
            print(f"{what} (score or gradient not finite) for prompts {numbers}: see results.jsonl", file=sys.stderr)


def _known(parts: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if abs(value) < float("inf") else None for name, value in parts.items()}


def _mean(rows: list[dict[str, Any]], name: str) -> float | None:
    known = [row[name] for row in rows if row[name] is not None]
    return sum(known) / len(known) if known else None

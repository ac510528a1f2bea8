"""The folder of preferences that `flowalign prefer` makes: the best against the worst of N samples.

West-of-N (arXiv:2401.12086) for pictures and videos. The folder:

pairs.jsonl        a line a pair, the better one first, as `flowalign.preferences.Preferences` reads them; "seeds" are
                   [seed, key, sample] of each: its start noise is key_noise(seed, "prefer", key, sample)
media/             its pictures as PNG, its videos as MP4; of other samples nothing is kept
named/             files that the prompts name, by their content
prompts.jsonl      a line for each prompt that has ended, in the order they did: scores of all samples, and counts
sheet.png          the first pairs, the better one left
summary.json       at the end: counts
config.yaml, environment.json, metrics.jsonl, events.jsonl   as of every run
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor

from flowalign import checkpoint
from flowalign.config import dotted_name, load_yaml
from flowalign.interrupt import Stopped, StopRequest
from flowalign.media import FILES, REFERENCES, is_inline
from flowalign.preferences.making import Judged, Maker
from flowalign.preferences.records import Medium, Ranking
from flowalign.preferences.sheet import png, sheet
from flowalign.progress import Progress
from flowalign.prompts.fields import SIZES
from flowalign.tracking import Run, json_lines, write_atomically
from flowalign.videos import check_writable, mp4

PAIRS, PROMPTS, SHEET = "pairs.jsonl", "prompts.jsonl", "sheet.png"
DIGITS = 32  # of a copy's SHA-256, that it is called by
FREE = ("batch_size", "embeddings")  # may be another when the making goes on
OF_PROMPT = ("negative_prompt", "seed", *SIZES)  # stand beside the pair, what else is told of a prompt below


def make_pairs(maker: Maker, folder: Path, config: Mapping[str, Any]) -> Path:
    """Make all pairs, or those that a stopped run in the same folder has left.

    config: tells one making from another, beside prompts and settings; plain data.

    Raises: Stopped where a signal asked for it, each prompt that has ended being saved; ValueError for a folder of
    something else.
    """
    if maker.model.fps is not None:
        check_writable()
    with StopRequest() as stop, Run(folder, resume=True) as run:
        record = Record(maker, run, config)
        progress = Progress(len(maker.prompts), done=len(record.done))
        for call in maker.calls:
            if {*call.rows} <= record.done:
                continue
            made = dict(zip(call.rows, maker.judged(call), strict=True))
            for number in (number for number in call.rows if number not in record.done):
                record.write(number, made[number])
                progress.update(maker.settings.samples, {"pairs": record.counts["pairs"]})
            if stop.asked and len(record.done) < len(maker.prompts):
                record.stop(stop.asked)
        progress.close()
        record.finish()
    return folder / PAIRS


class Record:
    """Writes the folder, and reads back where it has stopped. done: numbers of prompts that have ended."""

    def __init__(self, maker: Maker, run: Run, config: Mapping[str, Any]) -> None:
        self.maker, self.run, self.folder = maker, run, run.folder
        settings = asdict(maker.settings) | {"pairing": dotted_name(maker.settings.pairing)}
        told = {"prefer": settings | {"prompts": maker.prompts.fingerprint()}, **config}
        self._check(json.loads(json.dumps(told)))
        (self.folder / "media").mkdir(exist_ok=True)
        lines = self._read()
        self.done = {line["number"] for line in lines}
        self.counts = {name: sum(line[name] for line in lines) for name in ("pairs", "ties", "invalid")}
        self.empty = sum(line["pairs"] == 0 for line in lines)
        self.run.rewind(self.run.written(), lines[-1]["seconds"] if lines else 0.0)
        self.run.configure(told)
        self.run.note("start", f"{len(self.done)} of {len(maker.prompts)} prompts are done")

    def _check(self, told: Mapping[str, Any]) -> None:
        file = self.folder / "config.yaml"
        if not file.is_file():
            if (self.folder / "metrics.jsonl").stat().st_size:
                raise ValueError(f"{self.folder} holds a run that made no preferences; name another folder")
            return
        known = load_yaml(file)
        if "prefer" not in known:
            raise ValueError(f"{self.folder} holds a run that made no preferences; name another folder")
        changed = [name for name in checkpoint.told_apart(known, told) if name.split(".")[-1] not in FREE]
        if changed:
            raise ValueError(
                f"{self.folder} holds preferences made with another {', '.join(changed)}; name another folder"
            )

    def _read(self) -> list[dict[str, Any]]:
        """The lines of prompts that have ended; what a kill has left behind them is cut off."""
        lines, size = list[dict[str, Any]](), 0
        file = self.folder / PROMPTS
        for line in file.read_bytes().splitlines(keepends=True) if file.is_file() else []:
            if not line.endswith(b"\n"):
                break
            lines.append(json.loads(line))
            size += len(line)
        for name, length in ((PROMPTS, size), (PAIRS, lines[-1]["bytes"] if lines else 0)):
            with (self.folder / name).open("ab") as handle:
                handle.truncate(length)
        return lines

    def write(self, number: int, judged: Judged) -> None:
        """A prompt's media, its pairs, then its line."""
        ranking, members = self._ranking(number, judged)
        rows, ties = list[dict[str, Any]](), 0
        for places in self.maker.settings.pairing(ranking) if len(members) > 1 else ():
            row = self._pair(number, judged, ranking, [members[place] for place in places], places)
            ties += row is None
            rows += [] if row is None else [row]
        self._append(PAIRS, rows)
        scores = [float(v) if ok else None for v, ok in zip(judged.scores.total, judged.scores.valid, strict=True)]
        told: dict[str, Any] = {"number": number, "prompt": ranking.prompt, "pairs": len(rows), "ties": ties}
        told |= {"invalid": len(scores) - len(members), "scores": scores}
        told |= {"bytes": (self.folder / PAIRS).stat().st_size, "seconds": round(self.run.seconds, 3)}
        self._append(PROMPTS, [told])
        self.counts = {name: count + told[name] for name, count in self.counts.items()}
        self.empty += not rows
        self.done.add(number)
        self.run.log(len(self.done), {name: float(count) for name, count in self.counts.items()})

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        with (self.folder / name).open("ab") as file:
            file.write(json_lines(rows))
            file.flush()
            os.fsync(file.fileno())

    def _ranking(self, number: int, judged: Judged) -> tuple[Ranking, list[int]]:
        """The samples with a valid score as a ranking, and which they are."""
        members = [i for i in range(len(judged.media)) if bool(judged.scores.valid[i])]
        end = "png" if self.maker.model.fps is None else "mp4"
        media = tuple(Medium(Path(f"media/{number:06d}-{member}.{end}")) for member in members)
        standing = tuple(float(judged.scores.total[member]) for member in members)
        told = self.maker.prompts.rows([number])
        return Ranking(told.text[0], told.metadata[0], media, standing, "", standing), members

    def _pair(
        self, number: int, judged: Judged, ranking: Ranking, both: Sequence[int], places: tuple[int, int]
    ) -> dict[str, Any] | None:
        """A line of two members of a prompt, the better first, its files written; None where they are a tie."""
        (i, j), (first, second) = places, both
        if ranking.label(i, j) == "second":
            i, j, first, second = j, i, second, first
        told = ranking.pair(i, j)
        assert told.margin is not None
        if told.label == "tie" or told.margin < self.maker.settings.margin:
            return None
        files = [self._file(judged.media[member]) for member in (first, second)]
        if files[0] == files[1]:  # the reward differs, the samples do not
            return None
        for medium, content in zip((told.first, told.second), files, strict=True):
            write_atomically(self.folder / medium.path, content)
        parts = {name: [_finite(value[m]) for m in (first, second)] for name, value in judged.scores.parts.items()}
        seed, key = self.maker.settings.seed, self.maker.key(number)
        row = {"prompt": told.prompt, "first": str(told.first.path), "second": str(told.second.path), "label": "first"}
        row |= {"margin": told.margin, "scores": told.scores, "parts": parts}  # type: ignore[dict-item]
        row |= {"seeds": [[seed, key, member] for member in (first, second)]}  # type: ignore[dict-item]
        row |= {name: told.metadata[name] for name in OF_PROMPT if name in told.metadata}
        more = {name: value for name, value in told.metadata.items() if name not in OF_PROMPT}
        return row | ({"metadata": self._beside(more)} if more else {})  # type: ignore[dict-item]

    def _beside(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """The same, the files that it names being copied into the folder, where the rows' files must be."""

        def copied(name: str) -> str:
            if is_inline(name):
                return name
            content = Path(name).read_bytes()
            kept = f"named/{sha256(content).hexdigest()[:DIGITS]}{Path(name).suffix}"
            if not (self.folder / kept).is_file():
                (self.folder / "named").mkdir(exist_ok=True)
                write_atomically(self.folder / kept, content)
            return kept

        row = dict(told)
        for key in FILES:
            if isinstance(row.get(key), str):
                row[key] = copied(row[key])
            elif key == REFERENCES and row.get(key):
                row[key] = [copied(name) for name in row[key]]
        return row

    def _file(self, media: UInt8[Tensor, "*frames 3 h w"]) -> bytes:
        fps = self.maker.model.fps
        return png(media) if fps is None else mp4(media, fps)

    def stop(self, number: int) -> None:
        """Leave; all is saved. Raises: Stopped."""
        self._draw()
        name = signal.Signals(number).name
        message = f"stopped by {name}; all is saved in {self.folder}; run the same command again to go on"
        self.run.note("stop", message)
        raise Stopped(number, message)

    def _draw(self) -> None:
        drawn = sheet(self.folder, self.folder / PAIRS)
        if drawn is not None:
            write_atomically(self.folder / SHEET, drawn)

    def finish(self) -> None:
        """The sheet and the summary."""
        self._draw()
        counts, empty = self.counts, self.empty
        told = {"prompts": len(self.done), "samples": self.maker.settings.samples, **counts, "without_a_pair": empty}
        write_atomically(self.folder / "summary.json", json.dumps(told, indent=1).encode())
        print(
            f"flowalign: {told['prompts']} prompts of {told['samples']} samples: {counts['pairs']} pairs, "
            f"{counts['ties']} ties dropped, {counts['invalid']} samples without a valid score, "
            f"{empty} prompts without a pair",
            file=sys.stderr,
        )


def _finite(value: Float[Tensor, ""]) -> float | None:
    number = float(value)
    return number if abs(number) < float("inf") else None

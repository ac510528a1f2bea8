"""Preferences of a file, a folder or a dataset. All rows are looked at once; then a row is read when it is wanted."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flowalign.distributed import rank
from flowalign.media import confined
from flowalign.preferences.columnar import HubTable, ParquetTable
from flowalign.preferences.columns import Columns, recognised
from flowalign.preferences.records import Medium, Pairing, Preference, PreferenceSet, Ranking, all_pairs, pairs_of
from flowalign.preferences.tables import (
    Broken,
    CSVTable,
    FolderTable,
    Found,
    JSONLinesTable,
    JSONTable,
    Table,
    TSVTable,
)
from flowalign.progress import Progress
from flowalign.prompts.fields import with_files

OnBad = Literal["stop", "skip"]
REASONS = 5  # of rows that were left out, that are told
LOOKED = 512  # rows looked at together
MANY = 20_000  # rows: the look at more takes seconds, and shows how far it is
FILES: dict[str, Callable[[Path], Table]] = {
    ".jsonl": JSONLinesTable,
    ".json": JSONTable,
    ".csv": CSVTable,
    ".tsv": TSVTable,
    ".parquet": lambda path: ParquetTable([path], path),
}
ENDS = ((b"\x1a\x45\xdf\xa3", ".webm"), (b"GIF8", ".gif"))


@dataclass
class LeftOut:
    """What `on_bad: skip` has passed over: how many, and the first few reasons, each with its row."""

    count: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, reason: str) -> None:
        """One more."""
        self.count += 1
        if len(self.reasons) < REASONS:
            self.reasons.append(reason)

    def tell(self, total: int, what: str) -> None:
        """A line on the terminal, where something was left out."""
        if self.count and rank() == 0:
            more = f"; and {self.count - len(self.reasons)} more" if self.count > len(self.reasons) else ""
            line = f"flowalign: left out {self.count} of {total} {what}: {'; '.join(self.reasons)}{more}"
            print(line, file=sys.stderr, flush=True)


class TablePreferences(PreferenceSet):
    """The preferences of a table's rows; a ranking of k media is one row and several preferences.

    In memory is 12 bytes of each preference. left_out: rows that were passed over.

    Raises: ValueError for the first bad row, or where all are.
    """

    def __init__(
        self,
        table: Table,
        columns: Columns | None = None,
        root: Path | None = None,
        pairing: Pairing = all_pairs,
        on_bad: OnBad = "stop",
        split: str | None = None,
    ) -> None:
        self.table, self.pairing, self.on_bad, self.split = table, pairing, on_bad, split
        self.root = table.root if root is None else root
        if not len(table):
            raise ValueError(f"{table.where} holds no preferences")
        self.columns = recognised(table.names, table.where) if columns is None else columns
        table.texts = self.columns.texts()
        self.left_out = LeftOut()
        found = np.array([*self._look()], dtype=np.int32).reshape(-1, 3)
        self.left_out.tell(len(table), f"rows of {table.where}")
        if not len(found):
            named = f" of the split {split!r}" if split is not None else ""
            raise ValueError(f"{table.where} has no preferences{named} that can be used")
        self._index = found

    def _look(self) -> Iterator[tuple[int, int, int]]:
        """The row of each preference, and which two of its media they are."""
        for number, row in self._all_rows():
            try:
                ranking = self._ranking(number, row)
            except ValueError as error:
                if self.on_bad == "stop":
                    raise
                self.left_out.add(str(error))
                continue
            yield from ((number, first, second) for first, second in pairs_of(ranking, self.pairing))

    def _all_rows(self) -> Iterator[tuple[int, Found]]:
        """The rows of the split, without the bytes of their media."""
        total = len(self.table)
        progress = Progress(-(-total // LOOKED)) if total > MANY else None
        for start in range(0, total, LOOKED):
            index = range(start, min(start + LOOKED, total))
            found = zip(index, self.table.light(index), strict=True)
            yield from ((number, row) for number, row in found if self._is_of_split(row))
            if progress is not None:
                progress.update(len(index), {})
        if progress is not None:
            progress.close()

    def _is_of_split(self, row: Found) -> bool:
        return self.split is None or isinstance(row, Broken) or row.get("split") == self.split

    def _ranking(self, number: int, row: Found) -> Ranking:
        """A row's media and how good each is. Raises: ValueError that names the row."""
        where = self.table.place(number)
        try:
            if isinstance(row, Broken):
                raise ValueError(row.reason)
            self.columns.check(row)
            told = self.columns.read(row, where)
            with_files(told.metadata, self.root, where)
            media = tuple(self._medium(one, f"{where}, {i}") for i, one in enumerate(self.columns.media(row), 1))
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith(where) else f"{where}: {text}") from error
        return Ranking(told.prompt, told.metadata, media, told.standing, where, told.scores, told.margin, told.weight)

    def _medium(self, value: Any, name: str) -> Medium:
        """A file inside the root, or bytes. Raises: ValueError for a file that is not there or outside."""
        held, told = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
        if isinstance(held, bytes):
            return Medium(Path(f"{name}{_ending(held)}"), held)
        if not isinstance(told, str) or not told:
            raise ValueError(f"a medium must be a file's name or its bytes, got {value!r:.80}")
        if self.root is None:
            raise ValueError(f"{told} is a file's name, and {self.table.where} has no folder: say `root`")
        file = confined(self.root, told)
        if not os.path.isfile(file):  # Path.is_file raises for a name that is too long
            raise ValueError(f"{told} cannot be read as a picture or video: {file} is not a file")
        return Medium(file)

    def __len__(self) -> int:
        return len(self._index)

    def rows(self, index: Sequence[int]) -> tuple[Preference, ...]:
        chosen = self._index[[*index]]
        numbers = [int(number) for number in dict.fromkeys(chosen[:, 0].tolist())]
        told = dict(zip(numbers, self.table.rows(numbers), strict=True))
        known = {number: self._ranking(number, row) for number, row in told.items()}
        return tuple(known[row].pair(first, second) for row, first, second in chosen.tolist())

    def fingerprint(self) -> str:
        digest = sha256(self._index.tobytes()).hexdigest()
        return f"{len(self)} preferences, SHA-256 {digest}, of {self.table.fingerprint()}; {self.columns!r}"


class Preferences(TablePreferences):
    """The preferences of a file or folder.

    .jsonl           an object a line: {"prompt": text, "first": file, "second": file, "label": "first"}; the label is
                     first, second, tie or invalid. It may have "scores": [of first, of second], "parts": {reward: two
                     scores}, "seeds", "margin", "weight", "split", what every run knows of a prompt (its seed, size,
                     negative_prompt), all else about it under "metadata", and nothing more.
                     {"prompt", "media": [files], "ranks": [1, 2, ...]}, or "scores" instead of ranks, is a ranking
    .json            one list of such objects; HPD v2's (arXiv:2306.09341) and HPD v3's (arXiv:2508.03789) files
    .csv, .tsv       the same columns, with a header
    .parquet         the same; media may be bytes; Pick-a-Pic's columns (arXiv:2305.01569). A folder of such files, too
    a folder         a folder for each prompt, with `chosen` and `rejected` media, see `tables.FolderTable`
    save_to_disk's   a folder of the package datasets, as `HubPreferences`

    Args:
        source: the file or folder.
        columns: what its columns mean, where it is none of these.
        root: the folder that media, and other files that a row names, are relative to and must be in; by default that
            of the file.
        pairing: which pairs a ranking becomes: `flowalign.preferences.all_pairs` or `.best_and_worst`.
        on_bad: stop at the first bad row, or skip bad ones, counted and told.
        split: take the rows whose "split" says so only.

    Raises: ValueError in one line, with file and row, for what is wrong.
    """

    def __init__(
        self,
        source: str,
        columns: Columns | None = None,
        root: str | None = None,
        pairing: Pairing = all_pairs,
        on_bad: OnBad = "stop",
        split: str | None = None,
    ) -> None:
        folder = None if root is None else _existing_folder(root)
        super().__init__(_table(Path(source)), columns, folder, pairing, on_bad, split)


class HubPreferences(TablePreferences):
    """The preferences of a dataset of the Hugging Face hub, or of a folder that `save_to_disk` wrote.

    Args:
        dataset: its name on the hub, or the folder.
        split: which part of it. name: of the configuration. revision: a commit or tag of the hub's.
        columns, root, pairing, on_bad: as of `Preferences`.

    Raises: ValueError where the package datasets is missing or the data cannot be had, and as `Preferences` does.
    """

    def __init__(
        self,
        dataset: str,
        split: str = "train",
        name: str | None = None,
        revision: str | None = None,
        columns: Columns | None = None,
        root: str | None = None,
        pairing: Pairing = all_pairs,
        on_bad: OnBad = "stop",
    ) -> None:
        folder = None if root is None else _existing_folder(root)
        super().__init__(HubTable(dataset, split, name, revision), columns, folder, pairing, on_bad)


PreferenceData = PreferenceSet | str


def as_preferences(data: PreferenceData, on_bad: OnBad = "stop") -> PreferenceSet:
    """Preferences as they are, or of a file or folder with the other default settings of `Preferences`."""
    return Preferences(data, on_bad=on_bad) if isinstance(data, str) else data


def check_source(source: str) -> None:
    """Raises: ValueError for a name that is no file or folder that `Preferences` takes; nothing is read."""
    path = Path(source)
    if path.is_dir():
        return
    if not path.is_file():
        raise ValueError(f"preferences: {path} is no file or folder; give a {', '.join(FILES)} file or a folder")
    if path.suffix.lower() not in FILES:
        raise ValueError(f"preferences: {path} is no {', '.join(FILES)} file")


def _table(path: Path) -> Table:
    check_source(str(path))
    if path.is_dir():
        if any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            return HubTable(str(path), "train", None, None)
        parts = sorted(path.glob("*.parquet"))
        return ParquetTable(parts, path) if parts else FolderTable(path)
    return FILES[path.suffix.lower()](path)


def _existing_folder(root: str) -> Path:
    if not Path(root).is_dir():
        raise ValueError(f"preferences: the root {root} is no folder")
    return Path(root)


def _ending(data: bytes) -> str:
    """Of a file that would hold a video's bytes; what is none of these is a picture."""
    if data[4:8] == b"ftyp" and data[8:12] not in (b"avif", b"avis", b"heic", b"mif1"):
        return ".mp4"
    return next((end for start, end in ENDS if data.startswith(start)), "")

"""Where rows of preferences come from: JSON lines, JSON, CSV and folders; `columnar` has what needs pyarrow."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from flowalign.media import PICTURES, VIDEOS
from flowalign.prompts.fields import file_fingerprint
from flowalign.prompts.files import Lines


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read, and why."""

    reason: str


Found = Mapping[str, Any] | Broken


class Table(ABC):
    """Rows by their number.

    where: of the table in messages. root: the folder that files are relative to and must be in, if rows name any.
    names: of the columns; of the first row that could be read, where rows may differ.
    """

    where: str
    root: Path | None
    names: tuple[str, ...]
    texts: tuple[str, ...] = ()  # columns whose cells are left as they are; set once they are known

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, index: Sequence[int]) -> list[Found]:
        """The rows, in the order given."""

    @abstractmethod
    def place(self, number: int) -> str:
        """How a row is named in messages."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Tells this table from any other."""

    def light(self, index: Sequence[int]) -> list[Found]:
        """The same, but bytes of media may be empty: for a look at all rows."""
        return self.rows(index)


class FileTable(Table):
    """A file of text. In memory is where each row begins, and the number of its line."""

    def __init__(self, path: Path) -> None:
        self.path, self.where, self.root = path, str(path), path.parent
        self._stat = path.stat()
        self._starts, self._lines = array("q"), array("q")
        self._scan()
        self.names = next((tuple(row) for row in self._first() if isinstance(row, Mapping)), ())

    def _first(self) -> Iterator[Found]:
        for number in range(len(self)):
            yield from self.rows([number])

    @abstractmethod
    def _scan(self) -> None:
        """Note where rows begin."""

    def _note(self, start: int, line: int) -> None:
        self._starts.append(start)
        self._lines.append(line)

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, number: int) -> str:
        return f"{self.path}:{self._lines[number]}"

    def check_unchanged(self) -> None:
        """Raises: ValueError for a file that was written to since: its rows are no longer where they were."""
        now = self.path.stat()
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise ValueError(f"{self.path} was changed while it was in use; start again")

    def fingerprint(self) -> str:
        self.check_unchanged()
        return file_fingerprint(self.path, len(self)).replace("prompts", "rows")


class JSONLinesTable(FileTable):
    """An object a line; blank lines are passed over."""

    def _scan(self) -> None:
        with self.path.open("rb") as file:
            start = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._note(start, number)
                start += len(line)

    def rows(self, index: Sequence[int]) -> list[Found]:
        self.check_unchanged()
        with self.path.open("rb") as file:
            return [self._row(file, self._starts[i]) for i in index]

    def _row(self, file: Any, start: int) -> Found:
        file.seek(start)
        try:
            row = json.loads(file.readline().decode("utf-8-sig"), parse_constant=_no_number)
        except UnicodeDecodeError as error:
            return Broken(f"is not UTF-8 text (byte {start + error.start})")
        except (ValueError, RecursionError) as error:
            return Broken(f"is not JSON: {error}")
        return row if isinstance(row, dict) else Broken("is not a JSON object")


class CSVTable(FileTable):
    """Comma-separated values with a header; quoted cells may have lines. Cells are read as JSON where they are JSON."""

    delimiter = ","

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            try:
                self.header = [name.strip() for name in next(self._reader(Lines(file, path)), [])]
            except csv.Error as error:
                raise ValueError(f"{path}:1: {error}") from error
        twice = [name for name in self.header if name and self.header.count(name) > 1]
        if twice:
            raise ValueError(f"{path}:1: the column {twice[0]!r} is there twice")
        super().__init__(path)
        self.names = tuple(name for name in self.header if name)

    def _reader(self, lines: Lines) -> Any:
        return csv.reader(lines, delimiter=self.delimiter, strict=True)

    def _scan(self) -> None:
        with self.path.open("rb") as file:
            lines = Lines(file, self.path)
            records = self._reader(lines)
            next(records, None)
            while True:
                start, number = lines.next, lines.number + 1
                try:
                    record = next(records, None)
                except csv.Error:
                    record = ["broken"]
                if record is None:
                    return
                if record:
                    self._note(start, number)

    def rows(self, index: Sequence[int]) -> list[Found]:
        self.check_unchanged()
        with self.path.open("rb") as file:
            return [self._row(self._reader(Lines(file, self.path, self._starts[i]))) for i in index]

    def _row(self, records: Any) -> Found:
        try:
            record = next(records)
        except csv.Error as error:
            return Broken(f"is no row of CSV: {error}")
        if len(record) != len(self.header):
            return Broken(f"has {len(record)} cells, but the header has {len(self.header)}")
        told = zip(self.header, record, strict=True)
        return {name: cell if name in self.texts else _value(cell) for name, cell in told if name and cell.strip()}


class TSVTable(CSVTable):
    """The same, separated by tabs."""

    delimiter = "\t"


class JSONTable(Table):
    """A file that is one list of objects, in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.where, self.root = path, str(path), path.parent
        try:
            held = json.loads(path.read_bytes(), parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(held, list):
            raise ValueError(f"{path} must be a list of objects; one object a line is a .jsonl file")
        self.held: list[Found] = [row if isinstance(row, dict) else Broken("is not a JSON object") for row in held]
        self.names = next((tuple(row) for row in self.held if isinstance(row, dict)), ())

    def __len__(self) -> int:
        return len(self.held)

    def rows(self, index: Sequence[int]) -> list[Found]:
        return [self.held[i] for i in index]

    def place(self, number: int) -> str:
        return f"{self.path}, row {number}"

    def fingerprint(self) -> str:
        return file_fingerprint(self.path, len(self)).replace("prompts", "rows")


class FolderTable(Table):
    """A folder for each prompt, named by it or with a file prompt.txt; in it `chosen` and `rejected` media.

        ROOT/a red circle/chosen.png, rejected.png
        ROOT/7/prompt.txt, chosen-1.png, rejected-1.png, chosen-2.png, rejected-2.png

    What stands after "chosen" goes with the same after "rejected". Folders without such files are passed over.
    """

    def __init__(self, path: Path) -> None:
        self.where, self.root, self.names = str(path), path, ("prompt", "chosen", "rejected")
        self.held: list[Found] = []
        self.places: list[str] = []
        for folder in sorted(one for one in path.iterdir() if one.is_dir()):
            self._add(folder)

    def _add(self, folder: Path) -> None:
        files = sorted(one for one in folder.iterdir() if one.suffix.lower() in PICTURES + VIDEOS)
        sides = {side: {f.stem[len(side) :]: f for f in files if f.stem.startswith(side)} for side in self.names[1:]}
        text = folder / "prompt.txt"
        prompt = text.read_text("utf-8-sig").strip() if text.is_file() else folder.name
        for tail in sorted({*sides["chosen"], *sides["rejected"]}):
            both = {side: f"{folder.name}/{files[tail].name}" for side, files in sides.items() if tail in files}
            lonely = f"has {next(iter(both))}{tail}, but not the other of the pair"
            self.held.append({"prompt": prompt, **both} if len(both) == 2 else Broken(lonely))
            self.places.append(str(folder))

    def __len__(self) -> int:
        return len(self.held)

    def rows(self, index: Sequence[int]) -> list[Found]:
        return [self.held[i] for i in index]

    def place(self, number: int) -> str:
        return self.places[number]

    def fingerprint(self) -> str:
        return f"{len(self)} rows, SHA-256 {sha256(repr(self.held).encode()).hexdigest()}"


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _value(cell: str) -> Any:
    try:
        return json.loads(cell, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return cell

"""Text files of prompts. Each is read once from end to end, to be checked; then a row is read when it is wanted."""

from __future__ import annotations

import csv
import json
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flowalign.prompts.fields import check_fields, check_text, file_fingerprint, prompt_column, with_files
from flowalign.prompts.tables import ParquetPrompts
from flowalign.records import Prompts, PromptSet, Size

Row = tuple[str, dict[str, Any]]  # a prompt and its metadata
BLANKS_NAMED = 5


def read_file(path: Path) -> PromptSet:
    """The prompts of a file; the same object while the file stays as it is.

    Raises: ValueError for a file that is not there, or another kind of file; and what is wrong in it.
    """
    if not path.is_file():
        raise ValueError(f"prompts: {path} is not a file; give a {', '.join(KINDS)} file or a list of prompts")
    if path.suffix.lower() not in KINDS:
        raise ValueError(f"prompts: {path} is no {', '.join(KINDS)} file")
    told = path.stat()
    return _read(path, told.st_size, told.st_mtime_ns)


@lru_cache(maxsize=8)
def _read(path: Path, size: int, changed: int) -> PromptSet:
    return KINDS[path.suffix.lower()](path)


class Lines:
    """The lines of a file from one of its bytes on, without their ends. next: the byte at which the next one begins."""

    def __init__(self, file: BinaryIO, path: Path, start: int = 0) -> None:
        self.file, self.path, self.next, self.number = file, path, start, 0
        file.seek(start)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        try:
            text = line.decode("utf-8-sig" if self.next == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"prompts: {self.path} is not UTF-8 text (byte {self.next + error.start}) in line {self.number + 1}"
            ) from error
        self.next += len(line)
        self.number += 1
        return text


class PromptFile(PromptSet):
    """Prompts of a file: in memory is where each row begins, 8 bytes a row.

    Raises: ValueError for an empty file, and for the first row that is wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stat = path.stat()
        self._sizes = set[Size]()
        self._starts = np.array(self._scan(), dtype=np.int64)
        if not len(self._starts):
            raise ValueError(f"prompts: {path} is empty; training needs at least one prompt")

    @abstractmethod
    def records(self, lines: Lines) -> Iterator[Any]:
        """The file's rows, each from as many lines as it takes and no more; a falsy one is a blank line."""

    @abstractmethod
    def parse(self, record: Any, where: str) -> Row:
        """A row. Raises: ValueError for one that is wrong."""

    def blank(self, number: int) -> None:
        """Told of a blank line that has rows after it; passes over it."""

    def _scan(self) -> array[int]:
        """The byte at which each row begins, after a look at all of them."""
        starts, blanks, plain = array("q"), list[int](), Size()
        with self.path.open("rb") as file:
            lines = Lines(file, self.path)
            records = self.records(lines)
            while True:
                start, number = lines.next, lines.number + 1
                record = self._next(records, number)
                if record is None:
                    break
                if not record:
                    blanks.append(number)
                    continue
                if blanks:
                    self.blank(blanks[0])
                    blanks.clear()
                _, metadata = self.parse(record, f"{self.path}:{number}")
                self._sizes.add(Size.of(metadata) if metadata else plain)
                starts.append(start)
        return starts

    def _next(self, records: Iterator[Any], number: int) -> Any:
        try:
            return next(records, None)
        except csv.Error as error:
            raise ValueError(f"{self.path}:{number}: {error}") from error

    def __len__(self) -> int:
        return len(self._starts)

    def rows(self, index: Sequence[int]) -> Prompts:
        self._check_unchanged()
        with self.path.open("rb") as file:
            found = [self._row(file, int(self._starts[i])) for i in index]
        return Prompts(tuple(text for text, _ in found), tuple(metadata for _, metadata in found))

    def _row(self, file: BinaryIO, start: int) -> Row:
        record = next(self.records(Lines(file, self.path, start)))
        return self.parse(record, f"{self.path} (byte {start})")

    def _check_unchanged(self) -> None:
        """A file that is written to while a run reads it is another one: its rows are no longer where they were."""
        now = self.path.stat()
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise ValueError(f"prompts: {self.path} was changed while it was in use; start again")

    def fingerprint(self) -> str:
        self._check_unchanged()
        return file_fingerprint(self.path, len(self))

    def sizes(self) -> frozenset[Size]:
        return frozenset(self._sizes)


class TextPrompts(PromptFile):
    """One prompt a line, without blank lines but at the end."""

    def records(self, lines: Lines) -> Iterator[str]:
        return (line.strip() for line in lines)

    def parse(self, record: str, where: str) -> Row:
        return record, {}

    def blank(self, number: int) -> None:
        with self.path.open("rb") as file:
            holds = [bool(line.strip()) for line in file]
        last = max(at for at, held in enumerate(holds, 1) if held)
        empty = [str(at) for at, held in enumerate(holds[:last], 1) if not held]
        more = f" and {len(empty) - BLANKS_NAMED} more" if len(empty) > BLANKS_NAMED else ""
        raise ValueError(
            f"prompts: {self.path} has empty prompts in line {', '.join(empty[:BLANKS_NAMED])}{more}; remove them"
        )


class JSONLines(PromptFile):
    """An object a line, its prompt under "prompt"; blank lines are passed over."""

    def records(self, lines: Lines) -> Iterator[str]:
        return (line.strip() for line in lines)

    def parse(self, record: str, where: str) -> Row:
        try:
            row = json.loads(record, parse_constant=_no_number)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg})") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{where}: a line must be an object with a text under "prompt"')
        text = check_text(row.pop("prompt"), where)
        check_fields(row, where)
        with_files(row, self.path.parent, where)
        return text, row


class CSV(PromptFile):
    """Comma-separated values with a header: a column of prompts, the others metadata; quoted cells may have lines."""

    delimiter = ","

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            header = self._next(csv.reader(Lines(file, path), delimiter=self.delimiter, strict=True), 1) or []
        self.names = [name.strip() for name in header]
        if any(self.names):
            self.column = self.names.index(prompt_column([name for name in self.names if name], f"{path}:1"))
        super().__init__(path)

    def records(self, lines: Lines) -> Iterator[list[str]]:
        rows = csv.reader(lines, delimiter=self.delimiter, strict=True)
        if lines.next == 0:
            next(rows, None)  # the header
        return rows

    def parse(self, record: list[str], where: str) -> Row:
        if len(record) != len(self.names):
            raise ValueError(f"{where}: {len(record)} cells, but the header has {len(self.names)}")
        cells = dict(zip(self.names, record, strict=True))
        text = check_text(cells.pop(self.names[self.column]), where)
        row = {name: self._value(name, cell) for name, cell in cells.items() if name and cell.strip()}
        check_fields(row, where)
        with_files(row, self.path.parent, where)
        return text.strip(), row

    def _value(self, name: str, cell: str) -> Any:
        if name == "negative_prompt":
            return cell
        try:
            return json.loads(cell, parse_constant=_no_number)
        except (ValueError, RecursionError):
            return cell


class TSV(CSV):
    """The same, separated by tabs."""

    delimiter = "\t"


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


KINDS: dict[str, type[PromptFile] | type[ParquetPrompts]] = {
    ".txt": TextPrompts,
    ".jsonl": JSONLines,
    ".csv": CSV,
    ".tsv": TSV,
    ".parquet": ParquetPrompts,
}

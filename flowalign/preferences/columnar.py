"""Rows of preferences in columns: parquet files, and datasets of the Hugging Face hub or of a folder."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

from flowalign.preferences.tables import Broken, Found, Table
from flowalign.prompts.tables import is_plain, open_dataset

END = 1 << 20  # bytes of a parquet file that are hashed
GROUPS_KEPT = 2  # row groups of parquet files that stay in memory, with their pictures


class ParquetTable(Table):
    """Parquet files of the same columns, one after another; in memory are the row groups that were read last.

    Columns of texts, numbers, lists, records and bytes are read, others are left out.
    """

    def __init__(self, paths: Sequence[Path], where: Path) -> None:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise ValueError(f"{where}: parquet files need pyarrow: pip install pyarrow") from error
        self.where, self.root, self.paths = str(where), paths[0].parent, paths
        self.files = []
        for path in paths:
            try:
                self.files.append(parquet.ParquetFile(path))
            except (ArrowException, OSError) as error:
                raise ValueError(f"{path} cannot be read as parquet: {error}") from error
        self.names, self.heavy = readable(self.files[0].schema_arrow)
        self.parts = [(f, g) for f, file in enumerate(self.files) for g in range(file.metadata.num_row_groups)]
        counts = (self.files[f].metadata.row_group(g).num_rows for f, g in self.parts)
        self.starts = [0, *accumulate(counts)]
        self.firsts = [0, *accumulate(file.metadata.num_rows for file in self.files)]
        self.group = lru_cache(maxsize=GROUPS_KEPT)(self._group)

    def _group(self, part: int, names: tuple[str, ...]) -> Any:
        file, group = self.parts[part]
        return self.files[file].read_row_group(group, columns=[*names])

    def __len__(self) -> int:
        return self.starts[-1]

    def _read(self, index: Sequence[int], names: tuple[str, ...]) -> list[Found]:
        held: dict[int, Found] = {}
        for number in sorted(set(index)):  # so that no group is read twice
            part = bisect.bisect_right(self.starts, number) - 1
            held[number] = self.group(part, names).slice(number - self.starts[part], 1).to_pylist()[0]
        return [held[number] for number in index]

    def rows(self, index: Sequence[int]) -> list[Found]:
        return self._read(index, self.names)

    def light(self, index: Sequence[int]) -> list[Found]:
        some = self._read(index, tuple(name for name in self.names if name not in self.heavy))
        return [row if isinstance(row, Broken) else {**row, **dict.fromkeys(self.heavy, b"")} for row in some]

    def place(self, number: int) -> str:
        file = bisect.bisect_right(self.firsts, number) - 1
        return f"{self.paths[file]}, row {number - self.firsts[file]}"

    def fingerprint(self) -> str:
        return f"{len(self)} rows, {'; '.join(map(_ending, self.paths))}"


def _ending(path: Path) -> str:
    """Size and hash of the end of a parquet file, which tells where and how large all of it is: files may be huge."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - END))
        return f"{size} bytes, SHA-256 of the end {sha256(file.read()).hexdigest()}"


class HubTable(Table):
    """A dataset of the Hugging Face hub, or a folder that `save_to_disk` wrote; mapped, pictures as they are stored."""

    def __init__(self, dataset: str, split: str, name: str | None, revision: str | None) -> None:
        self.where = f"dataset {dataset}, {split}"
        self.root = Path(dataset) if Path(dataset).is_dir() else None
        held = open_dataset(dataset, split, name, revision)
        self.names, self.heavy = readable(held.features.arrow_schema)
        self.data = held.select_columns([*self.names]).with_format("arrow")
        self.told = f"{split}, {name}, {revision}, {held._fingerprint}"  # datasets' own, of its data and history

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, index: Sequence[int]) -> list[Found]:
        return list(self.data[[*index]].to_pylist())

    def light(self, index: Sequence[int]) -> list[Found]:
        kept = [name for name in self.names if name not in self.heavy]
        some = self.data.select_columns(kept)[[*index]].to_pylist()
        return [{**row, **dict.fromkeys(self.heavy, b"")} for row in some]

    def place(self, number: int) -> str:
        return f"{self.where}, row {number}"

    def fingerprint(self) -> str:
        return f"{len(self)} rows, {self.told}"


def readable(schema: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns of plain data or of media, and those of them that hold the bytes of a picture in each row."""
    kinds = dict(zip(schema.names, schema.types, strict=True))
    names = tuple(name for name, kind in kinds.items() if is_plain(kind) or _holds_bytes(kind))
    return names, tuple(name for name in names if not is_plain(kinds[name]) and not _is_list(kinds[name]))


def _holds_bytes(kind: Any) -> bool:
    """Bytes, a record of bytes and a file's name as `datasets` stores pictures, or a list of these."""
    from pyarrow import types

    if types.is_struct(kind):
        return {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}
    if _is_list(kind):
        return _holds_bytes(kind.value_type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind))

"""Prompts in columns: parquet files, and datasets of the Hugging Face hub or of a folder. Rows are read when wanted."""

from __future__ import annotations

import bisect
import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from flowalign.media import FILES
from flowalign.prompts.fields import SIZES, check_fields, check_text, file_fingerprint, prompt_column, with_files
from flowalign.records import Prompts, PromptSet, Size

KEPT = 4  # row groups of a parquet file that stay in memory, as they are stored there
CHECKED = 100_000  # rows looked at together


class TablePrompts(PromptSet):
    """Prompts of a table. `look` has to be called once it can be read.

    where: of the table in messages. column: of the prompts. kept: the columns that rows hold. folder: that files which
    rows name are relative to and must be in, if there is one.
    """

    where: str
    column: str
    kept: list[str]
    folder: Path | None
    _sizes: frozenset[Size]

    @abstractmethod
    def names(self) -> list[str]:
        """Of the columns."""

    @abstractmethod
    def columns(self, names: Sequence[str]) -> Iterator[Any]:
        """Some columns of all rows, as Arrow tables of consecutive rows."""

    @abstractmethod
    def take(self, index: Sequence[int]) -> Any:
        """The rows as an Arrow table, in the order given."""

    def look(self, column: str | None) -> None:
        """Find the columns that matter and look at them from end to end. Raises: ValueError for what is wrong."""
        names = self.names()
        if column is not None and column not in names:
            raise ValueError(f"{self.where}: there is no column {column!r}; the columns are {', '.join(names)}")
        self.column = column or prompt_column(names, self.where)
        if not len(self):
            raise ValueError(f"{self.where} is empty; training needs at least one prompt")
        known = [name for name in ("negative_prompt", "seed", *SIZES, *FILES) if name in self.kept]
        digest, sizes, start = hashlib.sha256(), set[Size](), 0
        for table in self.columns([self.column, *known]):
            for i, row in enumerate(table.to_pylist(), start):
                text, metadata = self._row(row, i)
                digest.update(f"{len(text)} {text} {sorted(metadata.items())}".encode())
                sizes.add(Size.of(metadata))
            start += len(table)
        self._sizes, self._digest = frozenset(sizes), digest.hexdigest()

    def _row(self, row: dict[str, Any], number: int) -> tuple[str, dict[str, Any]]:
        where = f"{self.where}, row {number}"
        text = check_text(row.pop(self.column), where)
        metadata = {name: value for name, value in row.items() if value is not None and value == value}
        for name in ("seed", *SIZES):  # a column of whole numbers with holes is one of floats
            if isinstance(metadata.get(name), float) and metadata[name].is_integer():
                metadata[name] = int(metadata[name])
        check_fields(metadata, where)
        with_files(metadata, self.folder, where)
        return text, metadata

    def rows(self, index: Sequence[int]) -> Prompts:
        told = self.take(index).to_pylist()
        found = [self._row(row, i) for row, i in zip(told, index, strict=True)]
        return Prompts(tuple(text for text, _ in found), tuple(metadata for _, metadata in found))

    def sizes(self) -> frozenset[Size]:
        return self._sizes


class ParquetPrompts(TablePrompts):
    """A parquet file; a column prompt, caption or text. In memory are the row groups that were read last.

    Raises: ValueError where pyarrow is missing, the file cannot be read, or a row is wrong.
    """

    def __init__(self, path: Path) -> None:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise ValueError(f"{path}: parquet files need pyarrow: pip install pyarrow") from error
        self.path, self.where, self.folder = path, str(path), path.parent
        try:
            self.file = parquet.ParquetFile(path)
        except (ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read as parquet: {error}") from error
        told = self.file.metadata
        self.starts = [0, *accumulate(told.row_group(i).num_rows for i in range(told.num_row_groups))]
        self.kept = [name for name, kind in zip(*_schema(self.file.schema_arrow), strict=True) if is_plain(kind)]
        self.group = lru_cache(maxsize=KEPT)(self._group)
        self.look(None)

    def names(self) -> list[str]:
        return list(self.file.schema_arrow.names)

    def columns(self, names: Sequence[str]) -> Iterator[Any]:
        from pyarrow import Table

        for batch in self.file.iter_batches(CHECKED, columns=[*names]):
            yield Table.from_batches([batch])

    def _group(self, number: int) -> Any:
        return self.file.read_row_group(number, columns=self.kept)

    def take(self, index: Sequence[int]) -> Any:
        from pyarrow import concat_tables

        places = sorted(range(len(index)), key=lambda place: index[place])  # so that no group is read twice
        parts = []
        for place in places:
            group = bisect.bisect_right(self.starts, index[place]) - 1
            parts.append(self.group(group).slice(index[place] - self.starts[group], 1))
        order = sorted(range(len(places)), key=places.__getitem__)
        return concat_tables(parts).take(order) if parts else self.group(0).slice(0, 0)

    def __len__(self) -> int:
        return self.starts[-1]

    def fingerprint(self) -> str:
        return file_fingerprint(self.path, len(self))


class HubPrompts(TablePrompts):
    """A dataset of the Hugging Face hub, or a folder that `datasets.Dataset.save_to_disk` wrote; mapped, not loaded.

    Args:
        dataset: its name on the hub, or the folder.
        split: which part of it.
        column: of the prompts; None for the first of prompt, caption and text that is there.
        name: of the configuration, for datasets that have several.
        revision: a commit or tag of the hub's, so that the data stay what they are.
        limit: take the first so many rows only.

    Columns of pictures, sounds and bytes are left out. Raises: ValueError where the package datasets is missing, the
    data cannot be had, or a row is wrong.
    """

    def __init__(
        self,
        dataset: str,
        split: str = "train",
        column: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        limit: int | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.where = f"dataset {dataset}, {split}"
        self.folder = Path(dataset) if Path(dataset).is_dir() else None
        self.told = (split, name, revision)
        held = open_dataset(dataset, split, name, revision)
        self.kept = [one for one, kind in zip(*_schema(held.features.arrow_schema), strict=True) if is_plain(kind)]
        self.data = held.select_columns(self.kept).with_format("arrow")
        if limit is not None:
            self.data = self.data.select(range(min(limit, len(self.data))))
        self.look(column)

    def names(self) -> list[str]:
        return list(self.data.column_names)

    def columns(self, names: Sequence[str]) -> Iterator[Any]:
        yield from self.data.select_columns([*names]).iter(CHECKED)

    def take(self, index: Sequence[int]) -> Any:
        return self.data[[*index]]

    def __len__(self) -> int:
        return len(self.data)

    def fingerprint(self) -> str:
        return f"{len(self)} prompts, {self.told}, SHA-256 {self._digest}"


def open_dataset(dataset: str, split: str, name: str | None, revision: str | None) -> Any:
    """A dataset of the hub, or of a folder that was saved. Raises: ValueError where it cannot be had."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"dataset {dataset}: datasets of the hub need a package: pip install datasets") from error
    folder = Path(dataset)
    try:
        if any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            held = datasets.load_from_disk(dataset)
            if isinstance(held, datasets.Dataset):
                return held
            if split not in held:
                raise ValueError(f"there is no split {split!r}; the splits are {', '.join(held)}")
            return held[split]
        return datasets.load_dataset(dataset, name, split=split, revision=revision)
    except (ValueError, OSError) as error:
        raise ValueError(f"dataset {dataset}: {error}") from error


def _schema(schema: Any) -> tuple[list[str], list[Any]]:
    return list(schema.names), list(schema.types)


def is_plain(kind: Any) -> bool:
    """Whether values of an Arrow type are what JSON has: texts, numbers, truth, and lists and records of them."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(is_plain(kind.field(i).type) for i in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return is_plain(kind.value_type)
    if types.is_dictionary(kind):
        return is_plain(kind.value_type)
    plain = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return types.is_null(kind) or any(test(kind) for test in plain)

"""Files that rows of data name: beside the data and nowhere else, whatever kind of data they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowalign.media import FILES, INLINE
from flowalign.preferences import HubPreferences, Preferences
from flowalign.prompts import HubPrompts, as_prompts

Row = dict[str, Any]


def lines(folder: Path, row: Row) -> Row:
    path = folder / "p.jsonl"
    path.write_text(json.dumps({"prompt": "x"} | row))
    return as_prompts(str(path)).all().metadata[0]


def cells(folder: Path, row: Row, ending: str = "csv") -> Row:
    mark, path = {"csv": ",", "tsv": "\t"}[ending], folder / f"p.{ending}"
    told = ["x", *(json.dumps(value) for value in row.values())]
    quoted = [f'"{cell}"' for cell in (cell.replace('"', '""') for cell in told)]
    path.write_text(f"{mark.join(['prompt', *row])}\n{mark.join(quoted)}\n")
    return as_prompts(str(path)).all().metadata[0]


def tabs(folder: Path, row: Row) -> Row:
    return cells(folder, row, "tsv")


def parquet(folder: Path, row: Row) -> Row:
    pa, written = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    written.write_table(
        pa.table({"prompt": ["x"]} | {name: [value] for name, value in row.items()}), folder / "p.parquet"
    )
    return as_prompts(str(folder / "p.parquet")).all().metadata[0]


def dataset(folder: Path, row: Row) -> Row:
    datasets = pytest.importorskip("datasets")
    held = datasets.Dataset.from_dict({"prompt": ["x"]} | {name: [value] for name, value in row.items()})
    held.save_to_disk(folder)
    return HubPrompts(str(folder)).all().metadata[0]


def pair_lines(folder: Path, row: Row) -> Row:
    told = {"prompt": "x", "first": "in/s.png", "second": "within.png", "label": "first", "metadata": row}
    (folder / "q.jsonl").write_text(json.dumps(told))
    return Preferences(str(folder / "q.jsonl")).rows([0])[0].metadata


def pair_list(folder: Path, row: Row) -> Row:
    (folder / "q.json").write_text(json.dumps([{"prompt": "x", "path1": "in/s.png", "path2": "within.png"} | row]))
    return Preferences(str(folder / "q.json")).rows([0])[0].metadata


def pair_parquet(folder: Path, row: Row) -> Row:
    pa, written = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    told = {"prompt": "x", "chosen": "in/s.png", "rejected": "within.png"} | row
    written.write_table(pa.table({name: [value] for name, value in told.items()}), folder / "q.parquet")
    return Preferences(str(folder / "q.parquet")).rows([0])[0].metadata


def pair_dataset(folder: Path, row: Row) -> Row:
    datasets = pytest.importorskip("datasets")
    told = {"prompt": "x", "chosen": "in/s.png", "rejected": "within.png"} | row
    datasets.Dataset.from_dict({name: [value] for name, value in told.items()}).save_to_disk(folder)
    return HubPreferences(str(folder)).rows([0])[0].metadata


KINDS: list[Callable[[Path, Row], Row]] = [lines, cells, tabs, parquet, dataset]
KINDS += [pair_lines, pair_list, pair_parquet, pair_dataset]
OUTSIDE = ["/etc/hostname", "../secret/s.png", "in/../../secret/s.png", "link.png", "out/s.png"]
ODD = [
    "C:\\s.png", "C:/s.png", "in\\s.png", "..\\secret\\s.png", "\\\\host\\share\\s.png", "~/s.png", "file:///etc/hostname",
    "circle.png", "circle.png/s.png", "in\0s.png", "/etc/hostname\0.png", 300 * "x",
]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the data, with a file in it, and links to another folder beside it; it is not the working one."""
    (tmp_path / "data" / "in").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    for place in ("data/in", "secret"):
        (tmp_path / place / "s.png").write_bytes(b"picture")
    os.symlink(tmp_path / "secret" / "s.png", tmp_path / "data" / "link.png")
    os.symlink(tmp_path / "secret", tmp_path / "data" / "out")
    os.symlink(tmp_path / "data" / "in" / "s.png", tmp_path / "data" / "within.png")
    os.symlink("circle.png", tmp_path / "data" / "circle.png")
    monkeypatch.chdir(tmp_path / "secret")
    return tmp_path / "data"


def named(key: str, *names: str) -> Row:
    return {key: [*names] if key == "references" else names[0]}


@pytest.mark.parametrize("read", KINDS)
@pytest.mark.parametrize("key", FILES)
def test_files_are_relative_to_the_data_and_in_its_folder(read, key, data):
    inside = str((data / "in" / "s.png").resolve())
    for name in ("in/s.png", "within.png", inside):
        assert read(data, named(key, name)) == named(key, inside)
    shown = f"{INLINE}png;base64,AAAA"
    assert read(data, named(key, shown)) == named(key, shown), "a picture that stands in the row itself"
    for name in OUTSIDE:
        with pytest.raises(ValueError, match=rf"(:\d|row 0): {name} lies outside"):
            read(data, named(key, name))
    for name in ("s.png", "in", ""):  # the first is in the working folder
        with pytest.raises(ValueError, match=r"(:\d|row 0): the reference .* is not a file"):
            read(data, named(key, name))


@pytest.mark.parametrize("name", ODD)
def test_a_name_of_another_system_or_of_no_file_is_one_line(name, data):
    with pytest.raises(ValueError, match=r"p\.jsonl:1: .* (is not a file|is no file's name: .*)$"):
        lines(data, named("image", name))
    row = {"prompt": "x", "first": "in/s.png", "second": name, "label": "first"}
    (data / "q.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"q\.jsonl:1: .* (is not a file|is no file's name: .*)$"):
        Preferences(str(data / "q.jsonl"))


@pytest.mark.parametrize("read", KINDS)
def test_each_of_several_references_is_looked_at(read, data):
    with pytest.raises(ValueError, match="lies outside"):
        read(data, named("references", "in/s.png", "../secret/s.png"))


def test_a_dataset_without_a_folder_has_no_files(monkeypatch, data):
    datasets = pytest.importorskip("datasets")
    for key in FILES:
        held = datasets.Dataset.from_dict({"prompt": ["x"], key: [*named(key, "s.png").values()]})
        monkeypatch.setattr("flowalign.prompts.tables.open_dataset", lambda *told, held=held: held)
        with pytest.raises(ValueError, match=rf"row 0: \"{key}\" names 's.png', .* this has no folder"):
            HubPrompts("somebody/prompts")


def test_columns_of_pictures_are_no_names(data):
    pa, written = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    told = {"prompt": ["x"], "image": [{"bytes": b"x", "path": "../secret/s.png"}], "media": [b"x"]}
    written.write_table(pa.table(told), data / "p.parquet")
    assert as_prompts(str(data / "p.parquet")).all().metadata == ({},)


def test_the_root_of_preferences_is_that_of_all_files_that_they_name(data):
    told = {"prompt": "x", "first": "s.png", "second": "s.png", "label": "first"}
    path, inside = data / "q.jsonl", str((data / "in" / "s.png").resolve())
    path.write_text(json.dumps(told | {"metadata": {"image": "s.png", "references": ["s.png"], "kind": "odd"}}))
    (one,) = Preferences(str(path), root=str(data / "in")).rows([0])
    assert one.metadata == {"image": inside, "references": [inside], "kind": "odd"}
    path.write_text(json.dumps(told | {"metadata": {"image": "link.png"}}))
    with pytest.raises(ValueError, match=r"q\.jsonl:1: the reference .* is not a file"):
        Preferences(str(path), root=str(data / "in"))

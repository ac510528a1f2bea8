"""Prompts from files and datasets, of which a run keeps no more than where each row begins."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flowalign.config import ConfigError, build
from flowalign.prompts import HubPrompts, PromptData, as_prompts
from flowalign.prompts.files import PromptFile
from flowalign.records import Prompts, PromptSet, Size
from tests.jobs import job
from trainers.facts import facts

ROWS = [
    {"prompt": 'a "red" cat,\nasleep', "count": 3, "tags": ["a", "b"]},
    {"prompt": "ein gr\u00fcner Hund", "negative_prompt": "7", "seed": 4},
    {"prompt": "two birds", "height": 64, "width": 32},
]


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def delimited(by: str) -> str:
    """The rows as a spreadsheet writes them: quoted where needed, a blank line at the end, Windows line ends."""
    names = ["prompt", "count", "tags", "negative_prompt", "seed", "height", "width"]
    lines = [by.join(names)]
    for row in ROWS:
        cells = [row.get(name, "") for name in names]
        texts = [json.dumps(cell) if isinstance(cell, list) else str(cell) for cell in cells]
        lines.append(by.join('"' + text.replace('"', '""') + '"' for text in texts))
    return "\ufeff" + "\r\n".join([*lines, "", ""])


def expected() -> Prompts:
    rows = [dict(row) for row in ROWS]
    return Prompts(tuple(str(row.pop("prompt")) for row in rows), tuple(rows))


def check(found: PromptSet) -> None:
    """All rows, some of them out of order and twice, and what the run asks of the whole."""
    assert len(found) == 3
    assert found.all() == expected()
    assert found.rows([2, 0, 2]) == expected().rows([2, 0, 2])
    assert found.rows([]) == Prompts((), ())
    assert found.sizes() == {Size(), Size(64, 32)}
    assert found.all().negatives() == (None, "7", None)
    assert found.all().noise_keys(range(3)) == [0, 4, 2]


@pytest.mark.parametrize(("name", "by"), [("p.csv", ","), ("p.tsv", "\t")])
def test_a_table_in_text_is_read_by_row(name, by, tmp_path):
    check(as_prompts(write(tmp_path, name, delimited(by))))


def test_json_lines_are_read_by_row(tmp_path):
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    check(as_prompts(write(tmp_path, "p.jsonl", "\ufeff" + lines)))


def test_cells_are_json_where_they_can_be_and_text_where_not(tmp_path):
    cells = {"1": 1, "1.5": 1.5, "true": True, "[1]": [1], "NaN": "NaN", "007": "007", "one": "one", " x ": " x "}
    text = "caption,text,value,\n" + "".join(f'a,b,"{cell}",9\n' for cell in cells)
    found = as_prompts(write(tmp_path, "p.csv", text)).all()
    assert found.text == ("a",) * len(
        cells
    )  # text is metadata where there is a caption; a column without a name is left
    assert found.metadata == tuple({"text": "b", "value": value} for value in cells.values())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "tag,n\na,1", "p.csv:1: there is no column prompt, caption or text; the columns are tag, n"),
        ("p.csv", "prompt,n,n\na,1,2", "p.csv:1: the column 'n' is there twice"),
        ("p.csv", "prompt,n\na,1\n ,2", "p.csv:3: the prompt is empty"),
        ("p.csv", 'prompt,n\n"a\nb",1\nc', "p.csv:4: 1 cells, but the header has 2"),
        ("p.csv", 'prompt,n\n"a,1\nb,2', "p.csv:2: unexpected end of data"),
        ("p.csv", b"prompt\na\ncaf\xe9", r"p.csv is not UTF-8 text \(byte 12\) in line 3"),
        ("p.csv", "prompt,n\n", "p.csv is empty"),
        ("p.csv", "", "p.csv is empty"),
        ("p.csv", "prompt,seed\na,-1", "p.csv:2: seed must be a whole number, at least 0, got -1"),
        ("p.csv", "prompt,height\na,1.5", "p.csv:2: height must be a whole number, positive, got 1.5"),
        ("p.jsonl", '{"prompt": "\\ud800"}', r"p.jsonl:1: the prompt holds half a character"),
        ("p.jsonl", '{"prompt": "a", "negative_prompt": 3}', "p.jsonl:1: negative_prompt must be a text, got 3"),
        ("p.jsonl", '{"prompt": "a", "width": true}', "p.jsonl:1: width must be a whole number, positive, got True"),
        ("p.json", "[]", "p.json is no .txt, .jsonl, .csv, .tsv, .parquet file"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_row(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        as_prompts(write(tmp_path, name, content))


def test_prompts_in_memory_are_checked_too():
    with pytest.raises(ValueError, match="prompt 1: frames must be a whole number, positive, got 0"):
        as_prompts(Prompts(("a", "b"), ({}, {"frames": 0})))


def test_of_a_file_a_run_keeps_where_rows_begin_and_a_digest(tmp_path):
    """Eight bytes a row; a second look is at the same object, and a file that changes meanwhile is told of."""
    path = write(tmp_path, "p.jsonl", "".join(json.dumps({"prompt": f"p {i}", "i": i}) + "\n" for i in range(5000)))
    found = as_prompts(path)
    assert isinstance(found, PromptFile)
    assert found._starts.nbytes == 8 * 5000
    assert as_prompts(path) is found
    assert found.rows([4999, 17]).metadata == ({"i": 4999}, {"i": 17})
    assert len(found.some(1000)) == 1000
    told = found.fingerprint()
    assert told.startswith("5000 prompts, file of ")
    write(tmp_path, "p.jsonl", '{"prompt": "another"}')
    with pytest.raises(ValueError, match="was changed while it was in use"):
        found.rows([0])
    assert as_prompts(path).fingerprint() != told


def test_prompts_in_memory_are_told_apart_as_ever():
    """Checkpoints of runs made before name them so."""
    told = "2 prompts, SHA-256 1bf7079867e6ce4d22a51c655e32ba79645e5280e5fd0965baefa1e36c63737b"
    assert Prompts(("a", "b"), ({"tag": 1}, {})).fingerprint() == told


def test_a_run_draws_from_a_file_as_from_a_list(tmp_path):
    """The same prompts, and so the same samples; only their fingerprint tells where they came from."""
    texts = ["a red circle", "a blue square", "two stars"]
    path = write(tmp_path, "p.txt", "\n".join(texts))
    read, listed = job(tmp_path / "a", prompts=path), job(tmp_path / "b", prompts=texts)
    for epoch in range(3):
        one, other = (trainer.collection for trainer in (read, listed))
        told = [each.told_rows(each.epoch(epoch), range(8)) for each in (one, other)]
        assert told[0] == told[1]
    assert read.collect(0).scores.total.equal(listed.collect(0).scores.total)
    known = facts(read, None)["prompts"], facts(listed, None)["prompts"]
    assert known[0].startswith("3 prompts, file of 36 bytes")
    assert known[1] == listed.prompts.fingerprint()


def arrow(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def test_parquet_is_read_by_row_group(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table(arrow(ROWS) | {"picture": [b"x", b"y", b"z"]})  # bytes are no metadata
    parquet.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    check(as_prompts(str(tmp_path / "p.parquet")))
    parquet.write_table(pa.table({"caption": ["a", None]}), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"bad\.parquet, row 1: the prompt is no text: None"):
        as_prompts(str(tmp_path / "bad.parquet"))
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        as_prompts(write(tmp_path, "none.parquet", "prompt"))


def test_a_dataset_on_disk_is_mapped(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"text" if name == "prompt" else name: value for name, value in row.items()} for row in ROWS]
    held = datasets.Dataset.from_dict(arrow(rows))
    held.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": held}).save_to_disk(tmp_path / "many")
    check(HubPrompts(str(tmp_path / "one")))
    check(HubPrompts(str(tmp_path / "many"), split="test"))
    few = HubPrompts(str(tmp_path / "one"), column="text", limit=2)
    assert len(few) == 2
    assert few.fingerprint() != HubPrompts(str(tmp_path / "one")).fingerprint()
    with pytest.raises(ValueError, match="there is no split 'train'; the splits are test"):
        HubPrompts(str(tmp_path / "many"))
    with pytest.raises(ValueError, match="there is no column 'prompt'; the columns are text, count"):
        HubPrompts(str(tmp_path / "one"), column="prompt")


def test_a_config_names_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"prompt": ["a", "b"]}).save_to_disk(tmp_path / "ds")
    named = {"class": "flowalign.prompts.HubPrompts", "dataset": str(tmp_path / "ds"), "limit": 1}
    assert build(_taken, {"prompts": named}).all().text == ("a",)
    with pytest.raises(ConfigError, match="unknown key 'splitt' in HubPrompts; did you mean 'split'"):
        build(_taken, {"prompts": named | {"splitt": "x"}})


def _taken(prompts: PromptData) -> PromptSet:
    return as_prompts(prompts)


def test_a_missing_package_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="parquet files need pyarrow: pip install pyarrow"):
        as_prompts(write(tmp_path, "p.parquet", "x"))
    with pytest.raises(ValueError, match="datasets of the hub need a package: pip install datasets"):
        HubPrompts("somebody/prompts")

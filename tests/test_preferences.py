"""Preferences from every format, what they become, and each kind of bad input as one line with file and row."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.config import ConfigError, build
from flowalign.fitting import centre_crop, fitted, stretch
from flowalign.preferences import (
    HubPreferences,
    Medium,
    PairColumns,
    PreferenceData,
    Preferences,
    PreferenceSet,
    Ranking,
    RankingColumns,
    all_pairs,
    as_preferences,
    best_and_worst,
    open_pair,
    pairs_of,
    readable,
)
from flowalign.records import Size
from flowalign.videos import mp4

ROW = {"prompt": "a red circle", "first": "a.png", "second": "b.png", "label": "second"}


def picture(shade: int, width: int = 8, height: int = 8) -> Image.Image:
    return Image.new("RGB", (width, height), (shade, 0, 255 - shade))


def encoded(shade: int, width: int = 8, height: int = 8) -> bytes:
    buffer = io.BytesIO()
    picture(shade, width, height).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pictures a, b, c of three shades, one of another size, and videos."""
    for shade, name in enumerate("abc"):
        picture(100 * shade).save(tmp_path / f"{name}.png")
    picture(9, 16).save(tmp_path / "wide.png")
    for name, frames, rate in (("v", 4, 8), ("w", 4, 8), ("short", 3, 8), ("fast", 4, 16)):
        pixels = torch.full((frames, 3, 16, 16), len(name) * 30 + 9 * (name == "w"), dtype=torch.uint8)
        (tmp_path / f"{name}.mp4").write_bytes(mp4(pixels, rate))
    return tmp_path


def write(folder: Path, name: str, *rows: Any) -> str:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / name).write_text(text + "\n")
    return str(folder / name)


def told(preferences: Preferences) -> list[tuple[str, str, str, str]]:
    rows = preferences.rows(range(len(preferences)))
    return [(row.prompt, row.first.path.stem, row.second.path.stem, row.label) for row in rows]


def test_our_lines(data):
    more = {"scores": [0.25, 0.75], "split": "test", "seed": 4, "metadata": {"kind": "single"}, "weight": 2}
    path = write(data, "p.jsonl", ROW, "", ROW | {"label": "tie"}, ROW | {"label": "invalid"}, ROW | more)
    found = Preferences(path)
    assert [row[3] for row in told(found)] == ["second", "tie", "invalid", "second"]
    last, first = found.rows([3, 0])  # in the order asked for
    assert first.where == f"{path}:1"
    assert last.where == f"{path}:5"
    assert (first.margin, first.scores, first.weight, first.metadata) == (None, None, 1.0, {})
    assert (last.margin, last.scores, last.weight) == (0.5, (0.25, 0.75), 2.0)
    assert last.metadata == {"split": "test", "seed": 4, "kind": "single"}
    assert len(Preferences(path, split="test")) == 1
    with pytest.raises(ValueError, match="no preferences of the split 'none'"):
        Preferences(path, split="none")
    media = open_pair(first)
    assert media.fps is None
    assert torch.equal(media.first[:, 0, 0] * 255, torch.tensor([0.0, 0, 255]))
    assert torch.equal(media.second[:, 0, 0] * 255, torch.tensor([100.0, 0, 155]))
    before = found.fingerprint()
    write(data, "p.jsonl", ROW | {"label": "first"})
    with pytest.raises(ValueError, match="was changed while it was in use"):
        found.rows([0])
    assert Preferences(path).fingerprint() != before


def test_csv_and_columns_of_other_names(data):
    head, rows = (
        "caption,left,right,winner,user",
        ["7,a.png,b.png,L,1", '"two\nlines",b.png,c.png,R,2', "x,a.png,c.png,=,"],
    )
    columns = PairColumns("caption", "left", "right", "winner", {"L": "first", "R": "second", "=": "tie"})
    path = write(data, "p.csv", head, *rows)
    found = Preferences(path, columns)
    assert told(found) == [("7", "a", "b", "first"), ("two\nlines", "b", "c", "second"), ("x", "a", "c", "tie")]
    assert [row.metadata for row in found.rows([0, 2])] == [{"user": 1}, {}]
    assert found.rows([2])[0].where == f"{path}:5"
    tsv = write(data, "p.tsv", *(row.replace(",", "\t") for row in ("text,chosen,rejected", "42,c.png,a.png")))
    assert told(Preferences(tsv)) == [("42", "c", "a", "first")]
    with pytest.raises(ValueError, match=r"p\.csv: the columns caption, left, .* say which they are"):
        Preferences(path)
    with pytest.raises(ValueError, match=r"p\.csv:2: a label is 'R', got 'L'"):
        Preferences(path, PairColumns("caption", "left", "right", "winner", {"R": "first"}))


def test_rankings_of_hpd(data):
    train = [{"prompt": "p", "file_path": ["a.png", "b.png"], "human_preference": [0, 1]}]
    assert told(Preferences(write(data, "train.json", json.dumps(train)))) == [("p", "a", "b", "second")]
    ranks = {"prompt": "p", "image_path": ["a.png", "b.png", "c.png"], "rank": [2, 1, 2], "raw_annotations": []}
    path = write(data, "test.json", json.dumps([ranks]))
    assert told(Preferences(path)) == [("p", "a", "b", "second"), ("p", "a", "c", "tie"), ("p", "b", "c", "first")]
    assert told(Preferences(path, pairing=best_and_worst)) == [("p", "b", "c", "first")]
    v3 = [{"prompt": "p", "path1": "c.png", "path2": "a.png", "confidence": 0.9}]
    (only,) = Preferences(write(data, "v3.json", json.dumps(v3))).rows([0])
    assert (only.first.path.stem, only.label, only.metadata) == ("c", "first", {"confidence": 0.9})
    scored = {"prompt": "p", "media": ["a.png", "b.png", "c.png"], "scores": [0.5, 2.0, 1.0]}
    best = Preferences(write(data, "r.jsonl", scored), pairing=best_and_worst).rows([0])[0]
    assert (best.first.path.stem, best.second.path.stem, best.scores, best.margin) == ("b", "a", (2.0, 0.5), 1.5)
    for change, message in (
        ({"rank": [1, 2]}, "image_path has 3 media, rank 2"),
        ({"rank": [1, 2, "x"]}, "expected a finite number, got 'x'"),
        ({"image_path": ["a.png"]}, "image_path must be a list of two media or more"),
    ):
        with pytest.raises(ValueError, match=r"bad\.json, row 1: " + message):
            Preferences(write(data, "bad.json", json.dumps([ranks, ranks | change])))
    with pytest.raises(ValueError, match="name a column of ranks or one of ratings"):
        RankingColumns()


def test_pairs_of_a_ranking():
    media = tuple(Medium(Path(name)) for name in "abcd")
    ranking = Ranking("p", {}, media, (1.0, 3.0, 1.0, 3.0), "here")
    assert all_pairs(ranking) == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
    assert [ranking.label(i, j) for i, j in all_pairs(ranking)] == ["second", "tie", "second", "first", "tie", "second"]
    assert best_and_worst(ranking) == ((1, 2),)
    unknown = Ranking("p", {}, media[:2], None, "here")
    assert pairs_of(unknown, best_and_worst) == ((0, 1),)
    assert unknown.pair(0, 1).label == "invalid"
    assert best_and_worst(Ranking("p", {}, media, None, "here")) == ()


def test_a_folder(data):
    for name in ("a blue square", "7"):
        (data / "root" / name).mkdir(parents=True)
    (data / "root" / "7" / "prompt.txt").write_text("seven\n")
    for shade, name in enumerate(("a blue square/chosen", "a blue square/rejected", "7/chosen-2", "7/rejected-2")):
        picture(shade).save(data / "root" / f"{name}.png")
    found = Preferences(str(data / "root"))
    assert told(found) == [
        ("seven", "chosen-2", "rejected-2", "first"),
        ("a blue square", "chosen", "rejected", "first"),
    ]
    picture(9).save(data / "root" / "7" / "rejected-3.png")
    with pytest.raises(ValueError, match="7: has rejected-3, but not the other of the pair"):
        Preferences(str(data / "root"))
    (data / "outside.png").write_bytes(encoded(77))
    (data / "root" / "7" / "chosen-3.png").symlink_to(data / "outside.png")
    with pytest.raises(ValueError, match="lies outside"):
        Preferences(str(data / "root"))


BAD = [
    ({"label": "third"}, "a label is 'first', 'second' or 'tie', got 'third'"),
    ({"first": "none.png"}, "none.png cannot be read as a picture or video: .* is not a file"),
    ({"first": "../out.png"}, "lies outside"),
    ({"first": "link.png"}, "lies outside"),
    ({"prompt": " "}, "the prompt is empty"),
    ({"prompt": 7}, "must be given as text; prompt is 7"),
    ({"lable": "first"}, "nothing else; this gives 'lable'"),
    ({"margin": -1}, "margin must be at least 0, got -1"),
    ({"scores": [1, 2, 3]}, "scores must be a number for each of the 2 media"),
    ({"scores": [1, True]}, "expected a finite number, got True"),
    ({"height": -3}, "height must be a whole number"),
    ("{", "is not JSON"),
    ("[1]", "is not a JSON object"),
    ('{"prompt": NaN}', "NaN is no JSON"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_bad_row_is_told_or_counted(data, capsys, change, message):
    (data.parent / "out.png").write_bytes(encoded(1))
    (data / "link.png").symlink_to(data.parent / "out.png")
    bad = change if isinstance(change, str) else ROW | change
    path = write(data, "p.jsonl", ROW, bad, ROW | {"label": "first"})
    with pytest.raises(ValueError, match=message) as caught:
        Preferences(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)
    found = Preferences(path, on_bad="skip")
    assert [row[3] for row in told(found)] == ["second", "first"]
    assert found.left_out.count == 1
    assert capsys.readouterr().err == f"flowalign: left out 1 of 3 rows of {path}: {found.left_out.reasons[0]}\n"
    with pytest.raises(ValueError, match="has no preferences that can be used"):
        Preferences(write(data, "q.jsonl", ROW | {"label": "x"}, bad), on_bad="skip")


def test_broken_files(data, capsys):
    path = data / "p.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"prompt": "\xff"}\n' + json.dumps(ROW).encode())
    with pytest.raises(ValueError, match=r"p\.jsonl:2: is not UTF-8 text"):
        Preferences(str(path))
    assert len(Preferences(str(path), on_bad="skip")) == 2
    head = "prompt,first,second,label"
    csv = write(data, "p.csv", head, "p,a.png,b.png,tie", "p,a.png", 'p,"a.png"x,b.png,tie', "p,b.png,c.png,first")
    with pytest.raises(ValueError, match=r"p\.csv:3: has 2 cells, but the header has 4"):
        Preferences(csv)
    assert [row[3] for row in told(Preferences(csv, on_bad="skip"))] == ["tie", "first"]
    assert "left out 2 of 4 rows" in capsys.readouterr().err
    for name, content, message in (
        ("e.jsonl", "", "holds no preferences"),
        ("e.json", "{}", "must be a list of objects"),
        ("e.txt", "x", r"is no \.jsonl, \.json"),
        ("t.csv", "prompt,prompt", "the column 'prompt' is there twice"),
    ):
        with pytest.raises(ValueError, match=message):
            Preferences(write(data, name, content))
    with pytest.raises(ValueError, match="is no file or folder"):
        Preferences(str(data / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="is no folder"):
        Preferences(csv, root=str(data / "nowhere"))


def test_media_that_cannot_be_compared(data, monkeypatch, capsys):
    (data / "copy.png").write_bytes((data / "a.png").read_bytes())
    (data / "text.png").write_text("no picture")
    (data / "cut.png").write_bytes(encoded(3, 64, 64)[:-60])
    Image.new("1", (9000, 8000)).save(data / "bomb.png")  # 72 million pixels in a few kilobytes
    Image.new("1", (18000, 10000)).save(data / "huge.png")  # which PIL itself refuses
    assert (data / "huge.png").stat().st_size < 100_000
    cases = [
        ("a.png", "a.png", "are the same file"),
        ("a.png", "copy.png", "the same to the last byte"),
        ("a.png", "text.png", "text.png cannot be read as a picture"),
        ("a.png", "cut.png", "cut.png cannot be read as a picture"),
        ("a.png", "bomb.png", "9000 x 8000 pixels"),
        ("a.png", "huge.png", "decompression bomb"),
        ("a.png", "wide.png", "is 8 x 8, .*wide.png is 16 x 8; a pair has one size"),
        ("a.png", "v.mp4", "are a picture and a video"),
        ("v.mp4", "short.mp4", "of 4 frames, .* of 3 frames; a pair has one size"),
        ("v.mp4", "fast.mp4", "8 frames a second, .* 16; a pair has one rate"),
    ]
    rows = [ROW | {"first": one, "second": other} for one, other, _ in cases]
    found = Preferences(write(data, "p.jsonl", ROW, *rows, ROW | {"first": "v.mp4", "second": "w.mp4"}))
    for number, (_, _, message) in enumerate(cases, 1):
        with pytest.raises(ValueError, match=message) as caught:
            open_pair(found.rows([number])[0])
        assert str(caught.value).startswith(f"{data}/p.jsonl:{number + 1}: ")
    with pytest.raises(ValueError, match="are the same file"):
        readable(found)
    capsys.readouterr()
    good = readable(found, "skip")
    assert [row.where for row in good.rows(range(len(good)))] == [f"{data}/p.jsonl:{line}" for line in (1, 12)]
    assert good.fingerprint() != found.fingerprint()
    line = next(text for text in capsys.readouterr().err.splitlines() if "left out" in text)
    assert line.startswith(f"flowalign: left out 10 of 12 preferences: {data}/p.jsonl:2: ")
    assert line.endswith("; and 5 more")
    monkeypatch.setattr("flowalign.media.MOST_FRAMES", 3 * 128 * 128)
    with pytest.raises(ValueError, match="has more than 3 frames of 128 x 128 pixels"):
        open_pair(good.rows([1])[0])
    monkeypatch.undo()
    video = open_pair(good.rows([1])[0])
    assert (video.first.shape[0], video.first.ndim, video.fps) == (4, 4, 8.0)


def pick_a_pic() -> dict[str, list[Any]]:
    shares = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.5, 0.5), (0.0, 1.0)]
    return {
        "caption": [f"prompt {i}" for i in range(5)],
        "jpg_0": [encoded(10 + i) for i in range(5)],
        "jpg_1": [encoded(90 + i) for i in range(5)],
        "label_0": [share for share, _ in shares],
        "label_1": [share for _, share in shares],
        "has_label": [True, True, True, False, True],
        "user_id": [*range(5)],
    }


def check_pick_a_pic(found: Any) -> None:
    rows = found.rows([4, 0, 1, 2, 3, 4])
    assert [row.label for row in rows] == ["second", "first", "second", "tie", "invalid", "second"]
    assert rows[0].prompt == "prompt 4"
    assert rows[0].metadata["user_id"] == 4
    media = open_pair(rows[0])
    assert torch.equal(media.first[:, 0, 0] * 255, torch.tensor([14.0, 0, 241]))
    assert torch.equal(media.second[:, 0, 0] * 255, torch.tensor([94.0, 0, 161]))


def test_pick_a_pic_in_parquet(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table(pick_a_pic())
    parquet.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    check_pick_a_pic(Preferences(str(tmp_path / "p.parquet")))
    (tmp_path / "parts").mkdir()
    for i in range(2):
        parquet.write_table(table.slice(3 * i, 3), tmp_path / "parts" / f"{i}.parquet", row_group_size=2)
    found = Preferences(str(tmp_path / "parts"))
    check_pick_a_pic(found)
    assert found.rows([4])[0].where.endswith("1.parquet, row 1")
    parquet.write_table(pa.table(pick_a_pic() | {"label_0": [1.0] * 5}), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"bad\.parquet, row 1: label_0 and label_1 must be .* got \(1.0, 1.0\)"):
        Preferences(str(tmp_path / "bad.parquet"))
    (tmp_path / "none.parquet").write_text("x")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        Preferences(str(tmp_path / "none.parquet"))


def test_a_dataset_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    held = datasets.Dataset.from_dict(pick_a_pic())
    held.save_to_disk(tmp_path / "one")
    check_pick_a_pic(HubPreferences(str(tmp_path / "one")))
    check_pick_a_pic(Preferences(str(tmp_path / "one")))
    stored = [{"bytes": one, "path": None} for one in pick_a_pic()["jpg_0"]]
    pictures = held.remove_columns("jpg_0").add_column("jpg_0", stored).cast_column("jpg_0", datasets.Image())
    pictures.save_to_disk(tmp_path / "pictures")
    check_pick_a_pic(HubPreferences(str(tmp_path / "pictures")))


def test_a_config_names_them(data):
    path = write(data, "p.csv", "caption,left,right", "p,a.png,b.png")
    columns = {"class": "flowalign.preferences.PairColumns", "prompt": "caption", "first": "left", "second": "right"}
    named = {"class": "flowalign.preferences.Preferences", "source": path, "columns": columns | {"label": ""}}
    named["pairing"] = "flowalign.preferences.best_and_worst"
    assert told(build(_taken, {"pairs": named})) == [("p", "a", "b", "first")]
    with pytest.raises(ConfigError, match="unknown key 'on_bat' in Preferences; did you mean 'on_bad'"):
        build(_taken, {"pairs": named | {"on_bat": "skip"}})


def _taken(pairs: PreferenceData) -> PreferenceSet:
    return as_preferences(pairs)


def test_a_missing_package_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "p.parquet").write_text("x")
    with pytest.raises(ValueError, match="parquet files need pyarrow: pip install pyarrow"):
        Preferences(str(tmp_path / "p.parquet"))
    with pytest.raises(ValueError, match="need a package: pip install datasets"):
        HubPreferences("somebody/preferences")


def test_media_get_the_model_s_size():
    ramp = torch.linspace(0, 1, 24).expand(1, 3, 16, 24)
    crop = centre_crop(ramp, 8, 8)  # of 16 x 24 the middle 16 x 16, at half the size
    wanted = ramp[0, 0, 0, 4:20].view(8, 2).mean(1)
    torch.testing.assert_close(crop[0, 0, 4, 1:-1], wanted[1:-1], atol=3e-3, rtol=0)
    whole = ramp[0, 0, 0].view(12, 2).mean(1)
    torch.testing.assert_close(stretch(ramp, 8, 12)[0, 0, 4, 1:-1], whole[1:-1], atol=3e-3, rtol=0)
    same = torch.from_numpy(np.random.default_rng(0).random((3, 8, 8), dtype=np.float32))
    assert torch.equal(fitted(same, Size(8, 8), centre_crop, 2.0), same)
    assert fitted(same, Size(16, 8), centre_crop, 2.0).shape == (3, 16, 8)
    with pytest.raises(ValueError, match=r"8 x 8 pixels would be enlarged 3 times to 8 x 24, more than 2"):
        fitted(same, Size(24, 8), centre_crop, 2.0)
    assert fitted(same, Size(24, 8), centre_crop, 3.0).shape == (3, 24, 8)
    video = same.expand(9, 3, 8, 8) * torch.linspace(0, 1, 9).view(-1, 1, 1, 1)
    assert torch.equal(fitted(video, Size(8, 8, 5), centre_crop, 2.0), video[::2])
    for media, size, message in (
        (video, Size(8, 8), "this is a video, and the model makes pictures"),
        (same, Size(8, 8, 5), "this is a picture, and the model makes videos"),
        (video, Size(8, 8, 10), "a video has 9 frames, and the model makes 10"),
    ):
        with pytest.raises(ValueError, match=message):
            fitted(media, size, centre_crop, 2.0)

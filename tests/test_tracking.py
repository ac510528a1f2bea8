"""The run folder, pictures and progress as a user finds them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.config import load_yaml
from flowalign.pictures import GAP, grid
from flowalign.progress import Progress
from flowalign.tracking import Run, write_atomically


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_one_strict_json_object_a_line_at_once(tmp_path: Path) -> None:
    with Run(tmp_path / "a" / "run") as run:
        run.log(0, {"reward": 0.25, "loss": float("nan"), "norm": float("inf"), "note": "x"})
        run.log(1, {"reward": torch.tensor(-1.5), "count": 3})
        found = rows(run.folder)  # before close: every line is flushed
    assert [row["step"] for row in found] == [0, 1]
    assert (found[0]["reward"], found[0]["loss"], found[0]["norm"], found[0]["note"]) == (0.25, None, None, "x")
    assert (found[1]["reward"], found[1]["count"]) == (-1.5, 3)
    assert "NaN" not in (run.folder / "metrics.jsonl").read_text()


def test_config_is_written_and_reads_back(tmp_path: Path) -> None:
    config = {"trainer": "trainers.FlowGRPO", "rate": 1e-4, "name": "1e-4", "precision": "no", "model": {"rank": 8}}
    Run(tmp_path / "run", config).close()
    assert load_yaml(tmp_path / "run" / "config.yaml") == config


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    Run(tmp_path / "run").close()
    with pytest.raises(ValueError, match="holds a run already"):
        Run(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        Run(tmp_path / "mine")
    with pytest.raises(ValueError, match="is a file"):
        Run(tmp_path / "mine" / "thesis.tex")


def test_going_on_drops_what_came_after_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        run.log(0, {"reward": 0.5})
        run.log_histogram(0, "advantages", -1.0, 1.0, [1, 2])
        written = run.written()
        run.log(1, {"reward": 9.0})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    with Run(tmp_path / "run", resume=True) as run:
        run.rewind(written, seconds=100.0)
        run.log(1, {"reward": 0.75})
    assert [(row["step"], row["reward"]) for row in rows(tmp_path / "run")] == [(0, 0.5), (1, 0.75)]
    assert rows(tmp_path / "run")[1]["seconds"] >= 100
    assert len((tmp_path / "run" / "histograms.jsonl").read_text().splitlines()) == 1


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        Run(tmp_path / "run"),
        pytest.raises(ValueError, match=r"in use by a run that is going on \(process \d+"),
    ):
        Run(tmp_path / "run", resume=True)
    Run(tmp_path / "run", resume=True).close()


def test_grid_shows_every_picture_in_its_place(tmp_path: Path) -> None:
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.4, 0.6], [1, 1, 0]])
    pixels = colours[:, :, None, None].expand(5, 3, 32, 32)
    with Run(tmp_path / "run") as run:
        path = run.save_grid("step-000", pixels, [f"picture {i}\nscore {i}" for i in range(5)])
    sheet = np.asarray(Image.open(path))
    plain = np.asarray(Image.open(io.BytesIO(grid(pixels))))
    assert plain.shape == (2 * (128 + GAP) + GAP, 3 * (128 + GAP) + GAP, 3)  # 3 columns, each 32 enlarged to 128
    strip = (sheet.shape[0] - plain.shape[0]) // 2
    assert strip > 20
    for i, colour in enumerate(colours):
        left, top = GAP + i % 3 * (128 + GAP), GAP + i // 3 * (128 + strip + GAP)
        tile = sheet[top : top + 128, left : left + 128]
        assert np.array_equal(tile, np.broadcast_to((colour.numpy() * 255).round().astype(np.uint8), tile.shape))
        assert (sheet[top + 128 : top + 128 + strip, left : left + 128] < 100).any(), "the caption's ink"
    assert [p.name for p in path.parent.iterdir()] == ["step-000.png"]


def test_grid_enlarges_without_smoothing_and_clips() -> None:
    pixels = torch.tensor([[0.0, 1.0], [2.0, -1.0]]).expand(1, 3, 2, 2)
    picture = np.asarray(Image.open(io.BytesIO(grid(pixels))))[GAP : GAP + 128, GAP : GAP + 128, 0]
    assert np.array_equal(picture, np.kron([[0, 255], [255, 0]], np.ones((64, 64), int)))


def test_wrong_captions_are_refused() -> None:
    with pytest.raises(ValueError, match="2 pictures but 1 captions"):
        grid(torch.zeros(2, 3, 8, 8), ["one"])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    write_atomically(path, b"old")

    def full_disk(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new content")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_a_tracker_that_is_not_installed_is_named_before_the_folder_is_made(tmp_path: Path) -> None:
    from accelerate.tracking import get_available_trackers

    if "swanlab" in [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]:
        pytest.skip("swanlab is installed here")
    with pytest.raises(ValueError, match="pip install swanlab"):
        Run(tmp_path / "run", log_with=["swanlab"])
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_config_and_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Run(tmp_path / "run", {"model": {"rank": 8}, "steps": [1, 2], "x": None}, log_with=["tensorboard"]) as run:
        run.log(0, {"reward": 0.5, "loss": float("nan")})
    assert list((tmp_path / "run" / "trackers").rglob("events.*"))


def test_a_long_step_says_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("flowalign.progress.time.monotonic", lambda: now[0])
    progress = Progress(total=3, interval=30.0)
    for done in range(10):
        progress.within("rollout", done, 10)
        now[0] += 10
    progress.update(16, {"reward": 0.5})
    for done in range(3):
        now[0] += 10
        progress.within("update", done, 3)
        if done == 1:
            progress.update(16, {"reward": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["step 1/3  rollout 3/10", "step 1/3  rollout 6/10", "step 1/3  rollout 9/10"]
    assert [line.split("  ")[0] for line in lines[3:]] == ["step 1/3"], "short steps say nothing within"


def test_progress_prints_seldom_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total=50, interval=3600.0)
    for step in range(50):
        progress.update(16, {"reward": step / 100, "held-out": None if step < 49 else 0.625})
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, "the first step and the last"
    assert lines[0].startswith("step 1/50  reward 0.000  samples/s ")
    assert lines[1].startswith("step 50/50  reward 0.490  held-out 0.625  samples/s ")
    assert lines[1].endswith("00:00 left")

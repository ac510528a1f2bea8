"""Real videos of the embedded world as files: what the prompts say of them is so, and a config trains from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowalign.cli import main
from flowalign.media import real_media
from flowalign.prompts import as_prompts
from flowalign.records import Media, Size
from flowalign.shapes.video.prompts import held_out
from flowalign.shapes.video.scenes import Spec
from rewards import ShapesVideoVerifier
from scripts.render_shapes_video import main as render
from scripts.render_shapes_video import write_videos
from tests.jobs import rows

KINDS = ("move", "speed", "change")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("data") / "videos"
    render(["--out", str(folder), "--count", "12", "--seed", "5"])
    return folder / "prompts.jsonl"


def test_the_videos_are_what_their_captions_say(made) -> None:
    prompts = as_prompts(str(made)).all()
    assert len(prompts) == 12
    assert {row["kind"] for row in prompts.metadata} <= {*KINDS}
    assert not any(held_out(Spec.from_dict(row["spec"])) for row in prompts.metadata)
    videos = real_media(prompts, Size(32, 32, 9))
    scores = ShapesVideoVerifier()(Media(videos, 8.0), prompts)
    assert scores.parts["strict"].tolist() == [1.0] * 12
    turned = ShapesVideoVerifier()(Media(videos.roll(1, 0), 8.0), prompts)
    assert turned.parts["strict"].mean() < 0.5  # and not what the next one's says


def test_the_same_arguments_give_the_same_files(made, tmp_path, capsys) -> None:
    again = write_videos(tmp_path / "again", 12, 5, KINDS).parent
    for path in sorted(made.parent.iterdir()):
        assert (again / path.name).read_bytes() == path.read_bytes()
    assert write_videos(again, 12, 5, KINDS) == again / "prompts.jsonl"
    with pytest.raises(ValueError, match="holds other prompts; name another folder"):
        write_videos(again, 12, 6, KINDS)
    with pytest.raises(SystemExit) as stopped:
        render(["--out", str(tmp_path / "none"), "--count", "0"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("error: count must be at least 1, got 0\n")
    assert not (tmp_path / "none").exists()


def test_the_shipped_config_trains_from_them(made, tmp_path) -> None:
    folder = tmp_path / "run"
    words = [
        "--epochs=1", "--sampling.groups=4", "--sampling.batch_size=4", "--sampling.rows_per_call=4",
        "--evaluation.prompts.count=2", "--evaluation.pictures=1", f"--prompts={made}", f"--folder={folder}",
    ]  # fmt: skip
    assert main(["train", "instruct_video/shapes_video", *words]) == 0
    log = rows(folder)
    assert log[1]["grad_norm"] > 0
    assert "held-out/strict" in log[0]
    assert torch.isfinite(torch.tensor(log[1]["reward"]))

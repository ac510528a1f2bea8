"""Videos through what all models share: MP4s that open again, strips, `sample`, evaluation, report and preflight."""

from __future__ import annotations

import base64
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from flowalign import videos
from flowalign.cli import main
from flowalign.media import load
from flowalign.models import Wan
from flowalign.pictures import grid, to_bytes
from flowalign.records import Media, Prompts
from flowalign.report import write_report
from flowalign.sample import pictures
from flowalign.schedules import AllSteps
from flowalign.transitions import FlowSDE
from flowalign.videos import mp4, stills
from rewards import RunningNormalise
from rewards.base import as_reward
from tests.families import seeded
from tests.jobs import job, rows
from tests.tiny_wan import tiny_wan
from trainers import Evaluation, Sampling
from trainers.preflight import inspect

SMALL = {"height": 32, "width": 32, "frames": 9, "max_sequence_length": 12}


def moving(frames: int = 9, height: int = 32, width: int = 48, colour: tuple[float, ...] = (1.0, 0.2, 0.1)) -> Tensor:
    """[f 3 h w] in [0, 1]: a square of a colour that goes to the right over a grey slope."""
    video = torch.linspace(0.2, 0.8, width).expand(frames, 3, height, width).clone()
    for i in range(frames):
        video[i, :, 8:16, 2 * i : 2 * i + 8] = torch.tensor(colour)[:, None, None]
    return video


def opened(content: bytes, folder: Path, factor: int) -> tuple[Tensor, float | None]:
    """Frames of an MP4 that was enlarged by a factor."""
    (folder / "opened.mp4").write_bytes(content)
    frames, fps = load(folder / "opened.mp4")
    return avg_pool2d(frames, factor), fps


@pytest.mark.parametrize("codec", [0, 1], ids=["h264", "mpeg4"])
def test_an_mp4_opens_again(codec: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "CODECS", videos.CODECS[codec:])
    frames = moving()
    content = mp4(to_bytes(frames), 16)
    again, fps = opened(content, tmp_path, 3)
    assert fps == 16
    assert again.shape == frames.shape
    assert (again - frames).abs().mean() < 0.01
    assert (again - frames).abs().max() < 0.15
    apart = (again[:, None] - frames).abs().mean((2, 3, 4))
    assert torch.equal(apart.argmin(1), torch.arange(9))  # each frame is its own
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.pix_fmt) == (("h264", "mpeg4")[codec], "yuv420p")
        assert float(stream.duration * stream.time_base) == pytest.approx(9 / 16, abs=1e-3)


def test_an_mp4_is_the_same_each_time_and_a_large_one_keeps_its_size(tmp_path: Path) -> None:
    noise = 0.05 * torch.randn(9, 3, 160, 256, generator=torch.Generator().manual_seed(0))
    frames = to_bytes(moving(9, 160, 256) + noise)
    content = mp4(frames, 24000 / 1001)
    assert all(mp4(frames, 24000 / 1001) == content for _ in range(3))
    again, fps = opened(content, tmp_path, 1)
    assert again.shape == frames.shape
    assert fps == pytest.approx(23.976, abs=1e-3)
    with pytest.raises(ValueError, match="an even height and width, got 33 x 129"):
        mp4(torch.zeros(2, 3, 33, 129, dtype=torch.uint8), 8)


def test_without_pyav_the_fix_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ValueError, match="pip install av"):
        videos.check_writable()


def test_a_strip_has_the_first_and_the_last_frame() -> None:
    video = moving(17, 32, 48)
    strip = stills(video[None])[0]
    assert strip.shape == (3, 96, 6 * 144 + 5 * 4)
    for place, frame in ((0, 0), (1, 3), (5, 16)):
        shown = strip[:, :, place * 148 : place * 148 + 144]
        assert torch.equal(
            avg_pool2d(shown, 3), avg_pool2d(video[frame].repeat_interleave(3, 1).repeat_interleave(3, 2), 3)
        )
    large = stills(moving(3, 480, 832)[None])
    assert large.shape == (1, 3, 148, 3 * 256 + 2 * 8)
    image = torch.rand(2, 3, 8, 8)
    assert stills(image) is image
    sheet = Image.open(io.BytesIO(grid(stills(video.expand(4, -1, -1, -1, -1)), ["a"] * 4)))
    assert sheet.size == (6 * 144 + 5 * 4 + 12, 4 * (96 + 15 + 6) + 6)  # one below the other


def to_the_right(media: Media, prompts: Prompts) -> Tensor:
    """Needs videos at their own pace: the right half gets brighter from the first frame to the last."""
    assert media.is_video
    assert media.fps == 8
    half = media.pixels[..., media.pixels.shape[-1] // 2 :].mean((2, 3, 4))
    return 30 * (half[:, -1] - half[:, 0])


def video_job(folder: Path, **changes: Any) -> Any:
    settings = {
        "model": Wan(seeded(tiny_wan)(), fps=8, **SMALL),
        "reward": RunningNormalise(as_reward(to_the_right)),
        "sampling": Sampling(
            AllSteps(FlowSDE(0.7)), groups=2, group_size=2, batch_size=2, rows_per_call=2, steps=3, guidance_scale=2.0
        ),
        "evaluation": Evaluation(["a green cross", "a star", "a circle"], every=1, pictures=2),
        "updates_per_epoch": 1,
        "epochs": 2,
    }
    return job(folder, **settings | changes)


def test_flow_grpo_on_videos_leaves_a_whole_run_folder(tmp_path: Path) -> None:
    trainer = video_job(tmp_path)
    trainer.train()
    trained = [row for row in rows(tmp_path) if "reward" in row]
    assert [row["ratio_max"] for row in trained] == [0, 0]
    assert all(row["grad_norm"] > 0 for row in trained)
    _check_pictures(tmp_path, trainer)
    _check_page(tmp_path)


def _check_pictures(folder: Path, trainer: Any) -> None:
    with zipfile.ZipFile(folder / "evaluations" / "epoch-000002.zip") as archive:
        names = ["00000.png", "00001.png", "00002.png", "00000.mp4", "00001.mp4"]
        assert archive.namelist() == names
        films = {name: archive.read(name) for name in names}
    evaluator = trainer.evaluator
    (made,) = pictures(
        trainer.model, evaluator.prompts.text[:2], evaluator.steps, 2.0, trainer.seed, "evaluation", evaluator.rows
    )
    for i, frames in enumerate(made):
        strip = np.asarray(Image.open(io.BytesIO(films[f"{i:05d}.png"])))
        assert np.abs(strip.astype(int) - to_bytes(stills(frames[None]))[0].permute(1, 2, 0).numpy()).max() <= 1
        again, fps = opened(films[f"{i:05d}.mp4"], folder, 4)
        assert fps == 8
        apart = (again[:, None] - frames).abs().mean((2, 3, 4))
        assert torch.equal(apart.argmin(1), torch.arange(9))
        assert apart.diagonal().max() < 0.02
    for name in ("epoch-000000", "epoch-000002", "before_after"):
        assert Image.open(folder / "samples" / f"{name}.png").width == 6 * 128 + 5 * 4 + 12


def _check_page(folder: Path) -> None:
    page = write_report(folder).read_text()
    assert "media-src data:" in page
    shown = re.findall(r'<video src="data:video/mp4;base64,([^"]+)"', page)
    with zipfile.ZipFile(folder / "evaluations" / "epoch-000000.zip") as archive:
        assert archive.read("00000.mp4") in [base64.b64decode(film) for film in shown]
    assert '<div class="strips">' in page  # the third prompt's film was not kept


def test_a_videos_evaluation_does_not_depend_on_how_it_is_cut(tmp_path: Path) -> None:
    sampling = Sampling(AllSteps(FlowSDE(0.7)), 2, 2, batch_size=2, rows_per_call=3, steps=3, guidance_scale=2.0)
    one = video_job(tmp_path / "a").evaluator.sample()
    other = video_job(tmp_path / "b", sampling=sampling).evaluator.sample()
    assert (torch.stack([*one.stills]).int() - torch.stack([*other.stills]).int()).abs().max() <= 1
    assert one.films.keys() == other.films.keys() == {0, 1}


def test_the_preflight_of_videos(tmp_path: Path) -> None:
    found = inspect(video_job(tmp_path / "run"), tmp_path / "out")
    assert found.trial is not None
    assert found.trial.rollouts.medium.shape == (9, 3, 32, 32)
    assert found.trial.rollouts.pixels.shape == (2, 3, 128, 6 * 128 + 5 * 4)
    assert found.sheet is not None
    assert Image.open(found.sheet).width == 6 * 128 + 5 * 4 + 12


def test_sample_writes_videos(tmp_path: Path) -> None:
    seeded(tiny_wan)().save_pretrained(tmp_path / "pipe")
    asked = [f"--model.{name}={value}" for name, value in SMALL.items()]
    words = [
        "--steps",
        "3",
        "--guidance-scale",
        "2",
        "--seed",
        "3",
        "--batch-size",
        "2",
        "--prompt",
        "a",
        "--prompt",
        "b",
    ]
    out = tmp_path / "out"
    assert main(["sample", str(tmp_path / "pipe"), *asked, *words, "--prompt", "c", "--out", str(out)]) == 0
    names = [f"{i:04d}.{kind}" for i in range(3) for kind in ("mp4", "png")]
    assert sorted(path.name for path in out.iterdir()) == [*names, "grid.png"]
    model = Wan(seeded(tiny_wan)(), **SMALL)
    made = torch.cat([*pictures(model, ["a", "b", "c"], 3, 2.0, 3)])
    for i, frames in enumerate(made):
        again, fps = opened((out / f"{i:04d}.mp4").read_bytes(), tmp_path, 4)
        assert fps == 16
        assert (again - frames).abs().mean() < 0.02
        assert np.asarray(Image.open(out / f"{i:04d}.png")).shape == (128, 6 * 128 + 5 * 4, 3)
    assert json.loads((tmp_path / "pipe" / "model_index.json").read_text())["_class_name"] == "WanPipeline"

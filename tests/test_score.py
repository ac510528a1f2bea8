"""`flowalign score`: files in, a table, JSON lines and a sheet out; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.cli import main
from flowalign.pictures import to_images
from flowalign.shapes import held_out_prompts
from flowalign.shapes.scenes import Spec, render


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four right pictures of the embedded world, each beside its prompt."""
    prompts, rng = held_out_prompts(4), np.random.default_rng(0)
    lines = []
    (tmp_path / "media").mkdir()
    for i, (text, metadata) in enumerate(zip(prompts.text, prompts.metadata, strict=True)):
        pixels = torch.from_numpy(render(Spec.from_dict(metadata["spec"]), rng)) / 255
        to_images(pixels[None])[0].save(tmp_path / "media" / f"{i}.png")
        lines.append(json.dumps({"prompt": text, "file": f"{i}.png", **metadata}))
    (tmp_path / "prompts.jsonl").write_text("\n".join(reversed(lines)))
    return tmp_path


def score(folder: Path, *words: str) -> int:
    return main(["score", *words, "--media", str(folder / "media"), "--out", str(folder / "out")])


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "scores.jsonl").read_text().splitlines()]


def test_files_find_their_prompts_by_name(folder, capsys):
    assert score(folder, "rewards.ShapesVerifier", "--prompts", str(folder / "prompts.jsonl")) == 0
    told = rows(folder)
    assert [Path(row["file"]).name for row in told] == [f"{i}.png" for i in range(4)]
    assert [row["strict"] for row in told] == [1.0] * 4
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[0] == "shapes"
    values = [float(line.split()[0]) for line in table[1:5]]
    assert values == sorted(values, reverse=True)
    assert "mean of 4" in table[5]
    assert Image.open(folder / "out" / "sheet.png").size[0] > 256


def test_one_prompt_for_all_and_options_of_the_reward(folder):
    assert score(folder, "rewards.CLIPScore", "--model", "shapes", "--prompt", "a red circle") == 0
    assert len({row["total"] for row in rows(folder)}) == 4
    assert {row["prompt"] for row in rows(folder)} == {"a red circle"}


def test_sizes_may_differ_and_order_stays(folder):
    Image.new("RGB", (48, 32), "red").save(folder / "media" / "1a.png")
    assert score(folder, "rewards.JPEGCompressibility", "--prompt", "x", "--batch-size", "2") == 0
    assert [Path(row["file"]).name for row in rows(folder)] == ["0.png", "1.png", "1a.png", "2.png", "3.png"]


def test_prompts_may_stand_beside_the_files(folder):
    for i in range(4):
        (folder / "media" / f"{i}.txt").write_text(f"picture {i}\n")
    assert score(folder, "rewards.JPEGCompressibility") == 0
    assert [row["prompt"] for row in rows(folder)] == [f"picture {i}" for i in range(4)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rewards.JPEGCompressibility"], "has no prompt: give --prompt, --prompts, or a file 0.txt beside it"),
        (["rewards.JPEGCompressibility", "--prompt", " "], "prompt 0 is empty"),
        (["rewards.JPEGCompresibility", "--prompt", "x"], "did you mean"),
        (["rewards.JPEGCompressibility", "--prompt", "x", "--qualty", "9"], "did you mean 'quality'"),
        (["trainers.FlowGRPO", "--prompt", "x"], "is no Reward"),
        (["rewards.JPEGCompressibility", "--prompt", "x", "--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(words, message, folder, capsys):
    assert score(folder, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (folder / "out").exists()


def test_files_that_are_no_pictures_are_named(folder, capsys):
    (folder / "media" / "2.png").write_bytes(b"no picture")
    assert score(folder, "rewards.JPEGCompressibility", "--prompt", "x") == 2
    assert "2.png cannot be read as a picture" in capsys.readouterr().err
    (folder / "media" / "2.png").unlink()
    Image.new("1", (9000, 9000)).save(folder / "media" / "2.png")
    assert score(folder, "rewards.JPEGCompressibility", "--prompt", "x") == 2
    assert "2.png has 9000 x 9000 pixels; the most are 64,000,000" in capsys.readouterr().err
    words = ["score", "rewards.JPEGCompressibility", "--prompt", "x", "--media", str(folder / "nowhere")]
    assert main([*words, "--out", str(folder / "out")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_a_number_of_prompts_that_does_not_fit(folder, capsys):
    (folder / "p.txt").write_text("one\ntwo\n")
    assert score(folder, "rewards.JPEGCompressibility", "--prompts", str(folder / "p.txt")) == 2
    assert "4 files but 2 prompts: give one for all" in capsys.readouterr().err


def test_prompts_by_file_are_each_used_once_or_counted(folder, capsys, caplog):
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    given = folder / "given.jsonl"

    def told(*rows: str) -> tuple[int, str]:
        given.write_text("\n".join(rows))
        return score(folder, "rewards.JPEGCompressibility", "--prompts", str(given)), capsys.readouterr().err

    assert told(*lines, lines[0])[0] == 2
    assert "1 files have two prompts or more, such as \"file\": '3.png'" in told(*lines, lines[0])[1]
    assert 'some of the prompts have a "file"' in told(*lines[1:], '{"prompt": "a"}')[1]
    assert told(*lines, '{"prompt": "a", "file": "9.png"}')[0] == 0
    assert "1 prompts are of files that are not scored here, such as '9.png'" in caplog.text


def test_videos_are_read_with_their_rate(tmp_path):
    pytest.importorskip("av")
    import av

    from rewards.scoring import load

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in (40, 120, 200):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    pixels, fps = load(tmp_path / "a.mp4")
    assert fps == 8
    assert pixels.shape == (3, 3, 48, 64)
    assert torch.allclose(pixels.mean((1, 2, 3)) * 255, torch.tensor([40.0, 120, 200]), atol=4)

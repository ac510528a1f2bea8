"""Files of media: references that prompts name reach the reward, in training, evaluation and `flowalign score`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.cli import main
from flowalign.media import confined, load_references, shown
from flowalign.pictures import to_images
from flowalign.prompts import as_prompts
from flowalign.records import Media, Prompts
from rewards.base import as_reward
from tests.jobs import job
from trainers import Evaluation

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two prompts with a reference of one colour each, and prompts to evaluate on."""
    (tmp_path / "like").mkdir()
    lines = []
    for name, color in COLORS.items():
        Image.new("RGB", (32, 32), color).save(tmp_path / "like" / f"{name}.png")
        lines.append(json.dumps({"prompt": f"a {name} thing", "references": [f"like/{name}.png"]}))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return tmp_path


def write(folder: Path, references: object) -> str:
    (folder / "bad.jsonl").write_text(json.dumps({"prompt": "a", "references": references}))
    return str(folder / "bad.jsonl")


def test_training_and_evaluation_show_each_prompt_s_own_references(data):
    seen: list[tuple[str, Tensor]] = []

    def nearness(media: Media, prompts: Prompts) -> Tensor:
        assert media.references is not None
        seen.extend(zip(prompts.text, media.references, strict=True))
        return torch.stack([-(p - r[0]).square().mean() for p, r in zip(media.pixels, media.references, strict=True)])

    prompts = str(data / "prompts.jsonl")
    job(data / "run", reward=as_reward(nearness), prompts=prompts, epochs=1, evaluation=Evaluation(prompts, 1)).train()
    assert {text for text, _ in seen} == {"a red thing", "a blue thing"}
    assert len(seen) == 8 + 2 * 2  # 2 groups of 4, and two evaluations of 2
    for text, references in seen:
        wanted = torch.tensor([1.0, 0, 0] if "red" in text else [0, 0, 1.0])
        assert references.shape == (1, 3, 32, 32)
        assert torch.equal(references[0, :, 5, 5], wanted)
    assert len({id(references) for _, references in seen}) == 2  # read once


def test_score_shows_references(data, capsys):
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[:, 0] = 1
    (data / "media").mkdir()
    to_images(pixels)[0].save(data / "media" / "1.png")
    to_images(pixels)[0].save(data / "media" / "2.png")
    words = ["--media", str(data / "media"), "--prompts", str(data / "prompts.jsonl"), "--out", str(data / "out")]
    assert main(["score", "rewards.CLIPImageScore", "--model", "shapes", *words]) == 0
    told = [json.loads(line)["total"] for line in (data / "out" / "scores.jsonl").read_text().splitlines()]
    assert told[0] == pytest.approx(1, abs=1e-5)  # the picture is its own reference
    assert told[1] < 0.9


def test_some_with_references_and_some_without_are_refused(data):
    prompts = as_prompts(str(data / "prompts.jsonl")).all()
    assert shown(torch.rand(2, 3, 8, 8), Prompts(("a", "b"), ({}, {}))).references is None
    mixed = Prompts(("a red thing", "no one"), (prompts.metadata[0], {}))
    with pytest.raises(ValueError, match="prompt 'no one' has no references"):
        shown(torch.rand(2, 3, 8, 8), mixed)


@pytest.mark.parametrize(
    ("references", "told"),
    [
        ("like/red.png", "must be a list of picture files"),
        ([], "must be a list of picture files"),
        ([3], "must be a list of picture files"),
        (["like/green.png"], "the reference .*green.png is not a file"),
        (["../up.png"], "lies outside"),
        (["/etc/hostname"], "lies outside"),
    ],
)
def test_bad_references_are_named_by_line(data, references, told):
    with pytest.raises(ValueError, match=rf"bad.jsonl:1: .*{told}"):
        as_prompts(write(data, references))


def test_a_link_out_of_the_folder_is_refused(data, tmp_path_factory):
    outside = tmp_path_factory.mktemp("other") / "secret.png"
    outside.write_bytes(b"")
    (data / "like" / "link.png").symlink_to(outside)
    with pytest.raises(ValueError, match=r"like/link\.png lies outside"):
        confined(data, "like/link.png")


def test_references_that_cannot_be_used(data):
    (data / "like" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken.png cannot be read as a picture"):
        load_references((str(data / "like" / "broken.png"),))
    Image.new("RGB", (16, 32)).save(data / "like" / "narrow.png")
    with pytest.raises(ValueError, match=r"must have one size: .* have 32 x 32 and 16 x 32"):
        load_references((str(data / "like" / "red.png"), str(data / "like" / "narrow.png")))

"""Media to latents and back for every family, and the cache: once, resumable, checked, the same on any processes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.fitting import centre_crop, stretch
from flowalign.models import SD3, PipelineModel, Wan
from flowalign.pictures import to_images
from flowalign.preferences import Preferences, open_pair
from flowalign.preferences.latents import PairLatents, encoder_fingerprint
from flowalign.randomness import key_generator
from flowalign.videos import mp4
from tests import processes
from tests.families import CASES, Case
from tests.tiny import tiny_sd3
from tests.tiny_wan import tiny_wan


def smooth(*shape: int) -> Tensor:
    """Media in [0, 1] that are neither flat nor noise."""
    coarse = torch.rand(*shape[:-2], 4, 4, generator=torch.Generator().manual_seed(1))
    flat = torch.nn.functional.interpolate(coarse.flatten(0, -4), shape[-2:], mode="bilinear")
    return flat.view(shape)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_encode_then_decode_is_what_the_vae_makes_of_media(case: Case) -> None:
    """To 1e-5: the scale, shift and layout of latents cancel, and the posterior's mean is taken."""
    model: PipelineModel = case.adapt(case.make(), **{**case.options, **case.sizes[0]})  # type: ignore[arg-type]
    frames = () if model.frames is None else (model.frames,)
    pixels, vae = smooth(2, *frames, 3, model.height, model.width), model.pipeline.vae
    latents = model.encode_media(pixels)
    assert latents.shape == (2, *model.latent_shape)
    assert not latents.requires_grad
    films = "Wan" in type(vae).__name__ or "Qwen" in type(vae).__name__
    turned = pixels.unsqueeze(1) if films and not frames else pixels
    given = turned.transpose(1, 2) if films else turned  # [b, 3, f, h, w] for VAEs of videos
    with torch.no_grad():
        seen = vae.encode(given * 2 - 1)
        mean = seen.latent if hasattr(seen, "latent") else seen.latent_dist.mode()  # DC-AE gives no distribution
        made = vae.decode(mean, return_dict=False)[0]
        wanted = ((made.transpose(1, 2) if films else made) / 2 + 0.5).clamp(0, 1).view(pixels.shape)
        found = model.decode(latents)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert wanted.std() > 1e-4  # the tiny VAE's picture is one


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three pictures that are ranked, and three pairs, one of which is wide."""
    for i in range(9):
        noise = key_generator(0, "cache", i).random((12, 12 if i < 7 else 18, 3))
        Image.fromarray((255 * noise).astype("uint8")).resize((48 if i < 7 else 72, 48)).save(tmp_path / f"{i}.png")
    ranked = {"prompt": "three", "media": ["0.png", "1.png", "2.png"], "ranks": [2, 1, 2]}
    (tmp_path / "p.jsonl").write_text(json.dumps(ranked))
    pairs = [
        {"prompt": f"pair {i}", "first": f"{i}.png", "second": f"{i + 1}.png", "label": label, "scores": [0.5, i]}
        for i, label in ((3, "first"), (5, "second"), (7, "invalid"))
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row) for row in pairs))
    return tmp_path


class Counting(SD3):
    """Notes how many media its VAE has seen; may refuse after some calls."""

    def __init__(self) -> None:
        super().__init__(tiny_sd3(), max_sequence_length=12)
        self.calls, self.most = list[int](), 1000

    def encode_media(self, pixels: Tensor) -> Tensor:
        if len(self.calls) == self.most:
            raise KeyboardInterrupt
        self.calls.append(len(pixels))
        return super().encode_media(pixels)


def built(data: Path, model: SD3 | None = None, name: str = "q.jsonl", **more: Any) -> PairLatents:
    settings: dict[str, Any] = {"batch_size": 2, "pairs_per_shard": 2} | more
    return PairLatents(model or Counting(), str(data / name), str(data / "cache"), **settings)


def test_pairs_as_latents(data):
    model = Counting()
    made = built(data, model)
    assert len(made) == 3
    assert model.calls == [2, 2, 2]  # calls of one shape
    batch = made.rows([2, 0, 1])
    assert batch.prompts.text == ("pair 7", "pair 3", "pair 5")
    assert batch.sign.tolist() == [0, 1, -1]
    assert batch.valid.tolist() == [False, True, True]
    assert batch.margin.tolist() == [6.5, 2.5, 4.5]
    assert batch.scores.tolist() == [[0.5, 7], [0.5, 3], [0.5, 5]]
    assert made.signs.tolist() == [1, -1, 0]
    assert made.prompts([1]).text == ("pair 5",)
    media = [open_pair(row) for row in Preferences(str(data / "q.jsonl")).rows([2, 0, 1])]
    for side, found in (("first", batch.first), ("second", batch.second)):
        pixels = torch.stack([centre_crop(getattr(pair, side)[None], 32, 32)[0] for pair in media])
        torch.testing.assert_close(found, model.encode_media(pixels))
    win, lose = batch.ordered()
    assert torch.equal(win, torch.stack([batch.first[0], batch.first[1], batch.second[2]]))
    assert torch.equal(lose, torch.stack([batch.second[0], batch.second[1], batch.first[2]]))


def test_a_medium_of_many_pairs_is_encoded_once(data):
    model = Counting()
    made = built(data, model, "p.jsonl", pairs_per_shard=8, batch_size=4)
    assert model.calls == [4]  # three, and one that fills the call
    batch = made.rows(range(3))
    assert batch.sign.tolist() == [-1, 0, 1]
    assert batch.margin.isnan().all()
    assert torch.equal(batch.first[0], batch.first[1])
    assert torch.equal(batch.second[0], batch.first[2])
    assert not torch.equal(batch.first[0], batch.second[0])


def test_a_second_start_reads_and_an_interrupted_one_goes_on(data, capsys):
    whole = built(data).rows(range(3))
    model = Counting()
    again = built(data, model)
    assert model.calls == []
    assert torch.equal(again.rows(range(3)).first, whole.first)
    for path in again.folder.iterdir():
        path.unlink()
    model.most = 2
    with pytest.raises(KeyboardInterrupt):
        built(data, model)
    assert (again.folder / "00000.json").exists()
    assert not (again.folder / "00001.json").exists()
    model.most = 1000
    capsys.readouterr()
    assert torch.equal(built(data, model).rows(range(3)).second, whole.second)
    assert model.calls == [2, 2, 2]
    assert "made again" not in capsys.readouterr().err


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("00000.safetensors", flip, "00000.safetensors has changed (SHA-256 differs)"),
    ("00000.safetensors", cut, "bytes, not"),
    ("00000.safetensors", Path.unlink, "00000.safetensors is missing"),
    ("00000.json", cut, "00000.json is cut short or altered"),
]


@pytest.mark.parametrize(("name", "damage", "line"), DAMAGE)
def test_a_damaged_piece_is_made_again_with_a_line(data, capsys, name, damage, line):
    made = built(data)
    before = (made.folder / "00000.safetensors").read_bytes()
    damage(made.folder / name)
    capsys.readouterr()
    model = Counting()
    again = built(data, model)
    assert model.calls == [2, 2]  # of the damaged piece alone
    assert (again.folder / "00000.safetensors").read_bytes() == before
    assert line in capsys.readouterr().err


def test_a_picture_that_changes_is_noticed_and_one_that_goes_is_not_needed(data, capsys):
    made = built(data)
    (data / "7.png").unlink()
    Image.new("RGB", (48, 48)).save(data / "4.png")
    model = Counting()
    with pytest.raises(ValueError, match=r"q\.jsonl:3: 7\.png cannot be read"):
        built(data, model)  # the rows are looked at anew
    Image.new("RGB", (72, 48)).save(data / "7.png")
    capsys.readouterr()
    assert not torch.equal(built(data, model).rows([0]).second, made.rows([0]).first)
    assert "4.png has changed since; made again" in capsys.readouterr().err


def test_what_makes_other_latents_has_another_folder(data):
    folders = [built(data, **more).folder for more in ({}, {"fit": stretch}, {"precision": "float16"})]
    other = Counting()
    next(other.pipeline.vae.parameters()).data.mul_(1.01)
    assert encoder_fingerprint(other) != encoder_fingerprint(Counting())
    folders.append(built(data, other).folder)
    folders.append(built(data, SD3(tiny_sd3(), height=16, width=16, max_sequence_length=12)).folder)
    folders.append(built(data, name="p.jsonl").folder)
    assert len({*folders}) == 6
    assert built(data, batch_size=3).folder == folders[0]
    half, whole = built(data, precision="float16").rows([0, 1]), built(data).rows([0, 1])
    assert half.first.dtype == torch.float32
    torch.testing.assert_close(half.first, whole.first, atol=5e-3, rtol=1e-3)
    assert (built(data, fit=stretch).rows([2]).first - built(data).rows([2]).first).abs().max() > 1e-3


def test_what_cannot_be_encoded_stops_or_is_counted(data, capsys):
    Image.new("RGB", (8, 8)).save(data / "3.png")
    Image.new("RGB", (8, 8), "red").save(data / "4.png")
    with pytest.raises(ValueError, match=r"q\.jsonl:1: 8 x 8 pixels would be enlarged 4 times"):
        built(data)
    capsys.readouterr()
    made = built(data, on_bad="skip")
    assert made.prompts(range(len(made))).text == ("pair 5", "pair 7")
    assert made.left_out.count == 1
    assert "left out 1 of 3 preferences: " in capsys.readouterr().err
    built(data, on_bad="skip")
    assert "left out 1 of 3 preferences: " in capsys.readouterr().err  # told at every start
    assert len(built(data, most_enlarged=4.0)) == 3
    broken = (data / "q.jsonl").read_text() + "\n{"
    (data / "r.jsonl").write_text(broken)
    assert len(built(data, name="r.jsonl", on_bad="skip")) == 2
    with pytest.raises(ValueError, match=r"r\.jsonl:4: is not JSON"):
        built(data, name="r.jsonl")
    with pytest.raises(ValueError, match="batch_size and pairs_per_shard must be at least 1"):
        built(data, batch_size=0)


def shares(data: Path, folder: str, rank: int) -> dict[str, bytes]:
    made = PairLatents(Counting(), str(data / "q.jsonl"), str(data / folder), batch_size=2, pairs_per_shard=1)
    return {path.name: path.read_bytes() for path in made.folder.iterdir()}


def test_processes_write_the_same_pieces(data):
    (alone,) = processes.run(1, data, functools.partial(shares, data, "one"))
    for found in processes.run(2, data, functools.partial(shares, data, "two")):
        assert found == alone
    assert len(alone) == 7


def test_videos_as_latents(tmp_path):
    frames = (smooth(2, 9, 3, 64, 64) * 255).round().byte()
    for name, one in zip("ab", frames, strict=True):
        (tmp_path / f"{name}.mp4").write_bytes(mp4(one, 16))
    row = {"prompt": "a wave", "first": "a.mp4", "second": "b.mp4", "label": "first"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    model = Wan(tiny_wan(), height=32, width=32, frames=5, max_sequence_length=12)
    made = PairLatents(model, str(tmp_path / "p.jsonl"), str(tmp_path / "cache")).rows([0])
    assert made.first.shape == (1, *model.latent_shape)
    pair = open_pair(Preferences(str(tmp_path / "p.jsonl")).rows([0])[0])
    wanted = model.encode_media(centre_crop(pair.second[::2], 32, 32)[None])
    torch.testing.assert_close(made.second, wanted, atol=1e-5, rtol=1e-5)
    to_images(centre_crop(pair.first, 32, 32)[:1])[0].save(tmp_path / "a.png")
    (tmp_path / "q.jsonl").write_text(json.dumps(row | {"first": "a.png"}))
    with pytest.raises(ValueError, match=r"q\.jsonl:1: .* are a picture and a video"):
        PairLatents(model, str(tmp_path / "q.jsonl"), str(tmp_path / "cache"))

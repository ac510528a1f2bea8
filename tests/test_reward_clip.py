"""CLIPScore is transformers' own CLIP on PIL's own pictures, and has a gradient; the resize against PIL itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import tiny_sd3
from tiny_towers import save_clip
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flowalign.records import Media, Prompts
from rewards import CLIPScore
from rewards.clip import preprocessing
from rewards.pixels import (
    BICUBIC,
    BILINEAR,
    CLIP_MEAN,
    CLIP_STD,
    Kernel,
    Preprocessing,
    center_crop,
    normalise,
    resize,
    resize_shortest,
    to_eight_bit,
)

TEXTS = ("a red circle", "two blue squares above a cross", "", "x" * 300)


def eight_bit(height: int, width: int, count: int = 4) -> np.ndarray:
    """Pictures [n, h, w, 3]: a ramp, a checkerboard of 3 pixels, noise, smooth noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([255 * x / width, 255 * y / height, 255 - 255 * x / width], -1)
    board = np.repeat((255 * ((x // 3 + y // 3) % 2))[..., None], 3, -1)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height))
    made = [ramp, board, rng.integers(0, 256, (height, width, 3)), np.asarray(coarse)]
    return np.stack(made[:count]).astype(np.uint8)


def tensor(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


SIZES = [
    ((512, 512), (224, 224)),
    ((480, 640), (224, 298)),
    ((256, 256), (224, 224)),
    ((300, 200), (336, 224)),
    ((32, 32), (224, 224)),
    ((100, 130), (100, 64)),
    ((130, 100), (64, 100)),
    ((31, 225), (513, 77)),
]


KERNELS = pytest.mark.parametrize(
    ("kernel", "mode"), [(BICUBIC, "bicubic"), (BILINEAR, "bilinear")], ids=["bicubic", "bilinear"]
)


@KERNELS
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_resize_is_pils(before: tuple[int, int], after: tuple[int, int], kernel: Kernel, mode: str) -> None:
    pictures = eight_bit(*before)
    pil = [Image.fromarray(p).resize(after[::-1], Image.Resampling[mode.upper()]) for p in pictures]
    ours = (resize(tensor(pictures), *after, kernel) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(ours, np.stack([np.asarray(picture) for picture in pil]))


def test_resize_is_the_identity_at_its_own_size() -> None:
    pixels = torch.rand(1, 3, 20, 30)
    assert torch.equal(resize(pixels, 20, 30), to_eight_bit(pixels))


@KERNELS
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_gradient_is_the_plain_resizes(
    before: tuple[int, int], after: tuple[int, int], kernel: Kernel, mode: str
) -> None:
    """In float64, since the plain resize's own weights are good to 1e-4 only in float32."""
    pixels = tensor(eight_bit(*before, count=1))
    weight = torch.randn(1, 3, *after) * before[0] * before[1] / (after[0] * after[1])
    ours, plain = pixels.clone().requires_grad_(), pixels.double().requires_grad_()
    (resize(ours, *after, kernel) * weight).sum().backward()
    (F.interpolate(plain, after, mode=mode, antialias=True) * weight).sum().backward()
    assert ours.grad is not None
    assert plain.grad is not None
    assert plain.grad.std() > 0.05
    torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=0, atol=1e-5)
    assert (ours.grad - plain.grad).norm() < 1e-6 * plain.grad.norm()


def test_rounding() -> None:
    given = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 127.4 / 255, 1.0, 1.7, -0.3, torch.nan], requires_grad=True)
    rounded = to_eight_bit(given)
    expected = torch.tensor([0.0, 0.0, 1 / 255, 127 / 255, 1.0, 1.0, 0.0, torch.nan])
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0, equal_nan=True)
    (rounded * torch.arange(8.0)).nansum().backward()
    assert given.grad is not None
    assert given.grad[:7].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_crop_and_normalise() -> None:
    ramp = torch.arange(7.0).expand(1, 3, 4, 7)
    assert center_crop(ramp, 4)[0, 0, 0].tolist() == [1, 2, 3, 4], "a margin of 3 is 1 on the left and 2 on the right"
    assert resize_shortest(torch.rand(1, 3, 50, 75), 33).shape == (1, 3, 33, 49), "49.5 is rounded down"
    assert resize_shortest(torch.rand(1, 3, 75, 50), 33).shape == (1, 3, 49, 33)
    pixels = normalise(torch.ones(1, 3, 1, 1), (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    assert pixels.flatten().tolist() == [1.0, 3.0, 0.5]
    with pytest.raises(ValueError, match="cannot crop 5 x 5 out of a picture of 4 x 7"):
        center_crop(ramp, 5)


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("shape", [(48, 48), (91, 64), (64, 91), (40, 83), (30, 47)])
def test_preprocessing_is_transformers(shape: tuple[int, int], resample: int) -> None:
    pictures = eight_bit(*shape)
    config = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "resample": resample}
    processor = CLIPImageProcessorPil(**config)
    theirs = processor(images=[Image.fromarray(p) for p in pictures], return_tensors="pt").pixel_values
    prepare = preprocessing("it", config, 32)
    assert prepare.kernel == (BILINEAR if resample == 2 else BICUBIC)
    torch.testing.assert_close(prepare(tensor(pictures)), theirs, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub has them, with a crop smaller than the resize and constants of its own."""
    path = save_clip(tmp_path_factory.mktemp("clip"))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 36},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.25, 0.3],
    )
    processor.save_pretrained(path)
    return path


def prompts(*texts: str) -> Prompts:
    return Prompts(texts, ({},) * len(texts))


def reference(folder: Path, pictures: np.ndarray, texts: list[str], processor: CLIPImageProcessorPil) -> Tensor:
    """The cosine as transformers' documentation has it: its processor on PIL pictures, its tokenizer, its forward."""
    model, tokenizer = CLIPModel.from_pretrained(folder).float(), CLIPTokenizer.from_pretrained(folder)
    pixels = processor(images=[Image.fromarray(p) for p in pictures], return_tensors="pt").pixel_values
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
    with torch.no_grad():
        return model(pixel_values=pixels, **tokens).logits_per_image.diag() / model.logit_scale.exp()


@pytest.mark.parametrize("shape", [(32, 32), (91, 64), (128, 160)])
def test_cosine_is_transformers(folder: Path, shape: tuple[int, int]) -> None:
    pictures = eight_bit(*shape)
    expected = reference(folder, pictures, list(TEXTS), CLIPImageProcessorPil.from_pretrained(folder))
    scores = CLIPScore(str(folder), batch_size=3).score(Media(tensor(pictures)), prompts(*TEXTS))
    assert expected.std() > 0.01
    torch.testing.assert_close(scores.total, expected, rtol=0, atol=1e-5)
    assert scores.parts["clip_score"].equal(scores.total)
    assert scores.valid.all()


def test_without_a_preprocessor_config(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if "processor" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    reward, pictures = CLIPScore(str(tmp_path)), eight_bit(50, 40)
    assert reward.prepare == Preprocessing(32, 32, CLIP_MEAN, CLIP_STD)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = reference(folder, pictures, list(TEXTS), processor)
    scores = reward.score(Media(tensor(pictures)), prompts(*TEXTS))
    torch.testing.assert_close(scores.total, expected, rtol=0, atol=1e-5)


def test_the_embedded_model_by_its_short_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip").symlink_to(folder)
    monkeypatch.setattr("flowalign.shapes.WEIGHTS", tmp_path)
    media, by_path = Media(tensor(eight_bit(32, 32))), CLIPScore(str(folder))
    by_name = CLIPScore("shapes")
    assert by_name.prepare == by_path.prepare
    assert torch.equal(by_name.score(media, prompts(*TEXTS)).total, by_path.score(media, prompts(*TEXTS)).total)
    monkeypatch.setattr("flowalign.shapes.WEIGHTS", tmp_path / "none")
    with pytest.raises(ValueError, match="the CLIP model 'shapes' can be had neither"):
        CLIPScore("shapes")


def test_prefix(folder: Path) -> None:
    media = Media(tensor(eight_bit(32, 32)))
    bare = CLIPScore(str(folder)).score(media, prompts(*(f"A photo depicts {text}" for text in TEXTS))).total
    assert torch.equal(CLIPScore(str(folder), prefix="A photo depicts ").score(media, prompts(*TEXTS)).total, bare)


def test_a_score_does_not_depend_on_its_batch(folder: Path) -> None:
    reward, pixels = CLIPScore(str(folder)), tensor(eight_bit(40, 40))
    together = reward.score(Media(pixels), prompts(*TEXTS)).total
    for i in (3, 1, 0, 2):
        alone = CLIPScore(str(folder), batch_size=1).score(Media(pixels[i : i + 1]), prompts(TEXTS[i])).total
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-5)


def test_each_text_is_embedded_once(folder: Path) -> None:
    reward, media = CLIPScore(str(folder)), Media(tensor(eight_bit(32, 32)))
    first = reward.score(media, prompts("a", "b", "a", "b")).total
    assert sorted(reward._embedded) == ["a", "b"]
    for parameter in reward.model.text_model.parameters():
        parameter.data.zero_()
    assert torch.equal(reward.score(media, prompts("a", "b", "a", "b")).total, first)
    assert not torch.allclose(reward.score(media, prompts("b", "a", "b", "a")).total, first)


def test_the_texts_used_last_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.towers.TEXTS_KEPT", 2)
    reward, media = CLIPScore(str(folder)), Media(tensor(eight_bit(32, 32, count=3)))
    first = reward.score(media, prompts("a", "b", "c")).total
    assert [*reward._embedded] == ["b", "c"]
    reward.score(media, prompts("b", "b", "d"))
    assert [*reward._embedded] == ["b", "d"]
    torch.testing.assert_close(reward.score(media, prompts("a", "b", "c")).total, first, rtol=0, atol=1e-5)


def test_gradient_reaches_the_pixels_and_climbs(folder: Path) -> None:
    reward = CLIPScore(str(folder))
    pixels = (0.2 + 0.6 * tensor(eight_bit(48, 48, count=3))).requires_grad_()
    asked = prompts(*TEXTS[:3])
    before = reward.score(Media(pixels), asked).total
    before.sum().backward()
    assert pixels.grad is not None
    assert all(parameter.grad is None for parameter in reward.model.parameters())
    step = pixels.grad / pixels.grad.abs().amax((1, 2, 3), keepdim=True)
    up, down = (reward.score(Media(pixels.detach() + sign * 0.1 * step), asked).total for sign in (1, -1))
    assert (up > before).all()
    assert (down < before).all()
    assert reward.differentiable


def test_gradient_against_finite_differences(folder: Path) -> None:
    """Along the gradient of the score of a random picture; the rounding to 8 bit averages out over 3072 pixels."""
    reward, asked = CLIPScore(str(folder)), prompts("a red circle")
    pixels = (0.3 + 0.4 * torch.rand(1, 3, 32, 32)).requires_grad_()
    reward.score(Media(pixels), asked).total.sum().backward()
    assert pixels.grad is not None
    direction = pixels.grad / pixels.grad.norm()
    up, down = (reward.score(Media(pixels.detach() + e * direction), asked).total for e in (0.25, -0.25))
    assert ((up - down) / 0.5).item() == pytest.approx(pixels.grad.norm().item(), rel=0.1)


def test_scores_are_float32_under_autocast(folder: Path) -> None:
    reward, media = CLIPScore(str(folder)), Media(tensor(eight_bit(32, 32)))
    plain = reward.score(media, prompts(*TEXTS)).total
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(CLIPScore(str(folder)).score(media, prompts(*TEXTS)).total, plain)


def test_half_precision_weights_are_computed_in_float32(folder: Path, tmp_path: Path) -> None:
    model = CLIPModel.from_pretrained(folder)
    model.half().save_pretrained(tmp_path)
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    reward = CLIPScore(str(tmp_path))
    assert {parameter.dtype for parameter in reward.model.parameters()} == {torch.float32}


def test_a_broken_picture_has_no_score(folder: Path) -> None:
    pixels = tensor(eight_bit(32, 32))
    pixels[1, 0, 5, 5] = torch.nan
    assert CLIPScore(str(folder)).score(Media(pixels), prompts(*TEXTS)).valid.tolist() == [True, False, True, True]


def copied(folder: Path, to: Path, leave_out: str = "") -> Path:
    for file in folder.iterdir():
        if not leave_out or leave_out not in file.name:
            (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "no-one/no-such-model"])
def test_a_wrong_name_is_one_clear_line(name: str) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        CLIPScore(name)
    assert "\n" not in str(caught.value)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    text_encoder = tiny_sd3().text_encoder
    text_encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a model of type 'clip_text_model', CLIPScore needs a CLIPModel"):
        CLIPScore(str(tmp_path))


def test_a_folder_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no tokenizer"):
        CLIPScore(str(copied(folder, tmp_path, leave_out="tokenizer")))


def test_a_folder_without_weights(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can be had neither as a folder nor from the hub") as caught:
        CLIPScore(str(copied(folder, tmp_path, leave_out="safetensors")))
    assert "\n" not in str(caught.value)


def test_a_folder_with_some_weights(folder: Path, tmp_path: Path) -> None:
    CLIPModel.from_pretrained(folder).vision_model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="lacks weights of a CLIPModel: "):
        CLIPScore(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"height": 32, "width": 32}}, "does not resize the shortest side"),
        ({"crop_size": {"height": 32, "width": 16}}, "does not resize the shortest side"),
        ({"do_center_crop": False}, "does not resize the shortest side"),
        ({"resample": 1}, "resizes with PIL's filter 1; known are bilinear"),
    ],
)
def test_another_way_to_prepare_pictures(folder: Path, tmp_path: Path, change: dict, message: str) -> None:
    file = copied(folder, tmp_path) / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        CLIPScore(str(tmp_path))


def test_sizes_as_openai_wrote_them(folder: Path, tmp_path: Path) -> None:
    file = copied(folder, tmp_path) / "preprocessor_config.json"
    file.write_text(json.dumps({"size": 40, "crop_size": 32, "resample": 3, "do_resize": True}))
    assert CLIPScore(str(tmp_path)).prepare == Preprocessing(40, 32)


def test_wrong_settings(folder: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        CLIPScore(str(folder), batch_size=0)
    with pytest.raises(ValueError, match="CLIPScore scores pictures"):
        CLIPScore(str(folder)).score(Media(torch.rand(1, 2, 3, 32, 32)), prompts("a"))

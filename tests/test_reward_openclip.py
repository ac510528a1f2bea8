"""OpenCLIPScore: recorded preprocessing of open_clip; where open_clip is installed, its own cosine too."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_towers import check_bfloat16, check_finite_differences
from torch import Tensor

from flowalign.pictures import to_images
from flowalign.records import Media, Prompts
from rewards.openclip import OpenCLIPScore, crop_or_pad, preparation
from rewards.pixels import normalise

GOLDEN = Path(__file__).parent / "golden/rewards/openclip.safetensors"
SHAPES = ((48, 31), (23, 40), (16, 16), (20, 9))
INSTALLED = importlib.util.find_spec("open_clip") is not None
needs_open_clip = pytest.mark.skipif(not INSTALLED, reason="the extra openclip is not installed")
LAYERS = {"width": 32, "layers": 2}
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": LAYERS | {"image_size": 16, "patch_size": 8, "head_width": 16},
        "text_cfg": LAYERS | {"context_length": 20, "vocab_size": 49408, "heads": 2},
    },
    "preprocess_cfg": {"resize_mode": "squash", "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7]},
}


def ways() -> list[dict[str, Any]]:
    with safe_open(GOLDEN, "pt") as file:
        return json.loads(file.metadata()["ways"])


def prompts(*texts: str) -> Prompts:
    return Prompts(texts, ({},) * len(texts))


@pytest.mark.parametrize("way", range(5))
@pytest.mark.parametrize("picture", range(4))
def test_preparation_is_open_clips(way: int, picture: int) -> None:
    held = load_file(GOLDEN)
    pixels = held[f"picture_{picture}"].permute(2, 0, 1)[None].float() / 255
    assert tuple(pixels.shape[2:]) == SHAPES[picture]
    ours, theirs = preparation(ways()[way], "it")(pixels)[0], held[f"prepared_{way}_{picture}"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_middle_and_a_border() -> None:
    ramp = torch.arange(7.0).expand(1, 3, 2, 7)
    made = crop_or_pad(ramp, 5, 4, 9.0)[0, 0]
    assert made[1].tolist() == [2, 3, 4, 5], "half of 3 is rounded to 2, to even"
    assert made[:, 0].tolist() == [9, 2, 2, 9, 9]


@pytest.mark.parametrize("change", [{"interpolation": "bilinear"}, {"size": [16, 20]}, {"resize_mode": "other"}])
def test_ways_that_are_not_known(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ViT-X resizes .*known"):
        preparation(ways()[0] | change, "ViT-X")


@pytest.mark.skipif(INSTALLED, reason="open_clip is installed")
def test_without_open_clip() -> None:
    with pytest.raises(ValueError, match=r"needs open_clip .*pip install 'flowalign-diffusion\[openclip\]'"):
        OpenCLIPScore("ViT-B-32", "openai")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as open_clip saves it, with preprocessing of its own."""
    import open_clip

    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("open_clip")
    (path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    model = open_clip.CLIP(**CONFIG["model_cfg"])
    for name, parameter in model.named_parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter) * (name != "logit_scale"))
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    return path


def theirs(folder: Path, pixels: Tensor, texts: tuple[str, ...]) -> Tensor:
    import open_clip

    model, prepare = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    images = torch.stack([prepare(picture) for picture in to_images(pixels)])
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(list(texts))
    with torch.no_grad():
        pair = model.eval().encode_image(images), model.encode_text(tokens)
    return F.cosine_similarity(*pair)


@needs_open_clip
def test_cosine_is_open_clips(folder: Path) -> None:
    texts = ("A red  circle", "two \u201csquares\u201d", "", "x " * 50)
    pixels = torch.rand(4, 3, 24, 40)
    expected = theirs(folder, pixels, texts)
    reward = OpenCLIPScore(f"local-dir:{folder}", batch_size=3)
    assert expected.std() > 0.01
    torch.testing.assert_close(reward(Media(pixels), prompts(*texts)).total, expected, rtol=0, atol=1e-5)
    one = reward(Media(pixels), prompts(*texts), chunk=1).total
    torch.testing.assert_close(one, expected, rtol=0, atol=1e-5)


@needs_open_clip
def test_gradient_climbs(folder: Path) -> None:
    reward, asked = OpenCLIPScore(f"local-dir:{folder}"), prompts("a red circle")
    pixels = (0.3 + 0.4 * torch.rand(1, 3, 32, 32)).requires_grad_()
    before = reward(Media(pixels), asked, grad=True).total
    before.sum().backward()
    assert pixels.grad is not None
    step = 0.05 * pixels.grad / pixels.grad.abs().max()
    up, down = (reward(Media(pixels.detach() + sign * step), asked).total for sign in (1, -1))
    assert down < before < up


@needs_open_clip
def test_gradient_against_finite_differences(folder: Path) -> None:
    """Pictures in 8 bits of the network's size, where nothing is rounded; differences of the cosine by the network."""
    reward = OpenCLIPScore(f"local-dir:{folder}")
    levels = torch.randint(0, 256, (1, 3, 16, 16)).div(255).requires_grad_()
    total = reward(Media(levels), prompts("a red circle"), grad=True).total
    (slope,) = torch.autograd.grad(total.sum(), levels)
    text = reward.embed_texts(["a red circle"], torch.device("cpu")).double()
    reward.model.double()
    mean, std = CONFIG["preprocess_cfg"]["mean"], CONFIG["preprocess_cfg"]["std"]

    def smooth(pixels: Tensor) -> Tensor:
        return F.cosine_similarity(reward.model.encode_image(normalise(pixels, mean, std)), text).sum()

    assert smooth(levels.detach().double()).item() == pytest.approx(total.item(), abs=1e-5)
    check_finite_differences(slope, smooth, levels.detach())


@needs_open_clip
def test_bfloat16_is_near(folder: Path) -> None:
    full = OpenCLIPScore(f"local-dir:{folder}")
    half = OpenCLIPScore(f"local-dir:{folder}", dtype="bfloat16", offload=True)
    check_bfloat16(full, half, Media(torch.rand(2, 3, 24, 40)), prompts("a red circle", "two squares"), 0.02)
    assert half.model.text_projection.dtype == torch.bfloat16
    assert half.model.logit_scale.dtype == torch.float32


@needs_open_clip
def test_wrong_names(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"which weights of 'ViT-B-32'\? open_clip's tags for it: openai, "):
        OpenCLIPScore("ViT-B-32")
    with pytest.raises(ValueError, match="open_clip cannot make 'no-such' with weights 'openai'"):
        OpenCLIPScore("no-such", "openai")
    with pytest.raises(ValueError, match="cannot make 'local-dir:/nowhere' with its weights"):
        OpenCLIPScore("local-dir:/nowhere")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="with its weights: "):
        OpenCLIPScore(f"local-dir:{folder}")

"""The aesthetic predictors are their authors' layers, one after another, on transformers' own embeddings."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_towers import check_bfloat16, noised
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from flowalign.pictures import to_images
from flowalign.records import Media, Prompts
from rewards.aesthetic import Aesthetic, AestheticV25, read_head
from rewards.pixels import CLIP_MEAN, CLIP_STD, normalise
from rewards.siglip import HALF

GOLDEN = Path(__file__).parent / "golden/rewards/aesthetic.safetensors"
HEADS = os.environ.get("FLOWALIGN_AESTHETIC_HEADS", "")
TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = TOWER | {"image_size": 16, "patch_size": 8}


def none(count: int) -> Prompts:
    return Prompts(("",) * count, ({},) * count)


def head(width: int, last_dropout: bool) -> nn.Sequential:
    """The authors' layers at another size: v2.5 has one more dropout, before the last."""
    layers = [nn.Linear(width, 12), nn.Dropout(), nn.Linear(12, 9), nn.Dropout(), nn.Linear(9, 7), nn.Dropout()]
    layers += [nn.Linear(7, 5), *([nn.Dropout()] if last_dropout else []), nn.Linear(5, 1)]
    made = nn.Sequential(*layers).eval()
    for parameter in made.parameters():
        parameter.data.mul_(3)
    return made


def save_head(layers: nn.Module, prefix: str, path: Path) -> None:
    torch.save({f"{prefix}.{name}": value for name, value in layers.state_dict().items()}, path)


@pytest.fixture(scope="module")
def laion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("laion")
    model = CLIPModel(CLIPConfig(text_config=TOWER, vision_config=VISION, projection_dim=16))
    noised(model, 0.15).save_pretrained(path)
    save_head(head(16, False), "layers", path / "aesthetic-model.pth")
    return path


@pytest.fixture(scope="module")
def v25(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("v25")
    text = TOWER | {"vocab_size": 20, "max_position_embeddings": 8, "projection_size": 24}
    noised(SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)), 0.15).save_pretrained(path)
    layers = head(24, True).bfloat16()
    save_head(layers, "scoring_head", path / "aesthetic_predictor_v2_5.pth")
    return path


@pytest.fixture(scope="module", params=["laion", "v25"])
def reward(request: pytest.FixtureRequest, laion: Path, v25: Path) -> Aesthetic | AestheticV25:
    if request.param == "laion":
        return Aesthetic(str(laion), str(laion))
    return AestheticV25(str(v25), str(v25))


def check(scored: Tensor, features: Tensor, layers: nn.Module) -> None:
    with torch.no_grad():
        expected = layers(features / features.norm(dim=1, keepdim=True))[:, 0]
    assert expected.std() > 0.01
    torch.testing.assert_close(scored, expected, rtol=0, atol=1e-5)


def loaded(layers: nn.Sequential, path: Path, prefix: str) -> nn.Sequential:
    state = torch.load(path, weights_only=True)
    layers.load_state_dict({name.removeprefix(f"{prefix}."): value for name, value in state.items()})
    return layers


@torch.no_grad()
def test_v2_is_the_layers_on_clips_embedding(laion: Path) -> None:
    pixels = torch.rand(5, 3, 24, 40)
    prepared = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)(to_images(pixels), return_tensors="pt")
    features = CLIPModel.from_pretrained(laion).eval().get_image_features(**prepared).pooler_output
    layers = loaded(head(16, False), laion / "aesthetic-model.pth", "layers")
    scores = Aesthetic(str(laion), str(laion / "aesthetic-model.pth"))(Media(pixels), none(5))
    check(scores.total, features, layers)
    assert list(scores.parts) == ["aesthetic"]


@torch.no_grad()
def test_v2_5_is_the_layers_on_siglips_pooled_output(v25: Path) -> None:
    pixels = torch.rand(5, 3, 24, 40)
    prepared = SiglipImageProcessorPil(size={"height": 16, "width": 16})(to_images(pixels), return_tensors="pt")
    features = SiglipModel.from_pretrained(v25).eval().get_image_features(**prepared).pooler_output
    layers = loaded(head(24, True), v25 / "aesthetic_predictor_v2_5.pth", "scoring_head")
    scores = AestheticV25(str(v25), str(v25))(Media(pixels), none(5))
    check(scores.total, features, layers)
    assert list(scores.parts) == ["aesthetic_v2_5"]


def test_a_score_depends_on_nothing_but_its_own(reward: Aesthetic | AestheticV25) -> None:
    pixels, order = torch.rand(7, 3, 24, 24), [3, 0, 6, 2, 5, 1, 4]
    together = reward(Media(pixels), none(7)).total
    for chunk in (1, 3):
        torch.testing.assert_close(reward(Media(pixels), none(7), chunk=chunk).total, together, rtol=0, atol=1e-6)
    torch.testing.assert_close(reward(Media(pixels[order]), none(7)).total, together[order], rtol=0, atol=1e-6)
    assert torch.equal(reward(Media(pixels), Prompts(tuple("abcdefg"), ({},) * 7)).total, together)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(Media(pixels), none(7)).total, together)


def smooth(reward: Aesthetic | AestheticV25) -> Callable[[Tensor], Tensor]:
    """The score in float64 without rounding to 8 bit, for pictures of the network's size."""
    clip = isinstance(reward, Aesthetic)
    mean, std = (CLIP_MEAN, CLIP_STD) if clip else (HALF, HALF)

    def score(pixels: Tensor) -> Tensor:
        given = normalise(pixels, mean, std)
        out = reward.model.get_image_features(pixel_values=given) if clip else reward.model(pixel_values=given)
        return (F.normalize(out.pooler_output, dim=1) @ reward.weight.double() + reward.bias.double()).sum()

    return score


def test_gradient_against_finite_differences(reward: Aesthetic | AestheticV25) -> None:
    levels = torch.randint(0, 256, (1, 3, 16, 16)).div(255).requires_grad_()
    reward(Media(levels), none(1), grad=True).total.sum().backward()
    reward.model.double()
    score, pixels = smooth(reward), levels.detach().double().requires_grad_()
    score(pixels).backward()
    assert levels.grad is not None
    assert pixels.grad is not None
    torch.testing.assert_close(levels.grad.double(), pixels.grad, rtol=1e-3, atol=1e-6)
    assert levels.grad.norm() > 1e-3
    with torch.no_grad():
        for _ in range(8):
            step = 1e-5 * torch.randn_like(pixels)
            difference = ((score(pixels + step) - score(pixels - step)) / 2).item()
            assert difference == pytest.approx((pixels.grad * step).sum().item(), rel=1e-3)
    reward.model.float()


def test_bfloat16_is_near(reward: Aesthetic | AestheticV25, laion: Path, v25: Path) -> None:
    """The head is in float32, and spreads an error of 1 % of an embedding with its weights' norm."""
    path = str(laion if isinstance(reward, Aesthetic) else v25)
    half = type(reward)(model=path, head=path, dtype="bfloat16", offload=True)
    assert torch.equal(half.weight, reward.weight)
    check_bfloat16(reward, half, Media(torch.rand(3, 3, 24, 40)), none(3), 0.01 * reward.weight.norm().item())


def test_a_broken_picture_has_no_score(reward: Aesthetic | AestheticV25) -> None:
    pixels = torch.rand(3, 3, 20, 16)
    pixels[1, 0, 3, 3] = torch.nan
    assert reward(Media(pixels), none(3)).valid.tolist() == [True, False, True]


def test_a_head_with_relus_is_refused(tmp_path: Path) -> None:
    """They are numbered otherwise: multiplied into one layer they would be another predictor."""
    layers = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 1))
    save_head(layers, "layers", tmp_path / "relu.pth")
    with pytest.raises(ValueError, match=r"lacks 8 \(layers.2.bias, .* and has 2 that do not belong to it \(layers.3"):
        read_head(tmp_path / "relu.pth", "layers", (0, 2, 4, 6, 7))


def test_layers_that_do_not_fit(tmp_path: Path) -> None:
    save_head(nn.Sequential(nn.Linear(4, 3), nn.Linear(2, 1)), "layers", tmp_path / "head.pth")
    with pytest.raises(ValueError, match="layer 1 takes 2 numbers, and the one before makes 3"):
        read_head(tmp_path / "head.pth", "layers", (0, 1))
    save_head(nn.Sequential(nn.Linear(4, 3)), "layers", tmp_path / "head.pth")
    with pytest.raises(ValueError, match="makes 3 scores, not one"):
        read_head(tmp_path / "head.pth", "layers", (0,))


def test_what_is_not_there(laion: Path, v25: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"aesthetic-model.pth of 'no-one/nothing' cannot be had from the hub") as told:
        Aesthetic(str(laion), "no-one/nothing")
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match=r"neither a file .* nor .*/aesthetic_predictor_v2_5.pth"):
        AestheticV25(str(tmp_path), str(v25))
    with pytest.raises(ValueError, match=r"Aesthetic needs a CLIPModel \(type 'clip'\)"):
        Aesthetic(str(v25), str(laion))
    with pytest.raises(ValueError, match="the CLIP model 'no-one/nothing' can be had neither"):
        Aesthetic("no-one/nothing", str(laion))
    save_head(head(17, False), "layers", tmp_path / "other.pth")
    with pytest.raises(ValueError, match="head of Aesthetic takes 17 numbers, the model's embeddings have 16"):
        Aesthetic(str(laion), str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Aesthetic(str(laion), str(laion), batch_size=0)


@pytest.mark.skipif(not HEADS, reason="FLOWALIGN_AESTHETIC_HEADS names no folder of the two published heads")
@pytest.mark.parametrize(
    ("name", "file", "prefix", "layers"),
    [
        ("laion", "sac+logos+ava1-l14-linearMSE.pth", "layers", (0, 2, 4, 6, 7)),
        ("v25", "aesthetic_predictor_v2_5.pth", "scoring_head", (0, 2, 4, 6, 8)),
    ],
)
def test_the_published_heads(name: str, file: str, prefix: str, layers: tuple[int, ...]) -> None:
    expected = load_file(GOLDEN)
    weight, bias = read_head(Path(HEADS) / file, prefix, layers)
    given = torch.from_numpy(np.random.RandomState(0).standard_normal((8, len(weight))))
    scores = F.normalize(given, dim=1).float() @ weight + bias
    torch.testing.assert_close(scores.double(), expected[f"{name}/scores"], rtol=0, atol=1e-5)
    assert weight.norm().item() == pytest.approx(expected[f"{name}/norm"].item(), rel=1e-6)
    assert bias.item() == pytest.approx(expected[f"{name}/bias"].item(), rel=1e-6)

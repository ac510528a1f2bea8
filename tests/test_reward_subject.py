"""Subject fidelity: mean cosines over all pairs, as transformers' own models give them on PIL's own pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_towers import noised, save_clip, save_vit
from torch import Tensor
from transformers import CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flowalign.pictures import to_images
from flowalign.records import Media, Prompts
from rewards.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise
from rewards.subject import CLIPImageScore, DINOScore, DINOv2Score, ReferenceScore

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny ViT, DINOv2 and CLIP with random weights, as the hub has them."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("vit", "dinov2", "clip")}
    save_vit(made["vit"])
    torch.manual_seed(3)
    noised(Dinov2Model(Dinov2Config(**SIZES)), 0.2).save_pretrained(made["dinov2"])
    save_clip(made["clip"])
    processor = CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(made["clip"])
    return made


@pytest.fixture(scope="module")
def dino(folders: dict[str, Path]) -> DINOScore:
    return DINOScore(str(folders["vit"]), resize=36, crop=32, batch_size=3)


@pytest.fixture(scope="module")
def clip(folders: dict[str, Path]) -> CLIPImageScore:
    return CLIPImageScore(str(folders["clip"]), batch_size=3)


@pytest.fixture(params=["dino", "clip"])
def reward(request: pytest.FixtureRequest) -> ReferenceScore:
    return request.getfixturevalue(request.param)


def smooth(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth random pictures in 8 bit."""
    rough = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(rough, (height, width), mode="bilinear").mul(255).round().div(255)


def prompts(count: int) -> Prompts:
    return Prompts(("",) * count, ({},) * count)


def media(count: int = 4, height: int = 43, width: int = 52) -> Media:
    """Pictures, each with 1 to 3 references that have sizes of their own."""
    references = tuple(smooth(1 + i % 3, 40 + 3 * i, 60 - 5 * i, seed=10 + i) for i in range(count))
    return Media(smooth(count, height, width), references=references)


def prepared(pixels: Tensor) -> Tensor:
    """As in DINO's eval_knn.py, with torchvision's sizes and margins worked out by hand: 36 pixels, then 32."""
    made = []
    for image in to_images(pixels):
        shortest = min(image.size)
        width, height = (int(36 * side / shortest) for side in image.size)
        resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        left, top = round((width - 32) / 2.0), round((height - 32) / 2.0)
        made.append((resized[top : top + 32, left : left + 32] - IMAGENET_MEAN) / IMAGENET_STD)
    return torch.from_numpy(np.stack(made)).float().permute(0, 3, 1, 2)


def pairwise(given: Media, embed: object) -> Tensor:
    """Pair by pair, and then the mean, as DreamBooth describes it."""
    assert given.references is not None
    scores = []
    for i, references in enumerate(given.references):
        one, others = embed(given.pixels[i : i + 1]), embed(references)  # type: ignore[operator]
        scores.append(torch.stack([F.cosine_similarity(one[0], other, dim=0) for other in others]).mean())
    return torch.stack(scores)


@pytest.mark.parametrize("shape", [(32, 32), (43, 52), (36, 39), (80, 57)])
def test_dino_is_transformers(dino: DINOScore, folders: dict[str, Path], shape: tuple[int, int]) -> None:
    model = ViTModel.from_pretrained(folders["vit"], add_pooling_layer=False)
    given = media(4, *shape)
    with torch.no_grad():
        expected = pairwise(given, lambda pixels: model(prepared(pixels)).last_hidden_state[:, 0])
    scores = dino(given, prompts(4))
    assert expected.std() > 0.02
    torch.testing.assert_close(scores.total, expected, rtol=0, atol=1e-5)
    assert scores.parts["dino"].equal(scores.total)
    assert scores.valid.all()


def test_dinov2_is_transformers(folders: dict[str, Path]) -> None:
    model, given = Dinov2Model.from_pretrained(folders["dinov2"]), media()
    with torch.no_grad():
        expected = pairwise(given, lambda pixels: model(prepared(pixels)).pooler_output)
    scores = DINOv2Score(str(folders["dinov2"]), resize=36, crop=32)(given, prompts(4))
    assert expected.std() > 0.02
    torch.testing.assert_close(scores.parts["dinov2"], expected, rtol=0, atol=1e-5)


def test_clip_i_is_transformers(clip: CLIPImageScore, folders: dict[str, Path]) -> None:
    model, given = CLIPModel.from_pretrained(folders["clip"]), media()
    processor = CLIPImageProcessorPil.from_pretrained(folders["clip"])

    def embed(pixels: Tensor) -> Tensor:
        given = processor(images=to_images(pixels), return_tensors="pt").pixel_values
        return model.get_image_features(pixel_values=given).pooler_output

    with torch.no_grad():
        expected = pairwise(given, embed)
    scores = clip(given, prompts(4))
    assert expected.std() > 0.02
    torch.testing.assert_close(scores.parts["clip_i"], expected, rtol=0, atol=1e-5)


def test_dino_looks_at_any_crop(folders: dict[str, Path]) -> None:
    """Position embeddings are interpolated from 4 x 4 patches to 3 x 3, as transformers does."""
    given = Media(smooth(2, 24, 24), references=(smooth(1, 24, 24, 1), smooth(1, 24, 24, 2)))
    model = ViTModel.from_pretrained(folders["vit"], add_pooling_layer=False)

    def embed(pixels: Tensor) -> Tensor:
        shown = normalise(pixels, IMAGENET_MEAN, IMAGENET_STD)
        return model(shown, interpolate_pos_encoding=True).last_hidden_state[:, 0]

    with torch.no_grad():
        expected = pairwise(given, embed)
    scores = DINOScore(str(folders["vit"]), resize=24, crop=24)(given, prompts(2)).total
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def test_a_picture_is_most_like_itself(reward: ReferenceScore) -> None:
    pixels = smooth(3, 40, 40)
    scores = reward(Media(pixels, references=tuple(pixels[i : i + 1] for i in range(3))), prompts(3)).total
    torch.testing.assert_close(scores, torch.ones(3), rtol=0, atol=1e-5)
    others = reward(Media(pixels, references=tuple(pixels[[i]] for i in (1, 2, 0))), prompts(3)).total
    assert (others < 0.99).all()


def test_the_embedded_clip_knows_its_shapes() -> None:
    """With real weights: a red square is more like another red square than like a blue one."""
    pixels = torch.full((3, 3, 64, 64), 0.9)
    for i, (color, at) in enumerate([((0.9, 0.1, 0.1), 16), ((0.9, 0.1, 0.1), 20), ((0.1, 0.1, 0.9), 16)]):
        pixels[i, :, at : at + 28, at : at + 28] = torch.tensor(color)[:, None, None]
    given = Media(pixels[[0, 0]], references=(pixels[1:2], pixels[2:3]))
    same, other = CLIPImageScore("shapes")(given, prompts(2)).total
    assert same > other + 0.05


def test_a_score_does_not_depend_on_its_batch(reward: ReferenceScore) -> None:
    given, asked = media(7), prompts(7)
    together = reward(given, asked).total
    singles = torch.cat([reward(given.rows([i]), asked.rows([i])).total for i in range(7)])
    torch.testing.assert_close(singles, together, rtol=0, atol=1e-5)
    order = [3, 6, 0, 2, 5, 1, 4]
    shuffled = reward(given.rows(order), asked.rows(order), chunk=2).total
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-5)


def test_references_that_a_group_shares_are_embedded_once(dino: DINOScore, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, pixels, seen = smooth(2, 40, 40, seed=4), smooth(4, 40, 40), []
    apart = dino(Media(pixels, references=tuple(shared.clone() for _ in range(4))), prompts(4)).total
    inner = DINOScore.picture_features

    def counted(self: DINOScore, pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return inner(self, pixels)

    monkeypatch.setattr(DINOScore, "picture_features", counted)
    together = dino(Media(pixels, references=(shared,) * 4), prompts(4)).total
    assert sum(seen) == 4 + 2
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)


def test_gradient_against_finite_differences(folders: dict[str, Path]) -> None:
    """Pictures of the network's size, so that nothing is rounded; the differences in float64, of the model itself."""
    reward = DINOScore(str(folders["vit"]), resize=32, crop=32)
    pixels, references = smooth(1, 32, 32).requires_grad_(), smooth(3, 32, 32, seed=9)
    total = reward(Media(pixels, references=(references,)), prompts(1), grad=True).total
    (slope,) = torch.autograd.grad(total.sum(), pixels)
    model = ViTModel.from_pretrained(folders["vit"], add_pooling_layer=False).double()

    def embed(shown: Tensor) -> Tensor:
        return F.normalize(model(normalise(shown, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state[:, 0], dim=1)

    with torch.no_grad():
        wanted = embed(references.double())
        for _ in range(8):
            direction = torch.randn(pixels.shape, dtype=torch.float64)
            up, down = ((embed(pixels.double() + e * direction) @ wanted.T).mean() for e in (1e-4, -1e-4))
            measured = ((up - down) / 2e-4).item()
            assert (slope * direction).sum().item() == pytest.approx(measured, rel=1e-3, abs=1e-6)


def test_the_gradient_leads_to_the_references(reward: ReferenceScore) -> None:
    given = media(3)
    pixels = given.pixels.clone().requires_grad_()
    assert given.references is not None
    references = tuple(one.requires_grad_() for one in given.references)
    before = reward(Media(pixels, references=references), prompts(3), grad=True).total
    before.sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad != 0).flatten(1).any(1).all()
    assert all(one.grad is None for one in references)
    assert all(parameter.grad is None for parameter in reward.model.parameters())
    step = 0.02 * pixels.grad / pixels.grad.abs().amax((1, 2, 3), keepdim=True)
    up, down = (reward(Media(pixels.detach() + s * step, references=references), prompts(3)).total for s in (1, -1))
    assert (up > before).all()
    assert (down < before).all()


def test_scores_are_float32_under_autocast(reward: ReferenceScore) -> None:
    plain = reward(media(), prompts(4)).total
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(media(), prompts(4)).total, plain)


def test_what_is_broken_has_no_score(reward: ReferenceScore) -> None:
    given = media()
    given.pixels[1, 0, 20, 20] = torch.nan
    assert given.references is not None
    given.references[2][0, 0, 20, 20] = torch.nan
    assert reward(given, prompts(4)).valid.tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (None, r"compares pictures with references, and there are none: .*Media\(pixels, references=\.\.\.\)"),
        ((torch.zeros(1, 3, 8, 8), torch.zeros(0, 3, 8, 8)), r"references of media 1 .* got the shape \[0, 3, 8, 8\]"),
        ((torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8)), r"references of media 0 .* got the shape \[3, 8, 8\]"),
        ((torch.zeros(1, 3, 8, 8, dtype=torch.uint8),) * 2, r"references of media 0 .* torch\.uint8"),
    ],
)
def test_missing_references(reward: ReferenceScore, references: tuple[Tensor, ...] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward(Media(smooth(2, 40, 40), references=references), prompts(2))


@pytest.mark.parametrize("name", ["./no/such/folder", "no-one/no-such-model"])
def test_a_wrong_name_is_one_clear_line(name: str) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        DINOScore(name)
    assert "\n" not in str(caught.value)


def test_other_models_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a model of type 'dinov2', and one of type 'vit' is needed"):
        DINOScore(str(folders["dinov2"]))
    with pytest.raises(ValueError, match="holds a model of type 'vit', and one of type 'dinov2' is needed"):
        DINOv2Score(str(folders["vit"]))
    ViTModel(ViTConfig(**SIZES, intermediate_size=64)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 2 that do not belong to it \(pooler.dense.bias, pooler.dense.weight\)"):
        DINOScore(str(tmp_path))


def test_weights_that_are_missing_or_of_another_size(folders: dict[str, Path], tmp_path: Path) -> None:
    """A config of three layers, and of another width, beside weights of two of width 32."""
    (tmp_path / "model.safetensors").write_bytes((folders["vit"] / "model.safetensors").read_bytes())
    ViTConfig(**(SIZES | {"num_hidden_layers": 3}), intermediate_size=64).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks 16"):
        DINOScore(str(tmp_path))
    ViTConfig(**SIZES, intermediate_size=48).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as caught:
        DINOScore(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_wrong_settings(folders: dict[str, Path], dino: DINOScore) -> None:
    with pytest.raises(ValueError, match="crop must be at least 1 and at most resize, got 48 and 36"):
        DINOScore(str(folders["vit"]), resize=36, crop=48)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        DINOScore(str(folders["vit"]), batch_size=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        CLIPImageScore(str(folders["clip"]), batch_size=0)
    with pytest.raises(ValueError, match="DINOScore scores pictures"):
        dino(Media(torch.rand(1, 2, 3, 32, 32), references=(smooth(1, 32, 32),)), prompts(1))

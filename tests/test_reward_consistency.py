"""Maps of pictures: soft edges by hand, depth and segments against transformers' own models, and what of it counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import (
    ConvNextConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from flowalign.records import Media, Prompts
from rewards import DepthConsistency, EdgeConsistency, SegmentConsistency
from rewards.consistency import Consistency, gaussian, mean_counted, slopes
from rewards.pixelwise import by_largest

PREPARED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2}


def step(low: float, high: float, size: int = 12) -> Tensor:
    """Grey pictures with an upright step in the middle."""
    picture = torch.full((1, 3, size, size), low)
    picture[..., size // 2 :] = high
    return picture


def test_a_slope_is_the_height_of_a_step_whichever_way_it_goes():
    plain = step(0.2, 0.8)
    for picture in (plain, plain.mT, plain.flip(3)):
        found = slopes(picture, 0.0)
        assert found.max().item() == pytest.approx(0.6, abs=1e-5)
        assert (found > 0.1).sum() == 2 * 12  # a pixel on either side
    across = torch.linspace(0, 1, 13).expand(1, 3, 13, 13)
    assert slopes(across, 0.0)[..., 1:-1].flatten().tolist() == pytest.approx([2 / 12] * 13 * 11, abs=1e-5)
    colours = torch.zeros(1, 3, 8, 8)
    colours[:, 1, :, 4:] = 1
    assert slopes(colours, 0.0).max().item() == pytest.approx(0.587, abs=1e-5)


def test_a_blur_is_a_gaussian_s():
    weights = gaussian(1.0)
    assert weights.sum().item() == pytest.approx(1)
    assert (weights.argmax(), len(weights)) == (3, 7)
    assert (weights[3] / weights[2]).item() == pytest.approx(np.exp(0.5))
    blurred = slopes(step(0.0, 1.0, 24), 1.0)[0, 0, 12]
    assert blurred.argmax() in (11, 12)
    assert blurred[12].item() == pytest.approx(float(weights[3:5].sum()), abs=1e-5)  # both neighbours' difference
    assert slopes(torch.full((1, 3, 9, 9), 0.7), 2.0).max() < 1e-5  # borders make no edge


def test_an_edge_is_half_at_the_threshold():
    reward = EdgeConsistency(blur=0.0, threshold=0.15, softness=0.03)
    found = reward.predict(step(0.5, 0.65))[0, 0, 6]
    assert found[5:7].tolist() == pytest.approx([0.5, 0.5], abs=1e-3)
    assert found[0].item() == pytest.approx(1 / (1 + np.exp(5)), abs=1e-4)
    assert reward.predict(step(0.0, 1.0))[0, 0, 6, 6] > 0.999
    with pytest.raises(ValueError, match="softness positive, got 1"):
        EdgeConsistency(softness=0.0)


def saved(folder: Path, pixels: Tensor, name: str) -> str:
    shown = (255 * pixels[0]).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(shown).save(folder / name)
    return str(folder / name)


def noise(seed: int, count: int = 1, size: int = 24) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def eighths(pixels: Tensor) -> Tensor:
    """As a file keeps them."""
    return (255 * pixels).round() / 255


def told(*records: dict[str, str]) -> Prompts:
    return Prompts(tuple("abcdef"[: len(records)]), records)


def test_a_picture_with_the_real_one_s_edges_has_the_best_score(tmp_path):
    real, other = eighths(noise(0)), noise(1)
    prompts = told({"media": saved(tmp_path, real, "real.png")}, {"media": str(tmp_path / "real.png")})
    reward = EdgeConsistency()
    scores = reward(Media(torch.cat([real, other])), prompts)
    assert scores.total[0].item() == pytest.approx(0, abs=1e-10)
    expected = -(reward.predict(other) - reward.predict(real)).square().mean()
    assert scores.total[1].item() == pytest.approx(expected.item(), abs=1e-6)
    assert scores.maps is None
    assert (1 - real[:1] - (1 - real)).abs().max() == 0
    assert reward(Media(1 - real), prompts.rows([0])).total[0] > -1e-6  # slopes do not tell the two sides apart


def test_the_control_picture_is_the_map_where_that_is_asked_for(tmp_path):
    drawn = (noise(3)[:, :1] > 0.7).float().expand(1, 3, 24, 24)
    reward, pixels = EdgeConsistency(of_media=False), noise(4)
    scores = reward(Media(pixels), told({"image": saved(tmp_path, drawn, "edges.png")}))
    assert scores.total[0].item() == pytest.approx(-(reward.predict(pixels) - drawn[:, :1]).square().mean().item())
    with pytest.raises(ValueError, match="prompt 'a' names no control picture: give its record the key \"image\", a"):
        reward(Media(pixels), told({}))
    with pytest.raises(ValueError, match="prompt 'a' names no real media: give its record the key \"media\", a file"):
        EdgeConsistency()(Media(pixels), told({}))


def test_its_gradient_is_that_of_finite_differences(tmp_path):
    prompts = told({"media": saved(tmp_path, noise(0), "real.png")})
    pixels = noise(1).requires_grad_()
    reward = EdgeConsistency(softness=0.3)
    scores = reward(Media(pixels), prompts, grad=True)
    (slope,) = torch.autograd.grad(scores.total.sum(), pixels)
    at = tuple(int(i) for i in np.unravel_index(int(slope.abs().argmax()), slope.shape))
    sides = []
    for sign in (1, -1):
        moved = pixels.detach().clone()
        moved[at] += sign * 0.01
        sides.append(reward(Media(moved), prompts).total.item())
    assert slope[at].item() == pytest.approx((sides[0] - sides[1]) / 0.02, rel=0.05)
    assert scores.maps is not None
    assert scores.maps.predicted.requires_grad
    assert scores.maps.counted.all()
    torch.testing.assert_close(-scores.maps.errors.mean((1, 2)), scores.total)


def test_what_is_made_of_a_file_is_made_once(tmp_path, monkeypatch):
    files = [saved(tmp_path, noise(i), f"{i}.png") for i in range(2)]
    prompts = told(*({"media": files[i]} for i in (0, 1, 0, 0, 1)))
    reward, seen = EdgeConsistency(), list[int]()
    real = EdgeConsistency.predict
    monkeypatch.setattr(EdgeConsistency, "predict", lambda self, p: seen.append(len(p)) or real(self, p))
    together = reward(Media(noise(5, 5)), prompts).total
    assert seen == [5, 2]
    for i in range(5):
        assert reward(Media(noise(5, 5)[i : i + 1]), prompts.rows([i])).total[0] == pytest.approx(together[i].item())


def test_pixels_that_do_not_count_are_left_out():
    values, counted = torch.arange(12.0).view(2, 2, 3), torch.zeros(2, 2, 3, dtype=torch.bool)
    counted[0, 1] = True
    assert mean_counted(values, counted).tolist() == [4.0, 0.0]


def kept(folder: Path, model: Any, size: int, **config: Any) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for name, parameter in model.named_parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
            if name.startswith("head"):  # of depth: what is below 0 is cut off
                parameter.data.abs_()
    model.save_pretrained(folder)
    prepared = PREPARED | {"size": {"height": size, "width": size}} | config
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    return str(folder)


def small_dpt() -> Any:
    return DPTForDepthEstimation(
        DPTConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24, image_size=32,
            patch_size=8, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[4, 4, 8, 8], fusion_hidden_size=8,
            reassemble_factors=[4, 2, 1, 0.5], use_auxiliary_head=False,
        )
    )  # fmt: skip


def small_depth_anything(**changes: Any) -> Any:
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
    )  # fmt: skip
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone, patch_size=7, reassemble_hidden_size=16, neck_hidden_sizes=[4, 4, 8, 8],
            fusion_hidden_size=8, head_hidden_size=4, **changes,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    segformer = SegformerForSemanticSegmentation(
        SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 8], patch_sizes=[7, 3],
            strides=[4, 2], num_attention_heads=[1, 1], mlp_ratios=[2, 2], decoder_hidden_size=8, num_labels=4,
        )
    )  # fmt: skip
    backbone = ConvNextConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    upernet = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone, hidden_size=8, pool_scales=[1, 2], use_auxiliary_head=False, num_labels=4
        )
    )
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return {
        "dpt": kept(folder / "dpt", small_dpt(), 32, **half),
        "depth_anything": kept(folder / "anything", small_depth_anything(), 28),
        "metres": kept(folder / "metres", small_depth_anything(depth_estimation_type="metric", max_depth=20), 28),
        "segformer": kept(folder / "segformer", segformer, 32, image_mean=[0.485, 0.456, 0.406]),
        "upernet": kept(folder / "upernet", upernet, 64),
    }


@pytest.mark.parametrize("kind", ["dpt", "depth_anything"])
def test_depth_is_the_network_s_by_its_largest(kind, models, tmp_path):
    reward, pixels = DepthConsistency(models[kind], batch_size=2), noise(0, 3, size=reward_size(kind))
    network = reward.predictor.model
    mean, std = reward.predictor.prepare.mean[0], reward.predictor.prepare.std[0]
    with torch.no_grad():
        depth = network(pixel_values=(eighths(pixels) - mean) / std).predicted_depth
    expected = F.interpolate(depth[:, None], pixels.shape[2:], mode="bilinear", align_corners=False)
    expected = expected / expected.amax((1, 2, 3), keepdim=True)
    found = reward.predict(pixels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert found.amax((1, 2, 3)).tolist() == pytest.approx([1.0] * 3)
    assert found.std() > 1e-3
    file = saved(tmp_path, 0.5 * noise(9, size=reward_size(kind)), "depth.png")
    drawn = torch.tensor(np.array(Image.open(file))).permute(2, 0, 1).float().mean(0)
    scores = reward(Media(pixels.requires_grad_()), told(*[{"image": file}] * 3), grad=True)
    wanted = (found.detach()[:, 0] - drawn / drawn.max()).square().mean((1, 2))
    torch.testing.assert_close(-scores.total.detach(), wanted, atol=1e-5, rtol=1e-4)
    (slope,) = torch.autograd.grad(scores.total.sum(), pixels)
    assert slope.flatten(1).any(1).all()
    assert not any(parameter.requires_grad for parameter in network.parameters())


def reward_size(kind: str) -> int:
    """At which no resize is needed."""
    return {"dpt": 32, "depth_anything": 28}[kind]


def test_a_map_without_depth_is_no_division_by_zero():
    flat = torch.zeros(1, 1, 2, 2, requires_grad=True)
    found = by_largest(flat)
    (slope,) = torch.autograd.grad(found.sum(), flat)
    assert not found.any()
    assert slope.isfinite().all()


PALETTE = np.array([[0, 0, 0], [250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 250]], dtype=np.uint8)


@pytest.mark.parametrize("kind", ["segformer", "upernet"])
def test_segments_are_the_cross_entropy_of_the_painted_classes(kind, models, tmp_path):
    np.save(tmp_path / "palette.npy", PALETTE)
    reward = SegmentConsistency(models[kind], palette=str(tmp_path / "palette.npy"))
    size = {"segformer": 32, "upernet": 64}[kind]
    classes = torch.randint(0, 5, (1, size // 8, size // 8), generator=torch.Generator().manual_seed(2))
    classes = classes.repeat_interleave(8, 1).repeat_interleave(8, 2)  # 0 is of no class
    painted = torch.tensor(PALETTE)[classes].permute(0, 3, 1, 2).float() / 255
    file = saved(tmp_path, painted + 0.01 * noise(1, size=size), "segments.png")
    pixels = noise(0, 2, size).requires_grad_()
    scores = reward(Media(pixels), told({"image": file}, {"image": file}), grad=True)
    logits = reward.predict(pixels.detach())
    smaller = F.interpolate(classes[None].float(), logits.shape[2:], mode="nearest")[0].long().expand(2, -1, -1)
    log_probs, total = logits.log_softmax(1), torch.zeros(2)
    for row in range(2):
        known = smaller[row] > 0
        taken = log_probs[row].gather(0, (smaller[row] - 1).clamp(min=0)[None])[0]
        total[row] = taken[known].mean()
    torch.testing.assert_close(scores.total.detach(), total, atol=1e-5, rtol=1e-4)
    assert scores.maps is not None
    assert torch.equal(scores.maps.counted, smaller > 0)
    (slope,) = torch.autograd.grad(scores.total.sum(), pixels)
    assert slope.flatten(1).any(1).all()


def test_two_maps_of_classes_are_a_divergence_apart(models, tmp_path):
    reward = SegmentConsistency(models["segformer"])
    first, second = (torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    own, other = (Categorical(logits=one.permute(0, 2, 3, 1)) for one in (first, second))
    torch.testing.assert_close(reward.apart(first, second), kl_divergence(other, own))
    assert reward.apart(first, first).abs().max() < 1e-6
    assert EdgeConsistency().apart(first, second)[1, 2, 0] == (first - second)[1, :, 2, 0].abs().mean()


def test_without_a_palette_the_classes_are_those_of_the_real_picture(models, tmp_path):
    reward, real = SegmentConsistency(models["segformer"]), eighths(noise(0, size=32))
    prompts = told({"media": saved(tmp_path, real, "real.png")})
    scores = reward(Media(real), prompts)
    logits = reward.predict(real)
    assert scores.total[0].item() == pytest.approx(logits.log_softmax(1).amax(1).mean().item(), abs=1e-5)


def test_a_control_picture_without_any_class_gives_no_score_and_spoils_no_other(models, tmp_path):
    np.save(tmp_path / "palette.npy", PALETTE)
    reward = SegmentConsistency(models["segformer"], palette=str(tmp_path / "palette.npy"))
    black, red = (torch.tensor([v, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32) for v in (0.0, 1.0))
    prompts = told({"image": saved(tmp_path, black, "0.png")}, {"image": saved(tmp_path, red, "1.png")})
    pixels = noise(0, 2, 32).requires_grad_()
    scores = reward(Media(pixels), prompts, grad=True)
    assert scores.valid.tolist() == [False, True]
    (slope,) = torch.autograd.grad(scores.total.where(scores.valid, 0.0).sum(), pixels)
    assert slope.isfinite().all()
    assert slope[1].any()


def test_what_is_something_else_is_told_in_a_line(models, tmp_path):
    np.save(tmp_path / "few.npy", PALETTE[:3])
    cases: list[tuple[type[Consistency], dict[str, Any], str]] = [
        (DepthConsistency, {"model": models["metres"]}, "estimates metres, which grow with distance"),
        (DepthConsistency, {"model": models["segformer"]}, "type 'segformer'; DepthConsistency takes dpt or depth_any"),
        (SegmentConsistency, {"model": models["dpt"]}, "type 'dpt'; SegmentConsistency takes segformer or upernet"),
        (DepthConsistency, {"model": str(tmp_path / "none")}, "none is not a folder; name a model's folder"),
        (DepthConsistency, {"model": models["dpt"], "batch_size": 0}, "batch_size must be at least 1, got 0"),
        (
            SegmentConsistency,
            {"model": models["segformer"], "palette": str(tmp_path / "few.npy")},
            r"has the shape \[3, 3\]; a model of 4 classes needs \[5, 3\] colours",
        ),
    ]
    for kind, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            kind(**arguments)
    (Path(models["upernet"]) / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        SegmentConsistency(models["upernet"])
    with pytest.raises(ValueError, match="EdgeConsistency scores pictures"):
        EdgeConsistency()(Media(torch.zeros(1, 2, 3, 8, 8), fps=8), told({}))

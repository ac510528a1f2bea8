"""RAFT's flow is the authors' and torchvision's on drawn weights; its parts by hand; the verdict on given flows."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowalign.config import build
from flowalign.records import Media, Prompts
from rewards.dynamics import DynamicDegree, FlowDynamics, dynamic, stride, strongest
from rewards.raft import RAFT, correlations, load_raft, lookup, pad, renamed, upsample

GOLDEN = load_file(Path(__file__).parent / "golden" / "rewards" / "raft.safetensors")


def shapes(layout: str) -> dict[str, list[int]]:
    """Names and shapes of a published state dict."""
    return json.loads(zlib.decompress(GOLDEN[f"{layout}_shapes"].numpy().tobytes()))


@cache
def drawn(layout: str) -> dict[str, Tensor]:
    """The weights that the original had when it was recorded."""
    draw, made = np.random.RandomState(7), {}
    for name, shape in sorted(shapes(layout).items()):
        if not shape:
            made[name] = torch.tensor(0)
            continue
        value = draw.standard_normal(shape) * (np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.2)
        if name.endswith("running_var"):
            value = np.exp(value)
        elif len(shape) == 1 and name.endswith("weight"):
            value = value + 1
        elif "flow_head.conv2" in name:
            value = 0.1 * value
        made[name] = torch.from_numpy(value.astype(np.float32))
    return {name: made[name.replace("norm3.", "downsample.1.")] for name in made}


def pictures() -> Tensor:
    """The pairs that were recorded: [first or second, pair, 3, 128, 152]."""
    draw = np.random.RandomState(8)
    squares = [np.kron(draw.randint(0, 256, (3, 16, 19)), np.ones((1, 8, 8), np.int64)) for _ in range(3)]
    first, second = np.stack(squares[:2]), np.stack([np.roll(squares[0], (3, -5), (1, 2)), squares[2]])
    return torch.from_numpy(np.stack([first, second]).astype(np.uint8)).float() / 255


def prompts(count: int) -> Prompts:
    return Prompts(("",) * count, ({},) * count)


def moving(count: int = 7, frames: int = 3, side: int = 64, seed: int = 0) -> Tensor:
    """Videos of smooth noise that slides to the right, each faster than the last."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    picture = F.interpolate(coarse, (side, side), mode="bilinear")
    return torch.stack([torch.stack([one.roll(i * k, 2) for i in range(frames)]) for k, one in enumerate(picture)])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights as the authors publish them, with the prefix of what was trained in parallel, and torchvision's."""
    folder = tmp_path_factory.mktemp("raft")
    torch.save({f"module.{name}": value for name, value in drawn("authors").items()}, folder / "raft-things.pth")
    torch.save(drawn("torchvision"), folder / "raft_large.pth")
    return {"authors": str(folder), "torchvision": str(folder / "raft_large.pth")}


@pytest.fixture(scope="module")
def rewards(files: dict[str, str]) -> dict[str, DynamicDegree]:
    kinds = {"verdict": DynamicDegree, "smooth": FlowDynamics}
    return {name: kind(files["torchvision"], batch_size=4, updates=2) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def constant(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[float, float], str]:
    """Weights by which each update moves the flow by the same (x, y), of 8 pixels, whatever is shown."""

    def write(x: float, y: float) -> str:
        weights = dict(drawn("torchvision"))
        weights["update_block.flow_head.conv2.weight"] = torch.zeros(2, 256, 3, 3)
        weights["update_block.flow_head.conv2.bias"] = torch.tensor([x, y])
        path = tmp_path_factory.mktemp("constant") / "raft.safetensors"
        save_file(weights, path)
        return str(path)

    return write


@pytest.mark.parametrize("layout", ["authors", "torchvision"])
@torch.no_grad()
def test_flow_is_the_originals(files: dict[str, str], layout: str) -> None:
    """With both layouts' full size and all of their names."""
    network, (first, second) = load_raft(files[layout]), pictures()
    expected = GOLDEN[f"{layout}_flow"]
    flow = network(first, second)[:, :, ::5, ::5]
    assert expected.abs().amax() > 20, "pixels, so that correlations are looked up all over the picture"
    assert (flow - expected).abs().max() < 1e-4 * expected.abs().max()
    backwards = network(second, first)[:, :, ::5, ::5]
    assert (backwards - expected).abs().max() > 1


def test_names_are_those_that_are_published() -> None:
    with torch.device("meta"):
        own = {name: list(value.shape) for name, value in RAFT().state_dict().items()}
    assert own == shapes("torchvision")
    assert sum(np.prod(shape) for name, shape in own.items() if "running" not in name and shape) == 5_257_536
    theirs = renamed(drawn("authors"))
    assert {name: list(value.shape) for name, value in theirs.items()} == {
        name: shape for name, shape in own.items() if "num_batches" not in name
    }
    ours = drawn("torchvision")
    assert all(torch.equal(value, ours[name]) for name, value in renamed(ours).items())


@pytest.mark.parametrize(("right", "down"), [(3, -2), (-4, 1), (0, 4)])
def test_correlations_of_moved_features_peak_at_the_move(right: int, down: int) -> None:
    first = F.normalize(torch.randn(2, 64, 12, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    second = first.roll((down, right), (2, 3))
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij")
    here = torch.stack([columns, rows]).expand(2, -1, -1, -1)
    found = lookup(correlations(first, second), here)
    assert found.shape == (2, 4 * 81, 12, 16)
    inner = found[:, :81, 4:-4, 4:-4]
    assert (inner.argmax(1) == 9 * (right + 4) + down + 4).all()
    torch.testing.assert_close(inner.amax(1), torch.full((2, 4, 8), 1 / 8))  # |unit|^2 / sqrt(64)
    moved = lookup(correlations(first, second), here + torch.tensor([right, down])[:, None, None])
    assert (moved[:, :81, 4:-4, 4:-4].argmax(1) == 40).all(), "the middle of the window"


def test_lookup_by_hand() -> None:
    first, second = torch.randn(2, 1, 4, 8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    volume = torch.einsum("ncij,nckl->ijkl", first, second) / 2
    places = torch.zeros(1, 2, 8, 10, dtype=torch.float64)
    places[0, :, 5, 7] = torch.tensor([2.25, 3.5])
    found = lookup(correlations(first, second), places)[0]
    left, right = volume[5, 7, :, 2], volume[5, 7, :, 3]
    expected = 0.75 * (left[3] + left[4]) / 2 + 0.25 * (right[3] + right[4]) / 2
    assert found[40, 5, 7].item() == pytest.approx(expected.item())
    assert found[9 * 1 + 4, 5, 7].item() == pytest.approx(0.25 * (volume[5, 7, 3, 0] + volume[5, 7, 4, 0]).item() / 2)
    assert found[4, 5, 7] == 0, "beyond the edge"
    assert found[81 + 9 * 4 + 4, 0, 0].item() == pytest.approx(volume[0, 0, :2, :2].mean().item())
    assert found[81 + 9 * 6 + 5, 0, 0].item() == pytest.approx(volume[0, 0, 2:4, 4:6].mean().item())
    assert found[243 + 40, 0, 0].item() == pytest.approx(volume[0, 0, :8, :8].mean().item()), "a level of one number"


def test_upsampling_is_a_convex_combination_of_the_vectors_around() -> None:
    flow = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(3))
    even = upsample(flow, torch.zeros(2, 576, 5, 6))
    around = F.avg_pool2d(flow, 3, 1, 1) * 8
    torch.testing.assert_close(even, around.repeat_interleave(8, 2).repeat_interleave(8, 3))
    mask = torch.zeros(2, 9, 8, 8, 5, 6)
    mask[:, 5, 2, 7] = 1000.0  # of the pixels in row 2, column 7 of each square, the vector to the right
    fine = upsample(flow, mask.flatten(1, 3))
    torch.testing.assert_close(fine[:, :, 2::8, 7::8][..., :-1], 8 * flow[..., 1:])
    assert (fine[:, :, 2::8, 7::8][..., -1] == 0).all()
    torch.testing.assert_close(fine[:, :, 3::8, 7::8], around)


def test_padding_is_even_by_the_edges() -> None:
    given = torch.rand(1, 3, 61, 66)
    made = pad(given)
    assert made.shape == (1, 3, 64, 72)
    assert torch.equal(made[:, :, 1:62, 3:69], given)
    assert torch.equal(made[0, :, 0, 0], given[0, :, 0, 0])
    assert torch.equal(made[0, :, -1, -1], given[0, :, -1, -1])


@torch.no_grad()
def test_flow_adds_up_over_updates(constant: Callable[[float, float], str]) -> None:
    network, first = load_raft(constant(0.5, -0.25)), torch.rand(2, 3, 64, 72)
    for updates in (1, 3):
        inner = network(first, first.flip(0), updates)[:, :, 8:-8, 8:-8]
        expected = torch.tensor([4.0, -2.0])[None, :, None, None] * updates
        torch.testing.assert_close(inner, expected.expand_as(inner))


def test_strongest_by_hand() -> None:
    flow = torch.zeros(2, 2, 10, 13)  # 6.5 of 130: 6
    flow[0, :, 0, :6] = torch.tensor([3.0, -4.0])[:, None]
    flow[1, 0, 0, :3] = -2.0
    assert strongest(flow).tolist() == pytest.approx([5.0, 1.0])


def test_the_verdict_is_vbenchs() -> None:
    """By its loop, for which count_num is round(4 n / 16) of n frames, but at least 1 here."""
    generator = torch.Generator().manual_seed(5)
    for frames in range(2, 40):
        relative = 2 * torch.rand(20, frames - 1, generator=generator) ** 3
        relative[0], relative[1] = 1.0, 1.001
        expected = [sum(r > 1 for r in row) >= max(1, round(4 * (frames / 16.0))) for row in relative.tolist()]
        assert dynamic(relative).tolist() == expected
        assert dynamic(relative)[:2].tolist() == [0, 1]
    pairs = torch.zeros(4, 15)
    for row, count in enumerate((0, 3, 4, 15)):
        pairs[row, 15 - count :] = 5.0
    assert dynamic(pairs).tolist() == [0, 0, 1, 1], "4 of 16 frames"


def test_frames_are_those_about_an_eighth_of_a_second_apart(rewards: dict[str, DynamicDegree]) -> None:
    assert [stride(fps) for fps in (1, 6, 8, 11.9, 12, 16, 20, 24, 25, 30, 60)] == [1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 8]
    reward, video = rewards["verdict"], moving(2, 7)
    fast = reward(Media(video, 24.0), prompts(2))
    same = reward(Media(video[:, ::3], 8.0), prompts(2))
    assert torch.equal(fast.parts["relative_flow"], same.parts["relative_flow"])
    assert reward(Media(video, 8.0), prompts(2)).parts["relative_flow"][1] != same.parts["relative_flow"][1]


@pytest.mark.parametrize("size", [pytest.param((64, 96), marks=pytest.mark.slow), (96, 64), (60, 90)], ids=str)
def test_scores_of_known_flow(constant: Callable[[float, float], str], size: tuple[int, int]) -> None:
    """Flow of 5 pixels a side of a 3-4-5 triangle: 8 * 2 * 0.3125 = 5, against 6 min(h, w) / 256 = 1.5."""
    ratio = 5 / (6 * min(size) / 256)
    video = torch.rand(2, 3, 3, *size, generator=torch.Generator().manual_seed(6))
    for factor, verdict in ((-1.0, 1.0), (0.99 / ratio, 0.0), (1.01 / ratio, 1.0)):
        model = constant(0.1875 * factor, 0.25 * factor)
        scores = DynamicDegree(model, updates=2)(Media(video, 8.0), prompts(2))
        r = abs(factor) * ratio
        assert scores.total.tolist() == [verdict] * 2
        assert scores.parts["relative_flow"].tolist() == pytest.approx([r] * 2, rel=1e-5)
        assert scores.parts["moving_pairs"].tolist() == [verdict] * 2
        assert list(scores.parts) == ["dynamic_degree", "moving_pairs", "relative_flow"]
        smooth = FlowDynamics(model, updates=2)(Media(video, 8.0), prompts(2))
        assert smooth.total.tolist() == pytest.approx([r / (r + 1)] * 2, rel=1e-5)
        assert torch.equal(smooth.parts["moving_pairs"], scores.parts["moving_pairs"])


def test_scores_are_made_of_the_networks_flow(rewards: dict[str, DynamicDegree]) -> None:
    video = moving(3, 4, 68)
    expected = []
    for frames in (video * 255).round() / 255:
        flows = [rewards["smooth"].model(pad(a[None]), pad(b[None]), 2) for a, b in pairwise(frames)]
        lengths = [flow.square().sum(1).sqrt().flatten().sort(descending=True).values for flow in flows]
        expected.append([one[: int(0.05 * 72 * 72)].mean().item() / (6 * 68 / 256) for one in lengths])
    scores = rewards["smooth"](Media(video, 8.0), prompts(3))
    assert scores.parts["relative_flow"].tolist() == pytest.approx(np.mean(expected, 1).tolist(), rel=1e-4)
    assert scores.parts["moving_pairs"].tolist() == pytest.approx((np.array(expected) > 1).mean(1).tolist())
    soft = [np.mean([r / (r + 1) for r in row]) for row in expected]
    assert scores.total.tolist() == pytest.approx(soft, rel=1e-4)


def test_batches_order_and_chunks_change_nothing(rewards: dict[str, DynamicDegree]) -> None:
    media, reward = Media(moving(seed=2), 8.0), rewards["smooth"]
    whole = reward(media, prompts(7)).total
    assert whole.std() > 1e-3
    order = [6, 0, 3, 1, 5, 2, 4]
    for other in (
        torch.cat([reward(media.rows([i]), prompts(1)).total for i in range(7)]),
        reward(media, prompts(7), chunk=3).total,
        reward(media.rows(order), prompts(7)).total[torch.tensor(order).argsort()],
    ):
        torch.testing.assert_close(other, whole, rtol=1e-5, atol=0)


def test_gradient_is_that_of_finite_differences(files: dict[str, str]) -> None:
    reward = FlowDynamics(files["torchvision"], updates=3)
    pixels = (0.2 + 0.6 * moving(2, 2)[1:]).mul(255).round().div(255)
    media = Media(pixels.clone().requires_grad_(), 8.0)
    (own,) = torch.autograd.grad(reward(media, prompts(1), grad=True).total.sum(), media.pixels)
    reward.model.double()

    def scored(given: Tensor) -> Tensor:
        return reward.total(reward.speed(given[:, 0], given[:, 1])[:, None] / (6 * 64 / 256)).sum()

    at = pixels.double().requires_grad_()
    (slope,) = torch.autograd.grad(scored(at), at)
    assert slope.abs().max() > 0
    assert F.cosine_similarity(own.double().flatten(), slope.flatten(), dim=0) > 0.999
    directions = torch.randn(8, *at.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for direction in directions:
            measured = (scored(at + 1e-8 * direction) - scored(at - 1e-8 * direction)).item() / 2e-8
            assert measured == pytest.approx((slope * direction).sum().item(), rel=1e-3)


def test_a_video_that_is_not_finite_has_no_score(rewards: dict[str, DynamicDegree]) -> None:
    pixels = moving(3)
    pixels[0, 2, 1, 5, 5], pixels[2, 0, 0, 1, 1] = torch.nan, torch.inf
    for reward in rewards.values():
        scores = reward(Media(pixels, 8.0), prompts(3))
        assert scores.valid.tolist() == [False, True, False]
        assert scores.total.isnan().tolist() == [True, False, True]
        assert scores.parts["moving_pairs"].isnan().tolist() == [True, False, True]


def test_wrong_media(rewards: dict[str, DynamicDegree]) -> None:
    reward = rewards["verdict"]
    with pytest.raises(ValueError, match="scores videos"):
        reward(Media(torch.rand(2, 3, 64, 64)), prompts(2))
    with pytest.raises(ValueError, match="has to know how fast a video plays"):
        reward(Media(moving(2)), prompts(2))
    with pytest.raises(ValueError, match="at least 2, and videos of 3 frames at 24 per second have 1"):
        reward(Media(moving(2), 24.0), prompts(2))
    with pytest.raises(ValueError, match="must be positive and finite, got 0"):
        reward(Media(moving(2), 0.0), prompts(2))
    with pytest.raises(ValueError, match=r"sides of at least 64 in multiples of 8, got \[56, 56\]"):
        reward(Media(moving(2, side=56), 8.0), prompts(2))
    with pytest.raises(ValueError, match=r"multiples of 8, got \[68, 64\]"):
        reward.model(torch.rand(1, 3, 68, 64), torch.rand(1, 3, 68, 64))
    with pytest.raises(ValueError, match="has no gradient"):
        reward(Media(moving(2), 8.0), prompts(2), grad=True)


def test_wrong_weights(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is neither a file .* nor .*raft-things\.pth"):
        DynamicDegree(str(tmp_path / "none"))
    path = tmp_path / "raft.safetensors"
    weights = {name: value.clone() for name, value in drawn("authors").items()}
    save_file(
        {name: value for name, value in weights.items() if name != "fnet.conv1.bias"} | {"x": torch.zeros(1)}, path
    )
    with pytest.raises(ValueError, match=r"lacks 1 \(feature_encoder.convnormrelu.0.bias\) and has 1 .*\(x\)"):
        DynamicDegree(str(path))
    save_file(weights | {"cnet.layer2.0.norm3.bias": torch.zeros(96)}, path)
    with pytest.raises(ValueError, match=r"is another than context_encoder.layer2.0.downsample.1.bias"):
        DynamicDegree(str(path))
    save_file(weights | {"fnet.conv1.bias": torch.zeros(32)}, path)
    with pytest.raises(ValueError, match=r"other shapes than RAFT's large network: .*convnormrelu.0.bias"):
        DynamicDegree(str(path))
    for settings in ({"batch_size": 0}, {"updates": 0}):
        with pytest.raises(ValueError, match="batch_size and updates must be at least 1"):
            DynamicDegree(files["torchvision"], **settings)


def test_it_is_built_from_a_config(files: dict[str, str]) -> None:
    assert build(DynamicDegree, {"model": files["authors"], "updates": 12}).updates == 12
    assert build(FlowDynamics, {"model": files["torchvision"]}).differentiable

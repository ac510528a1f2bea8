"""The face's identity: ArcFace's network by numbers of the authors' code, the crop by geometry, the pool by hand.

Numbers of the network were recorded with arcface_torch, those of the detector with facenet-pytorch 2.6.0.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowalign.records import Media, Prompts
from rewards.arcface import SIDE, TEMPLATE, IResNet, align, build_iresnet, load_iresnet
from rewards.face import FaceIdentity
from rewards.frames import OnFrames
from rewards.mtcnn import MTCNN, Landmarks, Proposals, Refinement, squares, suppress, windows

GOLDEN = load_file(Path(__file__).parent / "golden" / "rewards" / "face.safetensors")
POINTS = torch.tensor(TEMPLATE)
ASTRONAUT = [[205.0, 101.7], [246.8, 103.7], [224.7, 129.0], [201.7, 139.2], [245.3, 141.9]]  # by facenet-pytorch


def shapes(name: str) -> dict[str, list[int]]:
    """Names and shapes of the authors' state dict."""
    return json.loads(zlib.decompress(GOLDEN[name].numpy().tobytes()))


def made_weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """The weights that the authors' network had when it was recorded."""
    draw, made = np.random.RandomState(3), {}
    for name, shape in sorted(shapes.items()):
        if name.endswith("num_batches_tracked"):
            made[name] = torch.tensor(0)
            continue
        value = draw.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        if len(shape) == 1:
            value = 0.1 * value + name.endswith(("weight", "running_var"))
        made[name] = torch.from_numpy(value.astype(np.float32))
    return made


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).uniform(-1, 1, shape).astype(np.float32))


def test_the_network_is_the_authors() -> None:
    network = load_iresnet(made_weights(shapes("tiny_shapes")), "recorded").eval()
    crops = drawn(4, 2, 3, 112, 112).requires_grad_()
    embedded = network(crops)
    assert GOLDEN["embedded"].std() > 0.1
    torch.testing.assert_close(embedded, GOLDEN["embedded"], rtol=1e-5, atol=1e-5)
    (slope,) = torch.autograd.grad((embedded * drawn(5, 2, 16)).sum(), crops)
    slopes = (slope * drawn(6, 8, 2, 3, 112, 112)).flatten(1).sum(1)
    torch.testing.assert_close(slopes, GOLDEN["slopes"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "weights", "count"), [("r50", 43_590_848, 24), ("r100", 65_156_160, 49)])
def test_all_weights_at_full_size(name: str, weights: int, count: int) -> None:
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes(f"{name}_shapes").items()}
    with torch.device("meta"):
        network = build_iresnet(state, name)
    assert sum(parameter.numel() for parameter in network.parameters()) == weights
    assert len({key.rsplit(".", 2)[0] for key in state if key.endswith("conv2.weight")}) == count
    assert network.fc.weight.shape == (512, 512 * 49)


def turned(points: Tensor, degrees: float, scale: float, shift: tuple[float, float]) -> Tensor:
    c, s = math.cos(math.radians(degrees)) * scale, math.sin(math.radians(degrees)) * scale
    return points @ torch.tensor([[c, s], [-s, c]]) + torch.tensor(shift)


def waves(height: int, width: int, places: Tensor) -> Tensor:
    """A smooth picture as a function of x and y in pixels, three colours."""
    x, y = places[..., 0], places[..., 1]
    return torch.stack([(x / 9).sin(), (y / 11).cos(), ((x + y) / 13).sin()]) / 2 + 0.5


def pixel_places(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return torch.stack([x, y], -1)


def test_the_crop_puts_the_landmarks_on_the_template() -> None:
    """A picture of known waves: the crop at g shows them at the place that g has in the picture."""
    picture = waves(200, 240, pixel_places(200, 240))
    pose = (25.0, 0.8, (70.0, 20.0))
    crop = align(picture[None], turned(POINTS, *pose)[None])[0]
    expected = waves(200, 240, turned(pixel_places(SIDE, SIDE).flatten(0, 1), *pose)).view(3, SIDE, SIDE)
    assert (crop - expected).abs().max() < 0.01
    same = align(picture[None, :, :SIDE, :SIDE], POINTS[None])[0]
    torch.testing.assert_close(same, picture[:, :SIDE, :SIDE], rtol=0, atol=1e-4)


def test_the_transform_is_umeyamas() -> None:
    """Points that are no turned template: the least squares over turn, scale and shift, by torch.linalg.lstsq."""
    points = POINTS * 1.3 + drawn(7, 5, 2) * 6 + 20
    x, y = points.double().T
    one, none = torch.ones(5).double(), torch.zeros(5).double()
    system = torch.cat([torch.stack([x, -y, one, none], 1), torch.stack([y, x, none, one], 1)])
    a, b, e, f = torch.linalg.lstsq(system, POINTS.double().T.flatten()[:, None]).solution.flatten().tolist()
    places = pixel_places(SIDE, SIDE).double()
    back = torch.linalg.inv(torch.tensor([[a, -b], [b, a]]).double())
    expected = waves(260, 260, ((places - torch.tensor([e, f])) @ back.T).float())
    crop = align(waves(260, 260, pixel_places(260, 260))[None], points[None])[0]
    assert (crop - expected).abs().max() < 0.01


def test_outside_of_the_picture_is_black() -> None:
    crop = align(torch.ones(1, 3, 60, 60), POINTS[None])[0]
    assert crop[:, :60, :60].min() > 0.999
    assert crop[:, 61:].abs().max() == 0


class MarkedFaces:
    """A detector of drawn faces: a picture whose first pixel is black has none; the face fills its first 112 pixels."""

    def __call__(self, pixels: Tensor) -> Sequence[Tensor | None]:
        return [POINTS + 2 if picture[:, 0, 0].sum() > 0 else None for picture in pixels]


SIZES = ((1, 1, 1, 1), (4, 4, 6, 6, 8), 12)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = made_weights({name: list(value.shape) for name, value in IResNet(*SIZES).state_dict().items()})
    folder = tmp_path_factory.mktemp("weights")
    torch.save(made, folder / "backbone.pth")
    return folder


@pytest.fixture(scope="module")
def reward(weights: Path) -> FaceIdentity:
    return FaceIdentity(str(weights), MarkedFaces(), batch_size=3)


@pytest.fixture(scope="module")
def mean_reward(weights: Path) -> FaceIdentity:
    return FaceIdentity(str(weights), MarkedFaces(), pool="mean")


def prompts(count: int) -> Prompts:
    return Prompts(("a face",) * count, ({},) * count)


def smooth(count: int, seed: int, side: int = 120) -> Tensor:
    coarse = (drawn(seed, count, 3, 8, 8) + 1) / 2
    pixels = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").clamp(0.01, 0.99)
    return pixels


def without_face(pixels: Tensor) -> Tensor:
    hidden = pixels.clone()
    hidden[..., 0, 0] = 0
    return hidden


def embedding(reward: FaceIdentity, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        made = reward.model(2 * align(pixels, (POINTS + 2).expand(len(pixels), -1, -1)) - 1)
    return made / made.norm(dim=1, keepdim=True)


def test_the_pool_by_hand(reward: FaceIdentity, mean_reward: FaceIdentity) -> None:
    pixels, pool = smooth(2, 1), smooth(3, 2)
    pool[1] = 0.9 * pixels[0] + 0.1 * pool[1]
    cosines = embedding(reward, pixels) @ embedding(reward, pool).T
    media = Media(pixels, references=(torch.cat([pool, without_face(pixels[:1])]),) * 2)
    scores = reward(media, prompts(2))
    torch.testing.assert_close(scores.total, cosines.amax(1), rtol=0, atol=1e-5)
    assert scores.parts["face_identity"].equal(scores.total)
    assert cosines[0].argmax() == 1
    torch.testing.assert_close(mean_reward(media, prompts(2)).total, cosines.mean(1), rtol=0, atol=1e-5)
    assert (cosines.amax(1) - cosines.mean(1)).min() > 0.01
    own = reward(Media(pixels, references=(pixels[:1], pixels[1:])), prompts(2)).total
    torch.testing.assert_close(own, torch.ones(2), rtol=0, atol=1e-5)


def test_a_video_is_the_mean_of_its_frames_with_a_face(reward: FaceIdentity) -> None:
    frames, pool = smooth(6, 3).view(2, 3, 3, 120, 120), smooth(2, 4)
    frames[0, 1] = without_face(frames[0, 1])
    scores = reward(Media(frames, references=(pool, pool)), prompts(2))
    one = reward(Media(frames.flatten(0, 1), references=(pool,) * 6), prompts(6))
    assert one.valid.tolist() == [True, False, True, True, True, True]
    expected = torch.stack([one.total[[0, 2]].mean(), one.total[3:].mean()])
    torch.testing.assert_close(scores.total, expected, rtol=0, atol=1e-5)
    assert scores.parts["frames_without_face"].tolist() == [1, 0]
    whole = OnFrames(reward)(Media(frames[1:], references=(pool,)), prompts(1))
    torch.testing.assert_close(whole.total, scores.total[1:], rtol=0, atol=1e-5)


def test_no_face_is_no_score(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    reward = FaceIdentity(str(weights), MarkedFaces())
    pixels, pool = smooth(4, 5), smooth(2, 6)
    pixels[1] = without_face(pixels[1])
    pixels[2, 0, 50, 50] = torch.nan
    references = (pool, pool, pool, without_face(pool))
    pixels.requires_grad_()
    with caplog.at_level(logging.WARNING, "flowalign"):
        scores = reward(Media(pixels, references=references), prompts(4), grad=True)
        reward(Media(pixels[3:], references=references[3:]), prompts(1))
    assert scores.valid.tolist() == [True, False, False, False]
    assert scores.total.isnan().tolist() == [False, True, True, True]
    assert scores.parts["frames_without_face"].tolist() == [0, 1, 0, 0]
    assert [record.getMessage() for record in caplog.records] == [
        "FaceIdentity found no face in a pool of references: such samples have no score"
    ]
    scores.total.where(scores.valid, 0.0).sum().backward()
    assert pixels.grad is not None
    assert pixels.grad[0].abs().max() > 0
    assert pixels.grad[[1, 3]].abs().max() == 0


def test_nothing_found_at_all_keeps_the_graph(reward: FaceIdentity) -> None:
    pixels = without_face(smooth(2, 7)).requires_grad_()
    scores = reward(Media(pixels, references=(smooth(1, 8),) * 2), prompts(2), grad=True)
    assert not scores.valid.any()
    scores.total.where(scores.valid, 0.0).sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().max() == 0


def test_a_score_does_not_depend_on_its_batch(reward: FaceIdentity) -> None:
    pixels, references = smooth(7, 9), tuple(smooth(1 + i % 3, 20 + i) for i in range(7))
    given, asked = Media(pixels, references=references), prompts(7)
    together = reward(given, asked).total
    assert together.std() > 0.01
    singles = torch.cat([reward(given.rows([i]), asked.rows([i])).total for i in range(7)])
    torch.testing.assert_close(singles, together, rtol=0, atol=1e-5)
    order = [3, 6, 0, 2, 5, 1, 4]
    shuffled = reward(given.rows(order), asked.rows(order), chunk=2).total
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_gradient_against_finite_differences(weights: Path, pool: str) -> None:
    """Differences in float64 of crop and network, small because of its kinks; landmarks are turned and scaled."""
    reward = FaceIdentity(str(weights), MarkedFaces(), pool=pool)
    points = turned(POINTS, 12.0, 0.7, (20.0, 5.0))
    reward.detector = lambda pixels: [points] * len(pixels)
    pixels, references = smooth(1, 10).requires_grad_(), smooth(3, 11)
    total = reward(Media(pixels, references=(references,)), prompts(1), grad=True).total
    (slope,) = torch.autograd.grad(total.sum(), pixels)
    network = load_iresnet(torch.load(weights / "backbone.pth"), "tiny").eval().double()

    def embed(shown: Tensor) -> Tensor:
        made = network(2 * align(shown, points.expand(len(shown), -1, -1)) - 1)
        return made / made.norm(dim=1, keepdim=True)

    with torch.no_grad():
        wanted = embed(references.double())
        for seed in range(8):
            direction = drawn(30 + seed, *pixels.shape).double()
            near = [embed(pixels.double() + e * direction) @ wanted.T for e in (1e-6, -1e-6)]
            up, down = (one.amax(1) if pool == "max" else one.mean(1) for one in near)
            measured = ((up - down) / 2e-6).item()
            assert (slope * direction).sum().item() == pytest.approx(measured, rel=1e-3, abs=1e-6)


def test_the_gradient_leads_to_the_references(reward: FaceIdentity) -> None:
    pixels = smooth(2, 12).requires_grad_()
    references = (smooth(2, 13).requires_grad_(), smooth(1, 14))
    before = reward(Media(pixels, references=references), prompts(2), grad=True).total
    before.sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad != 0).float().mean() > 0.5
    assert references[0].grad is None
    assert all(parameter.grad is None for parameter in reward.model.parameters())
    step = 0.01 * pixels.grad / pixels.grad.abs().amax((1, 2, 3), keepdim=True)
    up, down = (reward(Media(pixels.detach() + s * step, references=references), prompts(2)).total for s in (1, -1))
    assert (down < before).all()
    assert (before < up).all()


def test_scores_are_float32_under_autocast(reward: FaceIdentity) -> None:
    media = Media(smooth(3, 15), references=(smooth(2, 16),) * 3)
    plain = reward(media, prompts(3)).total
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(media, prompts(3)).total, plain)


def test_half_precision_and_lent_weights(weights: Path, reward: FaceIdentity) -> None:
    media = Media(smooth(3, 15), references=(smooth(2, 16),) * 3)
    plain = reward(media, prompts(3)).total
    low = FaceIdentity(str(weights), MarkedFaces(), dtype="bfloat16")(media, prompts(3)).total
    assert low.dtype == torch.float32
    assert 0 < (low - plain).abs().max() < 0.02
    lent = FaceIdentity(str(weights), MarkedFaces(), batch_size=3, offload=True)
    assert torch.equal(lent(media, prompts(3)).total, plain)


def test_landmarks_that_make_no_crop_are_no_face(weights: Path) -> None:
    for points in (torch.zeros(5, 2), POINTS * torch.tensor([1.0, 0.0]), POINTS * torch.nan):
        reward = FaceIdentity(str(weights), lambda pixels, points=points: [points] * len(pixels))
        assert not reward(Media(smooth(1, 17), references=(smooth(1, 18),)), prompts(1)).valid.any()


def test_bad_arguments(weights: Path, reward: FaceIdentity, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        FaceIdentity(str(weights), MarkedFaces(), batch_size=0)
    with pytest.raises(ValueError, match="there is neither a file") as caught:
        FaceIdentity("./no/such/folder", MarkedFaces())
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="compares pictures with references, and there are none"):
        reward(Media(smooth(1, 1)), prompts(1))
    with pytest.raises(ValueError, match="was shown 2 pictures and told of 1"):
        FaceIdentity(str(weights), lambda pixels: [None])(
            Media(smooth(2, 1), references=(smooth(1, 2),) * 2), prompts(2)
        )
    with pytest.raises(ValueError, match=r"a detector gives landmarks \[5, 2\], got the shape \[10\]"):
        FaceIdentity(str(weights), lambda pixels: [torch.zeros(10)])(
            Media(smooth(1, 1), references=(smooth(1, 2),)), prompts(1)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer3.0.prelu.weight": None}, r"lacks 1 \(layer3.0.prelu.weight\)"),
        (
            {"layer3.0.downsample.2.bias": torch.zeros(6)},
            r"has 1 that do not belong to it \(layer3.0.downsample.2.bias\)",
        ),
        ({"layer3.0.bn3.bias": torch.zeros(5)}, r"another shape than IResNet's: layer3.0.bn3.bias"),
        ({"fc.weight": None}, "holds no IResNet as arcface_torch saves it .* it lacks fc.weight"),
    ],
)
def test_other_weights_are_refused(weights: Path, tmp_path: Path, change: dict, message: str) -> None:
    state = {key: value for key, value in (torch.load(weights / "backbone.pth") | change).items() if value is not None}
    torch.save(state, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match=message):
        FaceIdentity(str(tmp_path), MarkedFaces())


def test_suppression_keeps_the_surest_of_what_overlaps() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [8, 8, 18, 18], [0, 0, 30, 30]])
    chance = torch.tensor([0.7, 0.9, 0.8, 0.6])  # the first two share 90 of 110 pixels, others at most 1/9
    assert suppress(boxes, chance, 0.5).tolist() == [1, 2, 3]
    assert suppress(boxes, chance, 0.9).tolist() == [1, 2, 0, 3]
    assert squares(torch.tensor([[0.0, 0, 4, 10]])).tolist() == [[-3, 0, 7, 10]]


def test_windows_are_what_the_boxes_show() -> None:
    picture = torch.arange(100.0).view(1, 1, 10, 10).expand(1, 3, 10, 10)
    shown = windows(picture, torch.tensor([[2.0, 4, 6, 8], [-5, 6, 3, 12], [20, 20, 30, 30]]), 2)
    assert shown[0, 0].tolist() == [[47.5, 49.5], [67.5, 69.5]]  # means of 2 x 2 pixels 10 y + x, from (2, 4) on
    assert shown[1, 2, 1].tolist() == [picture[0, 0, 8:10, 0:2].mean(), picture[0, 0, 8:10, 1:3].mean()]
    assert shown[2].unique().tolist() == [99.0]


def test_the_detectors_weights_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no pnet\.pt in"):
        MTCNN(str(tmp_path))
    with pytest.raises(ValueError, match="smallest must be at least 12 pixels, got 5"):
        MTCNN(str(tmp_path), smallest=5)
    for network, file in ((Proposals(), "pnet.pt"), (Refinement(), "rnet.pt"), (Landmarks(), "onet.pt")):
        torch.save(network.state_dict(), tmp_path / file)
    assert len(MTCNN(str(tmp_path))(torch.full((2, 3, 30, 40), 0.5))) == 2
    torch.save(Refinement().state_dict(), tmp_path / "onet.pt")
    with pytest.raises(ValueError, match=r"onet\.pt lacks"):
        MTCNN(str(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("facenet_pytorch") is not None, reason="facenet-pytorch is installed")
def test_without_the_detectors_package(weights: Path) -> None:
    with pytest.raises(ValueError, match="pip install --no-deps facenet-pytorch") as caught:
        FaceIdentity(str(weights))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def astronaut() -> Tensor:
    """skimage's photograph of Eileen Collins."""
    data = pytest.importorskip("skimage.data", reason="shows a photograph of scikit-image")
    if importlib.util.find_spec("facenet_pytorch") is None:
        pytest.skip("finds the face with the weights of: pip install --no-deps facenet-pytorch")
    return torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None].float() / 255


def test_the_face_of_a_photograph(astronaut: Tensor) -> None:
    """Within two pixels of what facenet-pytorch finds; mirrored, half as large, and not where there is none."""
    detector = MTCNN()
    shown = torch.cat([astronaut, astronaut.flip(3)])
    face, mirrored = detector(shown)
    assert face is not None
    assert mirrored is not None
    assert (face - torch.tensor(ASTRONAUT)).abs().max() < 2
    swapped = mirrored[[1, 0, 2, 4, 3]] * torch.tensor([-1.0, 1.0]) + torch.tensor([511.0, 0.0])
    assert (swapped - face).abs().max() < 4
    (half,) = detector(torch.nn.functional.interpolate(astronaut, scale_factor=0.5, mode="area"))
    assert half is not None
    assert (2 * half + 0.5 - face).abs().max() < 3
    assert detector(astronaut[:, :, 250:]) == [None]


def test_real_detector_and_gradient_together(astronaut: Tensor, weights: Path) -> None:
    """With a made network: the same photograph scores 1, and the gradient lies on the face alone."""
    reward = FaceIdentity(str(weights))
    pixels = astronaut.clone().requires_grad_()
    references = (torch.cat([astronaut, astronaut.flip(3)]),)
    score = reward(Media(pixels, references=references), prompts(1), grad=True)
    assert score.total.item() == pytest.approx(1, abs=1e-5)
    other = reward(Media(pixels, references=(smooth(1, 1, 512),)), prompts(1))
    assert not other.valid.any()
    darker = reward(Media(0.5 * pixels, references=references), prompts(1), grad=True)
    (slope,) = torch.autograd.grad(darker.total.sum(), pixels)
    rows, columns = slope[0].abs().sum(0).nonzero(as_tuple=True)
    assert rows.min() > 20
    assert rows.max() < 220
    assert columns.min() > 120
    assert columns.max() < 330

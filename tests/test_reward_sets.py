"""Set rewards: the laws of the Vendi score, of the Frechet distance and of MMD, and leave-one-out by brute force."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor

from flowalign.config import build
from flowalign.pictures import to_images
from flowalign.records import Media, Prompts
from flowalign.shapes import train_prompts
from flowalign.shapes.scenes import Spec, render
from rewards import CLIPScore
from rewards.sets import (
    MMD,
    CLIPEmbedder,
    FrechetDistance,
    LeaveOneOut,
    VendiScore,
    downdated,
    folder_pictures,
)

WIDTH = 12  # of the embeddings of `flat`: pictures of 2 x 2


def flat(pixels: Tensor) -> Tensor:
    return pixels.flatten(1)


def prompts(count: int) -> Prompts:
    return Prompts(("",) * count, ({},) * count)


def some(count: int, seed: int = 0, around: float = 0.0) -> Tensor:
    """Pictures of 2 x 2 in float64."""
    noise = torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise + around


def scenes(count: int, kinds: tuple[str, ...] = ("single",)) -> Tensor:
    specs = train_prompts(count, seed=4, kinds=kinds).metadata
    drawn = [render(Spec.from_dict(m["spec"]), np.random.default_rng(i)) for i, m in enumerate(specs)]
    return torch.stack([torch.from_numpy(one) for one in drawn]).float() / 255


REFERENCE = some(30, seed=9, around=0.5)
REWARDS: list[Callable[[], LeaveOneOut]] = [
    lambda: VendiScore(flat),
    lambda: FrechetDistance(flat, REFERENCE),
    lambda: FrechetDistance(flat, REFERENCE[:5]),
    lambda: MMD(flat, REFERENCE),
    lambda: MMD(flat, REFERENCE[:5], sigma=1.5),
]


def without(features: Tensor, i: int) -> Tensor:
    return torch.cat([features[:i], features[i + 1 :]])


@pytest.mark.parametrize("count", [3, 5, 12, 13, 40])
@pytest.mark.parametrize("make", REWARDS)
def test_contributions_are_brute_forces(make: Callable[[], LeaveOneOut], count: int) -> None:
    """With fewer and with more samples than dimensions, and with a duplicate among them."""
    reward, pixels = make(), some(count, seed=count)
    pixels[-1] = pixels[0]
    features = flat(pixels)
    expected = torch.stack([reward.value(features) - reward.value(without(features, i)) for i in range(count)])
    found = reward(Media(pixels), prompts(count))
    assert expected.std() > 1e-3
    torch.testing.assert_close(reward.value(features) - reward.without_each(features), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.total, expected.float(), rtol=1e-5, atol=1e-6)
    assert found.parts[f"{reward.name}/set"].tolist() == pytest.approx([reward.value(features).item()] * count)
    assert found.total[0].item() == pytest.approx(found.total[-1].item(), abs=1e-6)


@pytest.mark.parametrize("make", REWARDS)
def test_order_and_batches_change_nothing(make: Callable[[], LeaveOneOut]) -> None:
    media, reward = Media(some(7)), make()
    whole, order = reward(media, prompts(7)).total, [6, 0, 3, 1, 5, 2, 4]
    torch.testing.assert_close(reward(media.rows(order), prompts(7)).total, whole[order], rtol=0, atol=1e-6)
    torch.testing.assert_close(reward(media, prompts(7), chunk=2).total, whole, rtol=0, atol=0)
    reward.batch_size = 2
    torch.testing.assert_close(reward(media, prompts(7)).total, whole, rtol=0, atol=1e-6)
    assert reward.card.scope == "set"


@pytest.mark.parametrize("make", REWARDS)
def test_what_is_not_finite_is_left_out_of_the_set(make: Callable[[], LeaveOneOut]) -> None:
    pixels, reward = some(6), make()
    pixels[2, 1, 0, 0], pixels[4, 0, 0, 0] = torch.nan, torch.inf
    scores = reward(Media(pixels), prompts(6))
    assert scores.valid.tolist() == [True, True, False, True, False, True]
    torch.testing.assert_close(scores.total[scores.valid], reward(Media(pixels[[0, 1, 3, 5]]), prompts(4)).total)


@pytest.mark.parametrize("make", REWARDS)
def test_a_set_that_is_too_small_has_no_scores(make: Callable[[], LeaveOneOut]) -> None:
    reward = make()
    for count in range(4):
        scores = reward(Media(some(count)), prompts(count))
        assert scores.valid.tolist() == [count >= reward.least] * count
    assert reward.least == (3 if reward.name == "frechet" else 2)


def test_vendi_counts_what_differs() -> None:
    value = VendiScore(flat).value
    assert value(3 * torch.eye(7, WIDTH, dtype=torch.float64)).item() == pytest.approx(7)
    assert value(torch.ones(7, WIDTH, dtype=torch.float64)).item() == pytest.approx(1)
    assert value(torch.eye(3, WIDTH, dtype=torch.float64)[[0, 0, 1, 1, 2, 2]]).item() == pytest.approx(3)
    shares = (3 / 4, 1 / 4)
    entropy = -sum(p * math.log(p) for p in shares)
    assert value(torch.eye(2, WIDTH, dtype=torch.float64)[[0, 0, 0, 1]]).item() == pytest.approx(math.exp(entropy))
    features = flat(some(9))
    kernel = F.normalize(features, dim=1) @ F.normalize(features, dim=1).T
    eigenvalues = np.linalg.eigvalsh(kernel.numpy() / 9)
    assert value(features).item() == pytest.approx(np.exp(-np.sum(eigenvalues * np.log(eigenvalues))))


def test_duplicates_lower_diversity() -> None:
    pictures = scenes(6)
    reward, media = VendiScore(CLIPEmbedder("shapes")), Media(pictures[[0, 0, 0, 1, 2, 3, 4, 5]])
    scores = reward(media, prompts(8))
    assert scores.total[:3].max() < scores.total[3:].min()
    more, fewer = (
        reward(Media(pictures[rows]), prompts(5)).parts["vendi/set"][0] for rows in ([0, 1, 2, 3, 4], [0] * 5)
    )
    assert more > fewer + 0.2
    assert fewer.item() == pytest.approx(1, abs=1e-5)
    copies = reward(Media(pictures[[0] * 5]), prompts(5)).total
    torch.testing.assert_close(copies, torch.zeros(5), rtol=0, atol=1e-5)


def exact(mean: Tensor, root: Tensor) -> Tensor:
    """Features with exactly this mean and the covariance root root^T over n - 1."""
    noise = torch.randn(50, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    white, _ = torch.linalg.qr(noise - noise.mean(0))
    return mean + (white - white.mean(0)) * (49**0.5) @ root.T


def test_frechet_distance_of_two_gaussians() -> None:
    first, second = torch.randn(2, WIDTH, dtype=torch.float64)
    a, b = torch.randn(2, WIDTH, WIDTH, dtype=torch.float64)
    x, y = exact(first, a), exact(second, b)
    torch.testing.assert_close(torch.cov(x.T), a @ a.T)
    torch.testing.assert_close(x.mean(0), first)
    crossed = sqrtm((a @ a.T @ b @ b.T).numpy()).real.trace()
    expected = (first - second).square().sum() + a.square().sum() + b.square().sum() - 2 * crossed
    found = FrechetDistance(flat, y.view(50, 3, 2, 2)).distance(x)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_gaussians_with_one_covariance_or_commuting_ones() -> None:
    zero, scale = torch.zeros(WIDTH, dtype=torch.float64), torch.linspace(0.5, 2, WIDTH, dtype=torch.float64)
    target = FrechetDistance(flat, exact(zero, scale.diag()).view(50, 3, 2, 2))
    assert target.distance(exact(zero + 0.3, scale.diag())).item() == pytest.approx(0.09 * WIDTH)
    assert target.distance(exact(zero, (2 * scale).diag())).item() == pytest.approx(scale.square().sum().item())


@pytest.mark.parametrize("count", [3, 8, 40])
def test_identical_sets_have_the_distance_zero(count: int) -> None:
    pictures = some(count)
    assert abs(FrechetDistance(flat, pictures).distance(flat(pictures)).item()) < 1e-10
    assert abs(MMD(flat, pictures).distance(flat(pictures)).item()) < 1e-10
    real = scenes(count)
    embedder = CLIPEmbedder("shapes")
    for kind in (FrechetDistance, MMD):
        whole = kind(embedder, real)(Media(real.flip(0)), prompts(count)).parts
        assert abs(whole[f"{kind.name}/set"][0].item()) < (1e-6 if kind is FrechetDistance else 1e-4)


def test_mmd_by_hand() -> None:
    x, y = torch.zeros(2, WIDTH, dtype=torch.float64), torch.zeros(1, WIDTH, dtype=torch.float64)
    x[1, 0], y[0, 1] = 3.0, 4.0
    reward = MMD(flat, y[[0, 0]].view(2, 3, 2, 2), sigma=10.0)
    within = (2 + 2 * math.exp(-9 / 200)) / 4
    across = (math.exp(-16 / 200) + math.exp(-25 / 200)) / 2
    assert reward.distance(x).item() == pytest.approx(1000 * (within + 1 - 2 * across))


@pytest.mark.parametrize("kind", [FrechetDistance, MMD])
def test_what_does_not_belong_to_the_references_is_marked_down(kind: type[FrechetDistance] | type[MMD]) -> None:
    pixels = some(20, seed=3, around=0.5)
    pixels[7] += 10
    scores = kind(flat, REFERENCE)(Media(pixels), prompts(20))
    assert scores.total.argmin() == 7
    assert scores.total[7] < 0
    assert (scores.parts[f"{kind.name}/set"] < 0).all(), "minus the distance"
    near = kind(flat, REFERENCE)(Media(some(20, seed=3, around=0.5)), prompts(20)).parts[f"{kind.name}/set"]
    assert (near > scores.parts[f"{kind.name}/set"]).all()


def test_real_pictures_of_another_kind_are_farther() -> None:
    embedder = CLIPEmbedder("shapes")
    single, triple = scenes(24), scenes(24, ("triple",))
    for kind in (FrechetDistance, MMD):
        reward = kind(embedder, single[:12])
        same, other = (reward(Media(p), prompts(12)).parts[f"{kind.name}/set"][0] for p in (single[12:], triple[12:]))
        assert same > other


def test_gradient_of_mmd_is_that_of_finite_differences() -> None:
    reward = MMD(flat, REFERENCE, sigma=2.0)

    def contributions(pixels: Tensor) -> Tensor:
        features = flat(pixels)
        return (reward.value(features) - reward.without_each(features)) / 1000

    assert torch.autograd.gradcheck(contributions, some(4).requires_grad_())
    media = Media(some(4).requires_grad_())
    (slope,) = torch.autograd.grad(reward(media, prompts(4), grad=True).total[0], media.pixels)
    expected = torch.autograd.functional.jacobian(contributions, some(4))[0] * 1000
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="has no gradient"):
        VendiScore(flat)(media, prompts(4), grad=True)


def test_downdates_are_numpys() -> None:
    features = torch.randn(9, 6, dtype=torch.float64)
    features[3] = features[5] = features[1]
    left, scale, _ = torch.linalg.svd(features, full_matrices=False)
    found = downdated(scale.square(), left * scale)
    for i in range(9):
        rest = without(features, i)
        assert found[i].tolist() == pytest.approx(np.linalg.eigvalsh((rest.T @ rest).numpy()).tolist(), abs=1e-12)


def test_clip_embedder_is_the_rewards_own() -> None:
    pictures, clip = scenes(3), CLIPScore("shapes")
    made = CLIPEmbedder("shapes")(pictures)
    assert torch.equal(made, clip.embed_pictures(pictures))
    torch.testing.assert_close(made.norm(dim=1), torch.ones(3))


def test_references_out_of_a_folder(tmp_path: Path) -> None:
    pictures = scenes(4)
    for i, image in enumerate(to_images(pictures)):
        image.save(tmp_path / f"{3 - i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    torch.testing.assert_close(torch.cat([*folder_pictures(tmp_path)]), pictures.flip(0))
    embedder = CLIPEmbedder("shapes")
    by_folder, by_tensor = MMD(embedder, tmp_path), MMD(embedder, pictures)
    media = Media(scenes(8)[4:])
    torch.testing.assert_close(
        by_folder(media, prompts(4)).total, by_tensor(media, prompts(4)).total, rtol=0, atol=1e-3
    )
    Image.new("L", (50, 20)).save(tmp_path / "grey.png")
    assert len(MMD(embedder, tmp_path).target) == 5, "of another size, and grey"


def test_they_are_built_from_a_config(tmp_path: Path) -> None:
    for i, image in enumerate(to_images(scenes(3))):
        image.save(tmp_path / f"{i}.png")
    embedder = {"class": "rewards.sets.CLIPEmbedder", "model": "shapes"}
    made = build(MMD, {"embedder": embedder, "reference": str(tmp_path), "sigma": 5})
    assert (len(made.target), made.sigma) == (3, 5.0)
    assert build(VendiScore, {"embedder": embedder}).name == "vendi"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VendiScore(flat, batch_size=0), "batch_size must be at least 1"),
        (lambda: MMD(flat, REFERENCE, sigma=0.0), "sigma must be above 0"),
        (lambda: MMD(flat, REFERENCE[:1]), "at least 2 reference pictures, all finite, got 1"),
        (lambda: FrechetDistance(flat, REFERENCE * torch.nan), "all finite"),
        (lambda: FrechetDistance(flat, Path("/nowhere")), "/nowhere is no folder with pictures"),
        (lambda: VendiScore(lambda x: x)(Media(some(3)), prompts(3)), r"vendi needs an embedding \[b, d\]"),
        (lambda: VendiScore(flat)(Media(some(3)[None]), prompts(1)), "scores pictures"),
    ],
)
def test_wrong_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

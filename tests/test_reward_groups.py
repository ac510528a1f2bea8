"""Win rates, ranks and diversity within groups: by hand, by scipy, and whatever the order and the other groups."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

from flowalign.config import build
from flowalign.records import Media, Prompts, Scores
from flowalign.shapes import train_prompts
from flowalign.shapes.scenes import Spec, render
from rewards import CLIPScore, JPEGCompressibility, Reward
from rewards.base import Card, simple_scores
from rewards.groups import GroupDiversity, PairwiseWinRate, Rank, WinRate, diversity_added
from rewards.sets import CLIPEmbedder


class Red(Reward):
    """The red of the first pixel, unknown where it is negative."""

    name, differentiable = "red", True

    def score(self, media: Media, prompts: Prompts) -> Scores:
        red = media.pixels[:, 0, 0, 0]
        return simple_scores(self.name, red.where(red >= 0, torch.nan))


class Whole(Red):
    card = Card(scope="set")


def flat(pixels: Tensor) -> Tensor:
    return pixels.flatten(1)


def redder(first: Media, second: Media, prompts: Prompts) -> Tensor:
    """Bradley-Terry on the reds; it leans to the first, and cannot say where a red is negative."""
    a, b = first.pixels[:, 0, 0, 0], second.pixels[:, 0, 0, 0]
    return (0.9 * torch.sigmoid(a - b) + 0.1).where((a >= 0) & (b >= 0), torch.nan)


def fair(first: Media, second: Media, prompts: Prompts) -> Tensor:
    return torch.sigmoid(first.pixels[:, 0, 0, 0] - second.pixels[:, 0, 0, 0])


def reds(*levels: float) -> Media:
    return Media(torch.tensor(levels)[:, None, None, None].expand(-1, 3, 2, 2).clone())


def prompts(*groups: int) -> Prompts:
    return Prompts(("",) * len(groups), ({},) * len(groups), groups)


def scenes(count: int) -> Tensor:
    specs = train_prompts(count, seed=2).metadata
    drawn = [render(Spec.from_dict(m["spec"]), np.random.default_rng(i)) for i, m in enumerate(specs)]
    return torch.stack([torch.from_numpy(one) for one in drawn]).float() / 255


GROUPS = (7, 3, 7, 7, 3, 7, 3, 5, 3)
LEVELS = (0.1, 0.8, 0.4, 0.4, 0.0, 0.9, 0.8, 0.5, 0.3)
REWARDS: list[Callable[[], Reward]] = [
    lambda: WinRate(redder),
    lambda: WinRate(fair, both_orders=False, batch_size=2),
    lambda: PairwiseWinRate(Red()),
    lambda: PairwiseWinRate(Red(), 0.3),
    lambda: PairwiseWinRate(Red() * 2 - JPEGCompressibility()),
    lambda: Rank(Red()),
    lambda: GroupDiversity(flat),
]


def some(rng_seed: int = 0) -> Media:
    pixels = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(rng_seed))
    pixels[:, :, 0, 0] = torch.tensor(LEVELS)[:, None]
    return Media(pixels)


def test_wins_and_ties_by_hand() -> None:
    scores = PairwiseWinRate(Red())(reds(0.1, 0.8, 0.4, 0.4), prompts(0, 0, 0, 0))
    assert scores.total.tolist() == pytest.approx([0, 1, 0.5, 0.5])
    assert scores.parts["red"].tolist() == pytest.approx([0.1, 0.8, 0.4, 0.4])
    assert scores.parts["pairwise_win_rate"].tolist() == scores.total.tolist()
    soft = PairwiseWinRate(Red(), 0.2)(reds(0.1, 0.8, 0.4), prompts(0, 0, 0))
    ba, ca, bc = (1 / (1 + math.exp(-x / 0.2)) for x in (0.7, 0.3, 0.4))
    assert soft.total.tolist() == pytest.approx([(2 - ba - ca) / 2, (ba + bc) / 2, (ca + 1 - bc) / 2])


def test_a_small_temperature_is_none() -> None:
    hard, soft = PairwiseWinRate(Red()), PairwiseWinRate(Red(), 1e-4)
    torch.testing.assert_close(
        soft(some(), prompts(*GROUPS)).total, hard(some(), prompts(*GROUPS)).total, equal_nan=True
    )


def test_rank_is_scipys() -> None:
    given = torch.randint(0, 5, (12,), generator=torch.Generator().manual_seed(1)).float() / 5
    scores = Rank(Red())(reds(*given.tolist()), prompts(*[0] * 12))
    assert scores.total.tolist() == pytest.approx(((rankdata(given) - 1) / 11).tolist())
    assert scores.parts["rank"].mean().item() == pytest.approx(0.5)
    assert Rank(Red())(reds(0.2, 0.9), prompts(0, 0)).total.tolist() == [0, 1]


def test_win_rate_of_a_judge_by_hand() -> None:
    def lower(a: float, b: float) -> float:
        return 0.9 / (1 + math.exp(b - a)) + 0.1

    media, group = reds(0.9, 0.1, 0.5), prompts(0, 0, 0)
    one = WinRate(redder, both_orders=False)(media, group).total
    ab, ac, bc = lower(0.9, 0.1), lower(0.9, 0.5), lower(0.1, 0.5)
    assert one.tolist() == pytest.approx([(ab + ac) / 2, (1 - ab + bc) / 2, (2 - ac - bc) / 2])
    both = WinRate(redder)(media, group).total
    fair = 0.9 * PairwiseWinRate(Red(), 1.0)(media, group).total + 0.05
    torch.testing.assert_close(both, fair, rtol=0, atol=1e-6, msg="both orders take out what leans to the first side")


def test_a_judge_of_rewards_is_the_pairwise_win_rate() -> None:
    def judge(first: Media, second: Media, prompts: Prompts) -> Tensor:
        ahead = Red()(first, prompts).total - Red()(second, prompts).total
        return (ahead.sign() + 1) / 2

    judged, compared = (r(some(), prompts(*GROUPS)).total for r in (WinRate(judge), PairwiseWinRate(Red())))
    torch.testing.assert_close(judged, compared, equal_nan=True)


@pytest.mark.parametrize("make", REWARDS)
def test_order_and_other_groups_change_nothing(make: Callable[[], Reward]) -> None:
    reward, media, groups = make(), some(), prompts(*GROUPS)
    whole = reward(media, groups)
    assert whole.valid.tolist() == [group != 5 for group in GROUPS], "a group of one has nothing to compare with"
    assert whole.total[whole.valid].std() > 1e-3
    order = [6, 0, 3, 8, 1, 5, 2, 7, 4]
    moved = reward(media.rows(order), groups.rows(order)).total
    torch.testing.assert_close(moved, whole.total[order], rtol=0, atol=1e-6, equal_nan=True)
    for group in (3, 7):
        rows = [i for i, one in enumerate(GROUPS) if one == group]
        alone = reward(media.rows(rows), groups.rows(rows)).total
        assert torch.equal(alone, whole.total[rows]), "to the last bit"
    torch.testing.assert_close(reward(media, groups, chunk=2).total, whole.total, equal_nan=True)


@pytest.mark.parametrize("make", REWARDS)
def test_without_groups_there_is_no_comparison(make: Callable[[], Reward]) -> None:
    with pytest.raises(ValueError, match="it needs their group numbers"):
        make()(some(), Prompts(("",) * 9, ({},) * 9))
    with pytest.raises(ValueError, match="within groups"):
        make().score(some(), Prompts(("",) * 9, ({},) * 9))
    assert len(make()(Media(torch.rand(0, 3, 8, 8)), prompts())) == 0


@pytest.mark.parametrize("reward", [WinRate(redder), PairwiseWinRate(Red()), PairwiseWinRate(Red(), 0.5), Rank(Red())])
def test_what_has_no_score_is_left_out_of_the_others(reward: Reward) -> None:
    scores = reward(reds(0.1, -1, 0.8, 0.4, -1, 0.3), prompts(0, 0, 0, 0, 1, 1))
    assert scores.valid.tolist() == [True, False, True, True, False, False]
    known = reward(reds(0.1, 0.8, 0.4), prompts(0, 0, 0)).total
    assert torch.equal(scores.total[scores.valid], known)


def test_gradient_of_the_smooth_win_rate() -> None:
    assert PairwiseWinRate(Red(), 0.3).differentiable
    assert not PairwiseWinRate(Red()).differentiable
    assert not PairwiseWinRate(JPEGCompressibility(), 0.3).differentiable
    media = Media(reds(0.1, 0.6, -1.0, 0.4).pixels.requires_grad_())
    scores = PairwiseWinRate(Red(), 0.3)(media, prompts(0, 0, 0, 0), grad=True)
    (slope,) = torch.autograd.grad(scores.total[1], media.pixels)
    expected = {}
    for i in (0, 3):
        p = 1 / (1 + math.exp(-(0.6 - (0.1, 0.6, 0, 0.4)[i]) / 0.3))
        expected[i] = p * (1 - p) / 0.3 / 2
    assert slope[:, 0, 0, 0].tolist() == pytest.approx(
        [-expected[0], expected[0] + expected[3], 0, -expected[3]], rel=1e-5
    )


def brute_force(features: Tensor) -> list[float]:
    def diversity(some: Tensor) -> float:
        pairs = [(i, j) for i in range(len(some)) for j in range(i)]
        distances = [1 - F.cosine_similarity(some[i], some[j], dim=0).item() for i, j in pairs]
        return sum(distances) / len(pairs) if pairs else 0.0

    return [diversity(features) - diversity(torch.cat([features[:i], features[i + 1 :]])) for i in range(len(features))]


@pytest.mark.parametrize("count", [2, 3, 6])
def test_diversity_is_left_out_by_hand(count: int) -> None:
    features = torch.randn(count, 12, dtype=torch.float64)
    assert diversity_added(features).tolist() == pytest.approx(brute_force(features), abs=1e-12)
    pixels = features.float().view(count, 3, 2, 2)
    scores = GroupDiversity(flat, batch_size=2)(Media(pixels), prompts(*[4] * count))
    assert scores.total.tolist() == pytest.approx(brute_force(features), abs=1e-5)


def test_duplicates_add_nothing_and_what_is_odd_does() -> None:
    pictures = scenes(3)
    pixels = torch.cat([pictures[[0, 0, 0, 1]], pictures])
    scores = GroupDiversity(CLIPEmbedder("shapes"))(Media(pixels), prompts(0, 0, 0, 0, 1, 1, 1))
    assert (scores.total[:3] < 0).all()
    assert scores.total[3] > 0
    same = GroupDiversity(CLIPEmbedder("shapes"))(Media(pictures[[0, 0, 0]]), prompts(0, 0, 0)).total
    torch.testing.assert_close(same, torch.zeros(3), rtol=0, atol=1e-6)


def test_gradient_of_diversity_is_that_of_finite_differences() -> None:
    def added(features: Tensor) -> Tensor:
        return diversity_added(features) @ torch.arange(1.0, 6.0, dtype=torch.float64)

    assert torch.autograd.gradcheck(added, torch.randn(5, 7, dtype=torch.float64, requires_grad=True))
    media = Media(scenes(3).requires_grad_())
    scores = GroupDiversity(CLIPEmbedder("shapes"))(media, prompts(0, 0, 0), grad=True)
    (slope,) = torch.autograd.grad(scores.total[0], media.pixels)
    assert (slope.abs().amax((1, 2, 3)) > 1e-6).all(), "to the others' pixels too"
    step = 0.1 * slope / slope.abs().max()
    after = GroupDiversity(CLIPEmbedder("shapes"))(Media(media.pixels.detach() + step), prompts(0, 0, 0)).total
    assert after[0] > scores.total[0] + 1e-3


def test_a_broken_picture_is_left_out() -> None:
    pixels = torch.rand(4, 3, 4, 4)
    pixels[1, 0, 0, 0] = torch.nan
    scores = GroupDiversity(flat)(Media(pixels), prompts(0, 0, 0, 0))
    assert scores.valid.tolist() == [True, False, True, True]
    assert torch.equal(
        scores.total[scores.valid], GroupDiversity(flat)(Media(pixels[[0, 2, 3]]), prompts(0, 0, 0)).total
    )


def test_cards() -> None:
    assert {make().card.scope for make in REWARDS} == {"group"}
    assert PairwiseWinRate(CLIPScore("shapes")).card.modality == "image"
    assert WinRate(redder).card.modality == "any"
    videos = Media(torch.rand(2, 4, 3, 2, 2), 8.0)
    assert (
        WinRate(lambda first, second, prompts: torch.ones(len(first)))(videos, prompts(0, 0)).total.tolist()
        == [0.5] * 2
    )


def test_they_are_built_from_a_config() -> None:
    made = build(PairwiseWinRate, {"reward": {"class": "rewards.JPEGCompressibility"}, "temperature": 2})
    assert made.temperature == 2.0
    embedder = {"class": "rewards.sets.CLIPEmbedder", "model": "shapes"}
    assert isinstance(build(GroupDiversity, {"embedder": embedder}).embedder, CLIPEmbedder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PairwiseWinRate(Red(), 0.0), "temperature must be above 0"),
        (lambda: PairwiseWinRate(Red(), math.nan), "temperature must be above 0"),
        (lambda: PairwiseWinRate(Whole()), "scores a whole set"),
        (lambda: WinRate(redder, batch_size=0), "batch_size must be at least 1"),
        (lambda: GroupDiversity(flat, batch_size=0), "batch_size must be at least 1"),
        (lambda: WinRate(lambda *_: torch.tensor([0.5]))(reds(0.0, 1.0, 1.0), prompts(0, 0, 0)), "a judge of 3 pairs"),
        (lambda: WinRate(lambda *_: torch.tensor([1.5]))(reds(0.0, 1.0), prompts(0, 0)), "as many probabilities"),
        (lambda: GroupDiversity(lambda x: x)(reds(0.0, 1.0), prompts(0, 0)), r"needs an embedding \[b, d\]"),
        (lambda: GroupDiversity(flat)(Media(torch.rand(1, 2, 3, 4, 4), 8.0), prompts(0)), "scores pictures"),
    ],
)
def test_wrong_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

"""Rewards of rewards: values against arithmetic by hand, laws, parts, gradients, and failures that stay failures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flowalign.records import Media, Prompts, Scores
from rewards.algebra import (
    Clip,
    Gate,
    GroupNormalise,
    Mean,
    MeanMinusStd,
    Normalise,
    RunningNormalise,
    Spread,
    WorstCase,
    running_normalisers,
)
from rewards.base import Card, Minimum, Product, Reward, WeightedSum
from rewards.shaping import PAR, LambdaHarmonic, LogSigmoid, TextNorm, UncertaintyWeighted, reference_scores

GONE = 1e30  # of a picture that this reward has no score for, and others have: nan would be no picture at all


class Channel(Reward):
    """One number of each picture, as it is; invalid where it is not finite or `GONE`, if it is honest."""

    differentiable, card, honest = True, Card(), True

    def __init__(self, channel: int, name: str) -> None:
        self.channel, self.name = channel, name

    def score(self, media: Media, prompts: Prompts) -> Scores:
        total = media.pixels[:, self.channel, 0, 0]
        total = total.where(total != GONE, math.nan)
        return Scores(total, {self.name: total}, total.detach().isfinite() | (not self.honest))


class Blind(Channel):
    """The same without a gradient, as of a reward that leaves torch."""

    differentiable = False

    def score(self, media: Media, prompts: Prompts) -> Scores:
        total = torch.tensor(media.pixels.numpy()[:, self.channel, 0, 0])
        return Scores(total, {self.name: total}, total.isfinite())


class Text(Reward):
    """first number * letters of the prompt + second number; what the prompts were is kept."""

    name, differentiable = "text", True

    def __init__(self) -> None:
        self.seen: list[Prompts] = []

    def score(self, media: Media, prompts: Prompts) -> Scores:
        self.seen.append(prompts)
        letters = torch.tensor([len(text) for text in prompts.text], dtype=media.pixels.dtype)
        total = media.pixels[:, 0, 0, 0] * letters + media.pixels[:, 1, 0, 0]
        return Scores(total, {"text": total}, total.detach().isfinite())


A, B, C = Channel(0, "a"), Channel(1, "b"), Channel(2, "c")


def shown(rows: list[list[float]] | Tensor) -> Media:
    values = torch.as_tensor(rows, dtype=torch.float64)
    return Media(values[:, :, None, None])


def said(count: int, groups: tuple[int, ...] | None = None) -> Prompts:
    texts = tuple("x" * (i % 4 + 1) for i in range(count))
    told = tuple({"contrastive": [text + "y", "z" * (i % 3 + 2)][: i % 2 + 1]} for i, text in enumerate(texts))
    return Prompts(texts, told, groups)


def numbers(reward: Reward, rows: list[list[float]] | Tensor, prompts: Prompts | None = None) -> list[float]:
    media = shown(rows)
    scores = reward.score(media, prompts or said(len(media)))
    assert scores.valid.all()
    return scores.total.tolist()


SAMPLE: dict[str, Callable[[], Reward]] = {
    "sum": lambda: 2 * A - B / 3 + 1,
    "min": lambda: Minimum([A, B, C]),
    "product": lambda: A * B * C,
    "clip": lambda: Clip(A * 2, 0.3, 1.2),
    "normalise": lambda: Normalise(A, 0.4, 0.2),
    "running": lambda: RunningNormalise(A + B),
    "gate": lambda: Gate(A, B, 0.5, floor=-1.0),
    "mean": lambda: Mean([A, B, C]),
    "worst": lambda: WorstCase([A, B, C]),
    "mean_minus_std": lambda: MeanMinusStd([A, B, C], k=0.7),
    "spread": lambda: Spread([A, B, C]),
    "par": lambda: PAR(A, [0.1, 0.6], k=3.0),
    "par_by_prompt": lambda: PAR(A, {"x" * n: [0.1 * n, 0.6][: n % 2 + 1] for n in range(1, 5)}),
    "log_sigmoid": lambda: LogSigmoid(A, {"x" * n: [0.1 * n, 0.6] for n in range(1, 5)}),
    "harmonic": lambda: LambdaHarmonic(A, B, 0.3),
    "uncertain": lambda: UncertaintyWeighted(A, Spread([A, B, C]), 0.2),
    "textnorm": lambda: TextNorm(Text(), 0.5),
    "nested": lambda: Minimum([Clip(A * B, 0.05, 0.9), PAR(C - A), LambdaHarmonic(A, C)]) + 0.1 * Gate(A, C, 0.4),
}
MADE = pytest.mark.parametrize("make", [*SAMPLE.values(), lambda: GroupNormalise(A, 0.1)], ids=[*SAMPLE, "group"])


@pytest.mark.parametrize(
    ("reward", "row", "expected"),
    [
        (Clip(A, 0.0, 1.0), [-2.0, 0, 0], 0.0),
        (Clip(A, low=0.5), [7.0, 0, 0], 7.0),
        (Clip(A, high=0.5), [7.0, 0, 0], 0.5),
        (Normalise(A, 20.0, 2.0), [23.0, 0, 0], 1.5),
        (A * B, [3.0, -2.0, 0], -6.0),
        (Product([A, B, C]), [3.0, 2.0, 0.5], 3.0),
        (Gate(A, B, 0.5), [3.0, 0.5, 0], 0.0),  # at the threshold it is shut
        (Gate(A, B, 0.5, floor=-4.0), [3.0, 0.4, 0], -4.0),
        (Gate(A, B, 0.5, floor=-4.0), [3.0, 0.6, 0], 3.0),
        (Mean([A, B, C]), [1.0, 2.0, 4.0], 7 / 3),
        (WorstCase([A, B, C]), [1.0, 2.0, 4.0], 1.0),
        (MeanMinusStd([A, B, C], 0.5), [1.0, 2.0, 4.0], 7 / 3 - 0.5 * math.sqrt(14 / 9)),
        (MeanMinusStd([A, B, C], 0.0), [1.0, 2.0, 4.0], 7 / 3),
        (Spread([A, B, C]), [1.0, 2.0, 4.0], math.sqrt(14 / 9)),
        (PAR(A, [0.0, 1.0, -1.0]), [0.5, 0, 0], 0.60586),
        (PAR(A, [0.2], k=4.0), [0.7, 0, 0], 1 / (1 + math.exp(-2))),
        (LogSigmoid(A, [0.85]), [0.5, 0, 0], -0.88338),
        (LogSigmoid(A, [0.0, 1.0, 2.0], quantile=0.75), [1.5, 0, 0], -math.log(2)),
        (LambdaHarmonic((A + 1) / 2, (B + 1) / 2, 0.5), [0.8, 0.3, 0], 0.75484),
        (LambdaHarmonic((A + 1) / 2, (B + 1) / 2, 0.3), [0.8, 0.3, 0], 0.70909),
        (LambdaHarmonic(A, B, 1.0), [0.8, 0.0, 0], 0.8),
        (LambdaHarmonic(A, B, 0.0), [0.0, 0.3, 0], 0.3),
        (LambdaHarmonic(A, B, 0.5), [0.0, 0.3, 0], 0.0),
        (LambdaHarmonic(A, B, 0.5), [0.0, 0.0, 0], 0.0),
        (UncertaintyWeighted(A, B, 0.1), [2.0, 0.0, 0], 2.0),
        (UncertaintyWeighted(A, B, 0.1), [-2.0, math.log(4), 0], -0.5 - 0.1 * math.log(4)),
    ],
)
def test_values(reward: Reward, row: list[float], expected: float) -> None:
    assert numbers(reward, [row]) == pytest.approx([expected], abs=6e-6)


@MADE
def test_parts_are_kept_as_they_were(make: Callable[[], Reward]) -> None:
    media, prompts = shown(torch.rand(4, 3)), said(4, (0, 0, 1, 1))
    parts = make().score(media, prompts).parts
    wanted = {"a": 0, "b": 1, "c": 2}
    assert parts.keys() & {*wanted, "text"}
    for name, value in parts.items():
        if name in wanted:
            assert torch.equal(value, media.pixels[:, wanted[name], 0, 0])
        assert len(value) == 4


@pytest.mark.parametrize("make", SAMPLE.values(), ids=SAMPLE)
def test_samples_are_scored_each_on_its_own(make: Callable[[], Reward]) -> None:
    reward, media, prompts = make(), shown(torch.rand(7, 3)), said(7)
    assert reward.card.scope == "sample"
    whole = reward(media, prompts).total
    singles = torch.cat([reward(media.rows([i]), prompts.rows([i])).total for i in range(7)])
    torch.testing.assert_close(singles, whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(reward(media, prompts, chunk=3).total, whole, rtol=1e-6, atol=1e-7)
    order = torch.randperm(7).tolist()
    shuffled = reward(media.rows(order), prompts.rows(order)).total
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-6, atol=1e-7)


@MADE
def test_gradients_are_those_of_finite_differences(make: Callable[[], Reward]) -> None:
    """In float64, at values that no bound or threshold is near to."""
    values = torch.tensor([[0.31, 0.62, 0.83], [0.91, 0.22, 0.54], [0.13, 0.74, 0.45], [0.66, 0.87, 0.18]]).double()
    reward, prompts = make(), said(4, (0, 0, 1, 1))
    assert reward.differentiable
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: reward.score(shown(v), prompts).total, (values,), rtol=1e-3, atol=1e-6)
    total = reward(shown(values), prompts, grad=True).total
    (gradient,) = torch.autograd.grad(total @ torch.rand(4), values)
    assert gradient.abs().sum() > 0
    assert total.dtype == torch.float32


@MADE
def test_a_failure_is_no_score_and_touches_no_other(make: Callable[[], Reward]) -> None:
    good = torch.rand(4, 3).double()
    bad, groups = good.clone(), (0, 1, 0, 1)
    bad[1] = math.nan  # of group 1, whose other member is sample 3
    bad.requires_grad_()
    reward, prompts = make(), said(4, groups)
    scores, whole = reward(shown(bad), prompts, grad=True), reward(shown(good), prompts)
    assert scores.valid.tolist() == [True, False, True, True]
    assert scores.total[1].isnan()
    assert torch.equal(scores.total[[0, 2]], whole.total[[0, 2]])
    scores.total[scores.valid].sum().backward()
    assert bad.grad is not None
    assert bad.grad.isfinite().all()
    assert bad.grad[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "reward",
    [
        Clip(A, 0.0, 1.0), Minimum([A, B]), WorstCase([A, B]), PAR(A), Gate(B, A, 0.5), A * 0 + B,
        Mean([A, B]), UncertaintyWeighted(B, A), LambdaHarmonic(A, B), RunningNormalise(A),
    ],
    ids=lambda reward: type(reward).__name__,
)  # fmt: skip
@pytest.mark.parametrize("honest", [True, False])
def test_no_bound_makes_a_number_of_what_is_none(
    reward: Reward, bad: float, honest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the term itself says that its score is not valid or not."""
    monkeypatch.setattr(Channel, "honest", honest)
    scores = reward(shown([[bad, 0.5, 0.0], [0.5, 0.5, 0.0]]), said(2))
    assert scores.valid.tolist() == [False, True]
    assert scores.total[0].isnan()


def test_below_the_domain_is_invalid() -> None:
    rows = shown([[-0.1, 0.5, 0.0], [0.5, -0.1, 0.0]])
    for use in (Reward.__call__, lambda reward, *given: reward.score(*given)):
        assert use(LambdaHarmonic(A, B), rows, said(2)).valid.tolist() == [False, False]
        assert use(UncertaintyWeighted(A, B), rows, said(2)).valid.tolist() == [True, False]


def gradient(reward: Reward, row: list[float]) -> list[float]:
    values = torch.tensor([row], dtype=torch.float64, requires_grad=True)
    reward(shown(values), said(1), grad=True).total.sum().backward()
    assert values.grad is not None
    return values.grad[0].tolist()


@pytest.mark.parametrize(
    ("reward", "row", "expected"),
    [
        (Clip(A, 0.0, 1.0), [0.5, 0, 0], [1, 0, 0]),
        (Clip(A, 0.0, 1.0), [1.5, 0, 0], [0, 0, 0]),
        (Clip(A, 0.0, 1.0), [-0.5, 0, 0], [0, 0, 0]),
        (Minimum([A, B, C]), [3.0, 1.0, 2.0], [0, 1, 0]),
        (Minimum([A, B]), [1.0, 1.0, 2.0], [0.5, 0.5, 0]),
        (WorstCase([A, B, C]), [3.0, 1.0, 2.0], [0, 1, 0]),
        (A * B * C, [2.0, 0.0, 3.0], [0, 6, 0]),
        (A * A, [3.0, 0.0, 0.0], [6, 0, 0]),
        (Gate(A, B, 0.5), [2.0, 0.6, 0.0], [1, 0, 0]),
        (Gate(A, B, 0.5), [2.0, 0.4, 0.0], [0, 0, 0]),
        (MeanMinusStd([A, B], 1.0), [2.0, 2.0, 0.0], [0.5, 0.5, 0]),
        (LambdaHarmonic(A, B, 0.5), [0.0, 0.3, 0.0], [2, 0, 0]),
    ],
)
def test_gradients_by_hand(reward: Reward, row: list[float], expected: list[float]) -> None:
    assert gradient(reward, row) == pytest.approx(expected)


def test_more_uncertainty_pays_for_a_negative_reward_until_the_penalty() -> None:
    assert gradient(UncertaintyWeighted(A, B, 0.1), [-1.0, 0.0, 0.0])[1] == pytest.approx(0.9)
    assert gradient(UncertaintyWeighted(A, B, 0.1), [-0.05, 0.0, 0.0])[1] == pytest.approx(-0.05)
    assert gradient(UncertaintyWeighted(A, B, 0.1), [1.0, 0.0, 0.0])[1] == pytest.approx(-1.1)


def test_a_combination_is_differentiable_where_its_terms_are() -> None:
    blind = Blind(0, "blind")
    without = [A * blind, Minimum([A, blind]), Clip(blind, 0.0), GroupNormalise(blind), PAR(blind), Mean([A, blind])]
    for reward in [*without, Gate(blind, A, 0.5), LambdaHarmonic(A, blind), UncertaintyWeighted(A, blind)]:
        assert not reward.differentiable
        with pytest.raises(ValueError, match="has no gradient"):
            reward(shown([[1.0, 0, 0]]), said(1), grad=True)


def test_a_gate_has_a_gradient_whatever_its_condition_has() -> None:
    gated = Gate(A, Blind(1, "blind"), 0.5)
    assert gated.differentiable
    assert gradient(gated, [2.0, 0.6, 0.0]) == [1, 0, 0]
    scores = gated(shown([[2.0, 0.6, 0.0], [2.0, 0.4, 0.0]]), said(2))
    assert scores.parts["gate/open"].tolist() == [1, 0]


def test_behind_a_shut_gate_the_reward_is_not_needed() -> None:
    scores = Gate(A, B, 0.5, floor=-1.0)(shown([[GONE, 0.4, 0], [GONE, 0.6, 0], [1.0, GONE, 0]]), said(3))
    assert scores.valid.tolist() == [True, False, False]
    assert scores.total[0] == -1
    assert scores.parts["gate/open"].isnan().tolist() == [False, False, True]


def test_ensembles_show_how_far_they_disagree() -> None:
    rows = [[1.0, 2.0, 4.0], [3.0, 3.0, 3.0], [1.0, math.nan, 1.0]]
    for kind in (Mean, WorstCase, MeanMinusStd):
        parts = kind([A, B, C], name="judges")(shown(rows), said(3)).parts
        assert parts["judges/std"][:2].tolist() == pytest.approx([math.sqrt(14 / 9), 0])
        assert parts["judges/std"][2].isnan()
    nested = Mean([Mean([A, B]), MeanMinusStd([B, C])]).score(shown(rows[:1]), said(1)).parts
    assert nested.keys() == {"a", "b", "ensemble/std", "b_2", "c", "ensemble/std_2", "ensemble/std_3"}


def test_laws_of_sums_minima_and_products() -> None:
    rows = torch.rand(50, 3).double() + 0.1
    totals, media, prompts = rows.T, shown(rows), said(50)
    for _ in range(20):
        u, v, w = torch.randn(3).tolist()
        left, right = u * (A + v * B) - w * C, WeightedSum([A, B, C], [u, u * v, -w])
        expected = u * totals[0] + u * v * totals[1] - w * totals[2]
        for reward in (left, right):
            torch.testing.assert_close(reward.score(media, prompts).total, expected)
    least, product = (reward.score(media, prompts).total for reward in (Minimum([A, B, C]), A * B * C))
    assert (least <= totals).all()
    torch.testing.assert_close(product, totals.log().sum(0).exp())
    assert (product > 0).all()
    torch.testing.assert_close((C * B * A).score(media, prompts).total, product)
    torch.testing.assert_close((0.5 * A * (B * 2)).score(media, prompts).total, totals[0] * totals[1])
    assert torch.equal((-Minimum([-A, -B])).score(media, prompts).total, totals[:2].amax(0))
    for weight in (0.1, 0.5, 0.9):
        harmonic = LambdaHarmonic(A, B, weight).score(media, prompts).total
        assert (harmonic <= weight * totals[0] + (1 - weight) * totals[1] + 1e-12).all(), "below the arithmetic mean"
        assert (harmonic >= totals[:2].amin(0) - 1e-12).all()


@pytest.mark.parametrize("make", [lambda: PAR(A, [0.2, -0.4], 2.0), lambda: LogSigmoid(A, [0.2, -0.4]),
                                  lambda: TextNorm(Text())])  # fmt: skip
def test_shapes_are_monotone_and_bounded(make: Callable[[], Reward]) -> None:
    rows = torch.zeros(9, 3)
    rows[:, 0] = torch.linspace(-2, 2, 9)
    shaped = numbers(make(), rows, Prompts(("xxx",) * 9, ({"contrastive": ["x"]},) * 9))
    assert all(low < high for low, high in zip(shaped, shaped[1:], strict=False))
    assert all(-3 < value < 1 for value in shaped)


def test_groups_are_normalised_each_on_its_own() -> None:
    groups = tuple(torch.randint(0, 4, (40,)).tolist())
    rows = torch.randn(40, 3).double()
    rows[:, 0] = rows[:, 0] * 7 + 1000
    scores = GroupNormalise(A).score(shown(rows), said(40, groups)).total
    numbered = torch.tensor(groups)
    for group in set(groups):
        own = scores[numbered == group]
        assert own.mean().item() == pytest.approx(0, abs=1e-9)
        assert own.std(correction=0).item() == pytest.approx(1)
    changed = rows.clone()
    changed[numbered != 2] *= -3
    again = GroupNormalise(A).score(shown(changed), said(40, groups)).total
    assert torch.equal(again[numbered == 2], scores[numbered == 2])
    order = torch.randperm(40).tolist()
    moved = GroupNormalise(A).score(shown(rows[order]), said(40, groups).rows(order)).total
    torch.testing.assert_close(moved, scores[order])
    affine = GroupNormalise(3 * A + 5).score(shown(rows), said(40, groups)).total
    torch.testing.assert_close(affine, scores)
    assert (GroupNormalise(-A).score(shown(rows), said(40, groups)).total + scores).abs().max() < 1e-9


def test_equal_and_single_members_of_a_group_get_zero_and_no_gradient() -> None:
    values = torch.tensor([[0.1, 0, 0], [0.1, 0, 0], [0.1, 0, 0], [9.0, 0, 0]], dtype=torch.float64, requires_grad=True)
    total = GroupNormalise(A).score(shown(values), said(4, (5, 5, 5, 8))).total
    assert total.tolist() == [0, 0, 0, 0]
    (total @ torch.arange(4.0).double()).backward()
    assert values.grad is not None
    assert values.grad.abs().sum() == 0


def test_a_group_is_normalised_over_its_valid_samples() -> None:
    scores = GroupNormalise(A)(shown([[1.0, 0, 0], [math.nan, 0, 0], [3.0, 0, 0]]), said(3, (0, 0, 0)))
    assert scores.total[[0, 2]].tolist() == [-1, 1]
    assert scores.valid.tolist() == [True, False, True]
    none = GroupNormalise(A)(shown([[math.nan, 0, 0]]), said(1, (0,)))
    assert none.valid.tolist() == [False]


def test_group_rewards_are_called_whole_and_with_groups() -> None:
    reward = 2 * GroupNormalise(A) + B
    assert reward.card.scope == "group"
    rows, prompts = shown(torch.rand(6, 3)), said(6, (0, 0, 0, 1, 1, 1))
    assert torch.equal(reward(rows, prompts, chunk=2).total, reward(rows, prompts).total)
    with pytest.raises(ValueError, match="group numbers"):
        reward(rows, replace(prompts, groups=None))


def epoch(count: int) -> tuple[Media, Prompts]:
    return shown(torch.randn(count, 3).double() * 3 + 5), said(count)


def test_running_statistics_are_those_of_all_epochs_before() -> None:
    reward = RunningNormalise(A)
    seen: list[float] = []
    for count in (8, 1, 30):
        media, prompts = epoch(count)
        raw = media.pixels[:, 0, 0, 0]
        scores = reward.score(media, prompts)
        known = torch.tensor(seen, dtype=torch.float64)
        mean, std = (known.mean(), known.std(correction=0)) if seen else (torch.tensor(0.0), torch.tensor(1.0))
        torch.testing.assert_close(scores.total, (raw - mean) / std)
        assert torch.equal(scores.parts["a/raw"], raw)
        parts = [reward.score(media.rows([i]), prompts.rows([i])).total for i in reversed(range(count))]
        assert torch.equal(torch.cat(parts[::-1]), scores.total), "scoring leaves the statistics alone"
        reward.update(scores)
        seen += raw.tolist()
    assert reward.count == 39
    assert reward.std == pytest.approx(torch.tensor(seen).double().std(correction=0).item())


def test_running_statistics_go_on_exactly() -> None:
    first, second = RunningNormalise(A), RunningNormalise(A)
    first.update(first.score(*epoch(9)))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    later = epoch(5)
    for reward in (first, second):
        reward.update(reward.score(*later))
    assert first.state_dict() == second.state_dict()
    assert torch.equal(first.score(*later).total, second.score(*later).total)


def test_running_statistics_far_from_zero_and_of_equal_scores() -> None:
    reward = RunningNormalise(A)
    reward.update(reward.score(shown([[2.0, 0, 0]] * 3), said(3)))
    assert (reward.mean, reward.std) == (2.0, 1.0)
    far = RunningNormalise(A)
    for _ in range(3):
        far.update(far.score(shown([[1e8, 0, 0], [1e8 + 1, 0, 0]]), said(2)))
    assert far.std == pytest.approx(0.5, rel=1e-6)


def test_running_normalisers_within_a_reward_are_updated_from_its_scores() -> None:
    reward = Minimum([RunningNormalise(A), 2 * RunningNormalise(B, name="second")]) + GroupNormalise(C)
    found = running_normalisers(reward)
    assert found.keys() == {"a", "second"}
    scores = reward(shown([[1.0, 10.0, 0], [3.0, GONE, 0], [5.0, 30.0, 1.0]]), said(3, (0, 0, 0)))
    for normaliser in found.values():
        normaliser.update(scores)
    assert [(n.count, n.mean) for n in found.values()] == [(3, 3.0), (2, 20.0)]
    with pytest.raises(ValueError, match="two running normalisers are called 'a'"):
        running_normalisers(RunningNormalise(A) + RunningNormalise(A))
    with pytest.raises(ValueError, match="no part 'a/raw' in these scores; they have a"):
        RunningNormalise(A).update(A(shown([[1.0, 0, 0]]), said(1)))
    shared = RunningNormalise(A)
    assert running_normalisers(shared - Clip(shared, 0.0)) == {"a": shared}


@pytest.mark.parametrize(
    "state",
    [{}, {"count": 1.0, "mean": 0.0}, {"count": -1, "mean": 0.0, "squares": 0.0},
     {"count": 2, "mean": math.nan, "squares": 0.0}, {"count": 1.5, "mean": 0.0, "squares": 0.0}],
)  # fmt: skip
def test_what_is_no_state(state: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="has count, mean and squares"):
        RunningNormalise(A).load_state_dict(state)


def test_textnorm_of_one_contrastive_prompt_is_a_sigmoid_of_the_difference() -> None:
    prompts = Prompts(("xxx", "x"), ({"contrastive": ["y"], "own": 1}, {"contrastive": ["yy", "yyyy"]}))
    rows = [[0.5, 0.1, 0], [0.5, 0.2, 0]]
    reward = Text()
    first, second = numbers(TextNorm(reward, temperature=0.5), rows, prompts)
    assert first == pytest.approx(1 / (1 + math.exp(-(1.5 - 0.5) / 0.5)))
    assert second == pytest.approx(1 / (1 + math.exp(0.5 / 0.5) + math.exp(1.5 / 0.5)))
    assert reward.seen[1].text == ("y", "yy")
    assert reward.seen[2].text == ("yyyy",)
    assert [row for seen in reward.seen[1:] for row in seen.metadata] == [{}] * 3, "metadata is the prompt's own"
    shifted = numbers(TextNorm(reward, temperature=0.5), [[0.5, 7.1, 0], [0.5, -3.2, 0]], prompts)
    assert shifted == pytest.approx([first, second]), "what any prompt would get cancels"
    large = numbers(TextNorm(reward), [[500.0, 0, 0], [-500.0, 0, 0]], prompts)
    assert large == [1.0, 1.0], "no overflow"


def test_textnorm_needs_all_its_prompts_scores() -> None:
    class Picky(Text):
        def score(self, media: Media, prompts: Prompts) -> Scores:
            scores = super().score(media, prompts)
            return Scores(scores.total, scores.parts, torch.tensor([text != "bad" for text in prompts.text]))

    told = ({"contrastive": ["fine", "bad"]}, {"contrastive": ["fine"]})
    scores = TextNorm(Picky())(shown([[1.0, 0, 0]] * 2), Prompts(("x", "y"), told))
    assert scores.valid.tolist() == [False, True]
    assert scores.total[0].isnan()


@pytest.mark.parametrize("told", [{}, {"contrastive": []}, {"contrastive": "one"}, {"contrastive": [3]}])
def test_a_prompt_without_contrastive_ones(told: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"prompt 1 \('b'\) needs metadata \{'contrastive'"):
        TextNorm(Text())(shown([[1.0, 0, 0]] * 2), Prompts(("a", "b"), ({"contrastive": ["c"]}, told)))


def test_references_of_each_prompt() -> None:
    base = shown([[0.0, 0, 0], [1.0, 0, 0], [math.nan, 0, 0], [4.0, 0, 0]])
    references = reference_scores(A, base, Prompts(("p", "p", "p", "q"), ({},) * 4))
    assert references == {"p": [0.0, 1.0], "q": [4.0]}
    asked = Prompts(("q", "p"), ({}, {}))
    low, high = numbers(PAR(A, references), [[1.0, 0, 0], [1.0, 0, 0]], asked)
    assert low == pytest.approx(1 / (1 + math.exp(3)))
    assert high == pytest.approx((0.5 + 1 / (1 + math.exp(-1))) / 2)
    with pytest.raises(ValueError, match="PAR has no reference scores for the prompt 'r'"):
        PAR(A, references)(shown([[1.0, 0, 0]]), Prompts(("r",), ({},)))
    with pytest.raises(ValueError, match="no valid score of a reference for the prompt 'p'"):
        reference_scores(A, base.rows([2]), Prompts(("p",), ({},)))


def test_cards_are_joined() -> None:
    videos, anything = Channel(0, "v"), Channel(1, "w")
    videos.card, anything.card = Card(modality="video"), Card(modality="any", scope="set")
    assert (videos * anything).card.modality == "video"
    assert Gate(GroupNormalise(A), B, 0.0).card.scope == "group"
    assert GroupNormalise(anything).card.scope == "set"
    assert Clip(A, 0.0, 2.0).card.usual == (0.0, 2.0)
    assert PAR(A).card.usual == (0.0, 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clip(A), "needs a bound"),
        (lambda: Clip(A, 1.0, 1.0), "low below high, got 1.0 and 1.0"),
        (lambda: Clip(A, math.nan, 1.0), "low below high"),
        (lambda: Normalise(A, 0.0, 0.0), "finite std > 0"),
        (lambda: Normalise(A, math.inf, 1.0), "finite mean"),
        (lambda: GroupNormalise(A, -1.0), "eps must be at least 0"),
        (lambda: Gate(A, B, math.nan), "threshold and floor must be finite"),
        (lambda: Mean([A]), "at least two rewards, got 1"),
        (lambda: MeanMinusStd([A, B], -1.0), "k must be at least 0"),
        (lambda: Product([]), "Product needs at least one"),
        (lambda: WeightedSum([A], [math.inf]), "must be finite"),
        (lambda: PAR(A, []), r"PAR needs finite reference scores, got \[\]"),
        (lambda: PAR(A, {"p": [1.0], "q": [math.nan]}), "for the prompt 'q'"),
        (lambda: PAR(A, k=0.0), "k must be positive"),
        (lambda: LogSigmoid(A, quantile=1.5), r"quantile must be in \[0, 1\]"),
        (lambda: LambdaHarmonic(A, B, 1.1), r"weight must be in \[0, 1\]"),
        (lambda: UncertaintyWeighted(A, B, -0.1), "penalty must be at least 0"),
        (lambda: TextNorm(A, 0.0), "temperature must be positive"),
        (lambda: TextNorm(GroupNormalise(A)), "swap them"),
    ],
)
def test_wrong_arguments(make: Callable[[], Reward], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

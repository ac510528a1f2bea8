"""Intervals that cover the truth as often as they say, means over categories, marks that hold for all of a table."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import stdtrit

from flowalign.evaluation.results import compare
from flowalign.evaluation.statistics import Estimate, estimates, over_seeds, wins


def covered(found: list[Estimate], truth: float) -> float:
    return float(np.mean([one.low <= truth <= one.high for one in found]))


SWEEPS = 1000
# prompts, seeds, std of prompts and of noise: noise that matters more than prompts, less, and few prompts
CASES = [(60, 3, 0.3, 1.0), (60, 3, 1.0, 0.3), (24, 2, 0.5, 1.0), (12, 3, 0.3, 1.0)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_intervals_cover_the_truth(case: tuple[int, int, float, float]) -> None:
    prompts, seeds, between, within = case
    rng = np.random.default_rng(1)
    noise = within * rng.standard_normal((prompts, seeds, SWEEPS))
    changes = 0.2 + between * rng.standard_normal((prompts, 1, SWEEPS)) + noise
    assert 0.93 <= covered(estimates(changes.mean(1), resamples=3000), 0.2) <= 0.97


def test_intervals_of_accuracies_cover_the_truth() -> None:
    """Two arms that pass or fail, of prompts that are easy or hard for both, from the same 3 seeds."""
    rng = np.random.default_rng(2)
    easy = rng.beta(1.5, 1.5, (64, SWEEPS))
    better = easy + 0.3 * easy * (1 - easy)
    truth = 0.3 * (0.5 - (1.5 * 2.5) / (3 * 4))  # E[p] - E[p^2] of a Beta(1.5, 1.5)
    noise = rng.random((64, 3, SWEEPS))
    changes = (noise < better[:, None]).astype(float) - (noise < easy[:, None])
    assert 0.93 <= covered(estimates(changes.mean(1), resamples=3000), truth) <= 0.97


def test_intervals_of_a_mean_over_categories_cover_the_truth() -> None:
    rng = np.random.default_rng(1)
    strata = ["a"] * 40 + ["b"] * 30 + ["c"] * 15
    levels = np.repeat([0.2, 0.8, -0.7], [40, 30, 15])[:, None]
    changes = levels + 0.5 * rng.standard_normal((85, SWEEPS))
    assert 0.93 <= covered(estimates(changes, strata, resamples=3000), 0.1) <= 0.97


def test_resampling_seeds_too_would_be_too_wide() -> None:
    """What the module says of a second level: its variance has var(noise) (S - 1) / (S^2 P) more than the truth."""
    rng = np.random.default_rng(3)
    prompts, seeds = 40, 3
    values = rng.standard_normal((prompts, seeds))
    one = estimates(values.mean(1)[:, None], resamples=20000)[0].error ** 2
    at = rng.integers(prompts, size=(20000, prompts, 1))
    both = values[at, rng.integers(seeds, size=(20000, prompts, seeds))].mean((1, 2)).var()
    within = values.var(1).mean()
    assert one == pytest.approx(values.mean(1).var(ddof=1) / prompts, rel=0.05)
    assert both == pytest.approx(values.mean(1).var() / prompts + within / seeds / prompts, rel=0.05)
    assert both > 1.3 * one


def test_a_mean_is_over_prompts_or_over_categories() -> None:
    column = np.array([1.0, 2.0, 3.0, 10.0, np.nan])[:, None]
    assert estimates(column)[0].value == 4.0
    assert estimates(column)[0].count == 4
    strata = ["a", "a", "a", "b", "c"]  # of c nothing is known
    assert estimates(column, strata)[0].value == (2.0 + 10.0) / 2


def test_no_prompts_and_a_single_one() -> None:
    lone, none = estimates(np.array([[0.4, np.nan]]))
    assert (lone.value, lone.count) == (0.4, 1)
    assert np.isnan(lone.low)
    assert np.isnan(none.value)
    assert not lone.real(1)
    assert not none.real(1)


def test_pairs_are_held_against_one_another() -> None:
    """The same hard and easy prompts in both arms: their difference is far surer than either."""
    rng = np.random.default_rng(4)
    base = rng.normal(0, 5, (50, 1)) + rng.normal(0, 0.1, (50, 3))
    row = compare({"base": base, "arm": base + 0.3 + rng.normal(0, 0.1, (50, 3))}, "base")
    change = row.leads["arm"].change
    assert change.value == pytest.approx(row.arms["arm"].value - row.arms["base"].value)
    assert change.high - change.low < 0.1 * (row.arms["arm"].high - row.arms["arm"].low)
    assert change.real(20)
    turned = compare({"arm": base + 0.3, "base": base}, "arm").leads["base"].change
    assert turned.high < 0


def test_equal_arms_have_equal_intervals_and_no_lead() -> None:
    values = np.random.default_rng(5).standard_normal((20, 2))
    row = compare({"base": values, "same": values.copy()}, "base")
    assert row.arms["base"] == row.arms["same"]
    lead = row.leads["same"]
    assert (lead.change.value, lead.change.low, lead.change.high) == (0.0, 0.0, 0.0)
    assert lead.wins is not None
    assert lead.wins.value == 0.5
    assert not lead.change.real(1)


def test_ties_count_half_and_missing_scores_nothing() -> None:
    ours = np.array([[1.0, 2.0], [3.0, np.nan], [np.nan, np.nan]])
    theirs = np.array([[0.0, 2.0], [4.0, 1.0], [1.0, 1.0]])
    assert np.array_equal(wins(ours, theirs), [[1.0, 0.5], [0.0, np.nan], [np.nan, np.nan]], equal_nan=True)
    assert np.array_equal(over_seeds(ours), [1.5, 3.0, np.nan], equal_nan=True)
    row = compare({"base": theirs, "arm": ours}, "base")
    assert row.leads["arm"].change.value == pytest.approx((0.5 - 1.0) / 2)  # of pairs alone
    assert row.leads["arm"].wins is not None
    assert row.leads["arm"].wins.value == pytest.approx((0.75 + 0.0) / 2)


def test_marks_hold_for_all_differences_together() -> None:
    """Of 20 differences that are none, some is marked in about 1 sweep of 20, and without correction in most."""
    rng = np.random.default_rng(6)
    sweeps, together = 300, 20
    found = estimates(rng.standard_normal((40, sweeps * together)), resamples=1000)
    marked = np.array([one.real(together) for one in found]).reshape(sweeps, together).any(1).mean()
    alone = np.array([one.real(1) for one in found]).reshape(sweeps, together).any(1).mean()
    assert 0.02 <= marked <= 0.09
    assert alone > 0.5


def test_a_mark_is_student_s_at_bonferroni_s_level() -> None:
    edge = float(stdtrit(9, 1 - 0.025 / 4))
    assert Estimate(edge + 1e-6, 0, 0, 1.0, 10, 9, 10).real(4)
    assert not Estimate(edge - 1e-6, 0, 0, 1.0, 10, 9, 10).real(4)
    assert not Estimate(1.0, 1.0, 1.0, 0.0, 4, 3, 4).real(
        1
    )  # four prompts that all moved alike: a sign test's p is 1/8
    assert Estimate(1.0, 1.0, 1.0, 0.0, 8, 7, 8).real(1)

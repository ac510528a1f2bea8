"""GDPO: the authors' own example to their digits, and what normalising each term alone must and must not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.advantages import (
    dancegrpo_advantages,
    gdpo_advantages,
    group_advantages,
    unbiased_global_std,
    unbiased_group_std,
)
from flowalign.config import build
from flowalign.credit import GDPO, GatedGains
from flowalign.models.gaussian import GaussianModel
from flowalign.records import Media, Prompts
from flowalign.schedules import AllSteps
from flowalign.transitions import FlowSDE
from rewards import RunningNormalise
from rewards.algebra import running_normalisers
from rewards.base import FunctionReward, Reward
from rewards.terms import with_terms
from trainers import DenseGRPO, FlowGRPO, Sampling
from trainers.completed import completed_rewards_of
from trainers.dense_grpo import gains

GROUPS = torch.tensor([0, 0, 1, 1])
TERMS = (torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0]))  # totals 0, 1 and 0, 2
SDE = FlowSDE(0.7)


def close(actual: Tensor, expected: Any, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), atol=atol, rtol=0)


def test_the_authors_example():
    """GRPO cannot tell the group that won one reward from the one that won both; GDPO can."""
    total = TERMS[0] + TERMS[1]
    close(dancegrpo_advantages(total, GROUPS), [-0.7071, 0.7071, -0.7071, 0.7071], 1e-4)
    bare = GDPO(batch_std=None)(TERMS, (1.0, 1.0), GROUPS)
    close(bare, [-0.70701, 0.70701, -1.41401, 1.41401], 1e-5)
    close(GDPO()(TERMS, (1.0, 1.0), GROUPS), [-0.5477, 0.5477, -1.0954, 1.0954], 1e-4)
    close(GDPO(clip=1.0)(TERMS, (1.0, 1.0), GROUPS), [-0.5477, 0.5477, -1.0, 1.0], 1e-4)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("shape", [(12,), (12, 3)])
def test_one_reward_is_its_z_score_and_no_scale_matters(shape):
    groups, one, two = torch.arange(12) % 3, random(*shape), random(*shape).square()
    alone = GDPO(eps=0.0, batch_std=None)((one,), (1.0,), groups)
    close(alone, group_advantages(one, groups, unbiased_group_std), 1e-12)
    exact = GDPO(eps=0.0)
    both = exact((one, two), (0.7, 0.3), groups)
    close(exact((100 * one + 5, two), (0.7, 0.3), groups), both, 1e-9)
    close(exact((one, -two), (0.7, -0.3), groups), both, 1e-12)
    close(both.square().sum(0) / 11, torch.ones(shape[1:]), 1e-12)  # of mean 0
    assert (both - exact((one, two), (0.3, 0.7), groups)).abs().max() > 0.1
    if len(shape) == 2:  # each step on its own
        close(torch.stack([exact((one[:, t], two[:, t]), (0.7, 0.3), groups) for t in range(3)], 1), both, 1e-12)


def test_a_batch_of_equals_gets_exactly_0():
    for credit in (GDPO(), GDPO(eps=0.0), GDPO(batch_std=None)):
        assert not credit((torch.full((4,), 1 / 3), torch.zeros(4)), (1.0, 2.0), GROUPS).any()
    assert not gdpo_advantages(
        (torch.full((4,), 1 / 3),), (1.0,), GROUPS, unbiased_group_std, unbiased_global_std
    ).any()


def level(media: Media, prompts: Prompts) -> Tensor:
    return media.pixels[:, 0, 0, 0]


def steep(media: Media, prompts: Prompts) -> Tensor:
    return 100 * media.pixels[:, 0, 0, 0].square()


LEVEL, STEEP = FunctionReward(level), FunctionReward(steep)


def trainer(folder: Path, reward: Reward, kind: type[FlowGRPO] = FlowGRPO, **changes: Any) -> FlowGRPO:
    settings: dict[str, Any] = {"kl_coef": 0.0, "updates_per_epoch": 1, "epochs": 1, "folder": str(folder)}
    sampling = Sampling(AllSteps(SDE), 2, 8, 8, 64, 10, 1.0)
    return kind(GaussianModel(), reward, ["x", "y"], sampling, **settings | changes)


def test_terms_of_sums_within_sums():
    nested = 2 * (LEVEL + 0.5 * STEEP + 1) - LEVEL + 3
    found = with_terms(nested)
    assert (found.names, found.weights) == (("level", "steep", "level_2"), (2, 1, -1))
    media, prompts = Media(random(4, 3, 1, 1).float()), Prompts(("",) * 4, ({},) * 4)
    scores, plain = found(media, prompts), nested(media, prompts)
    close(scores.total, plain.total, 1e-4)
    close(scores.parts["term/steep"], steep(media, prompts))
    assert {*plain.parts} <= {*scores.parts}
    single = with_terms(LEVEL)(media, prompts)
    assert torch.equal(single.total, LEVEL(media, prompts).total)


def test_a_term_s_total_is_not_the_part_of_its_name():
    """A normaliser's part of the reward's name holds what it normalises."""
    normalised = RunningNormalise(STEEP)
    normalised.load_state_dict({"count": 10, "mean": 50.0, "squares": 4000.0})
    found = with_terms(normalised + LEVEL)
    media, prompts = Media(random(4, 3, 1, 1).float()), Prompts(("",) * 4, ({},) * 4)
    scores = found(media, prompts)
    close(scores.parts["term/steep"], (scores.parts["steep"] - 50) / 20, 1e-5)
    assert running_normalisers(found) == {"steep": normalised}


def test_a_trainer_normalises_each_term(tmp_path):
    """The weights are the reward's, or the credit's own; a term's scale in the reward is its weight's alone."""
    run = trainer(tmp_path / "a", LEVEL + 0.25 * STEEP, advantages=GDPO())
    batch = run.collect(0)
    terms = [batch.scores.parts[f"term/{name}"] for name in ("level", "steep")]
    close(batch.advantages, GDPO()(terms, (1.0, 0.25), batch.group_ids))
    assert batch.advantages.dtype == torch.float32
    other = trainer(tmp_path / "b", LEVEL + STEEP, advantages=GDPO(weights=(1.0, 0.25))).collect(0)
    assert torch.equal(other.advantages, batch.advantages)
    summed = trainer(tmp_path / "c", LEVEL + 0.25 * STEEP, advantages=dancegrpo_advantages).collect(0)
    assert (summed.advantages - batch.advantages).abs().max() > 0.3
    assert "1 level, 0.25 steep" in run.remarks()[0]
    assert "one term, level" in trainer(tmp_path / "d", LEVEL, advantages=GDPO()).remarks()[0]


def test_steps_of_terms(tmp_path):
    """DenseGRPO: each term's gains are z-scored in each step."""
    run = trainer(tmp_path / "run", LEVEL + 0.25 * STEEP, DenseGRPO, advantages=GDPO())
    batch = run.collect(0)
    values = [completed_rewards_of(batch.scores, f"term/{name}") for name in ("level", "steep")]
    assert [one.shape for one in values] == [(16, 11)] * 2
    close(values[0] + 0.25 * values[1], completed_rewards_of(batch.scores), 1e-4)
    expected = GDPO()([gains(one) for one in values], (1.0, 0.25), batch.group_ids)
    close(batch.advantages, expected)


def test_gated_gains_by_hand():
    values = torch.tensor([[1.0, 3.0, 2.0, 6.0], [0.0, 0.0, -1.0, 1.0]])
    assert GatedGains(2.0)(values).tolist() == [[8, 5, 10], [1, 1, 1]]
    assert GatedGains(6.0, outcome=0.0)(values).tolist() == [[2, -1, 4], [0, 0, 0]]
    assert GatedGains(-9.0, outcome=0.0)(values).tolist() == gains(values).tolist()
    with pytest.raises(ValueError, match=r"GatedGains\.outcome must be at least 0"):
        GatedGains(0.0, outcome=-1.0)


@pytest.mark.parametrize(
    ("credit", "message"),
    [
        (lambda: GDPO(weights=(1.0, 2.0, 3.0)), "GDPO.weights has 3 values, and the reward 2 terms: level, steep"),
        (lambda: GDPO(weights=(0.0, 0.0)), "GDPO.weights are all 0"),
        (lambda: GDPO(eps=-1.0), "eps must be at least 0"),
        (lambda: GDPO(clip=0.0), "clip positive or null"),
    ],
)
def test_what_cannot_work_is_refused(credit, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", LEVEL + STEEP, advantages=credit())


def choose(advantages: Any, tmp_path: Path) -> FlowGRPO:
    made: FlowGRPO = build(
        FlowGRPO,
        {
            "model": {"class": "flowalign.models.gaussian.GaussianModel"},
            "reward": {
                "class": "rewards.algebra.Normalise",
                "reward": "rewards.JPEGCompressibility",
                "mean": 0,
                "std": 1,
            },
            "prompts": ["x"],
            "sampling": {
                "plan": {"class": "flowalign.schedules.AllSteps", "transition": "flowalign.transitions.FlowSDE"}
            },
            "kl_coef": {"class": "trainers.regularisers.BandCoefficient", "start": 0.1, "target": 0.01},
            "refresh": {"every": 5, "average": True},
            "selection": {"class": "trainers.resampling.BestAndWorst", "count": 3},
            "supervised": {"coef": 0.1, "times": {"class": "trainers.UniformTimes"}},
            "advantages": advantages,
            "folder": str(tmp_path),
        },
    )
    return made


def test_configs_name_them(tmp_path):
    named = choose({"class": "flowalign.credit.GDPO", "weights": [2.0], "batch_std": None}, tmp_path)
    assert named.by_term is not None
    assert named.by_term.credit == GDPO(weights=(2.0,), batch_std=None)
    assert choose("flowalign.credit.GDPO", tmp_path).by_term is not None
    plain = choose("flowalign.advantages.dancegrpo_advantages", tmp_path)
    assert (plain.advantages, plain.by_term) == (dancegrpo_advantages, None)
    assert (plain.kl_coef, plain.refresh.every) == (0.1, 5)

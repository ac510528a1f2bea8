"""Advantages against recorded numbers of four projects and against what any credit rule must keep."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowalign.advantages import (
    best_and_worst,
    best_in_group,
    dancegrpo_advantages,
    flow_grpo_advantages,
    gdpo_advantages,
    global_std,
    group_advantages,
    group_std,
    unbiased_group_std,
    weighted_sum_advantages,
)

GOLDEN = load_file(Path(__file__).parent / "golden" / "advantages.safetensors")
GROUP, REWARD1, REWARD2 = GOLDEN["group"], GOLDEN["reward1"], GOLDEN["reward2"]
STDS = {"True": global_std, "False": group_std}


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("is_global", ["True", "False"])
@pytest.mark.parametrize("peer", ["flow_grpo", "diffusionnft"])
def test_flow_grpo(peer, is_global):
    close(flow_grpo_advantages(REWARD1, GROUP, STDS[is_global]), GOLDEN[f"{peer}/global_std={is_global}"])


@pytest.mark.parametrize("is_global", ["True", "False"])
def test_flow_grpo_with_a_reward_per_step(is_global):
    per_step = REWARD1[:, None].expand(-1, 9)
    close(flow_grpo_advantages(per_step, GROUP, STDS[is_global]), GOLDEN[f"flow_grpo/global_std={is_global}/2d"])


def test_flow_grpo_labels():
    close(best_and_worst(REWARD1, GROUP), GOLDEN["flow_grpo/type=dpo"], atol=0)
    close(best_in_group(REWARD1, GROUP), GOLDEN["flow_grpo/type=sft"], atol=0)


@pytest.mark.parametrize("is_global", ["True", "False"])
@pytest.mark.parametrize("sampler", ["group_contiguous", "distributed_k_repeat"])
def test_flow_factory(is_global, sampler):
    parts, weights = (REWARD1, REWARD2), (0.7, 0.3)
    summed = weighted_sum_advantages(parts, weights, GROUP, STDS[is_global])
    close(summed, GOLDEN[f"flow_factory/sum/global_std={is_global}/{sampler}"])
    close(gdpo_advantages(parts, weights, GROUP), GOLDEN[f"flow_factory/gdpo/global_std={is_global}/{sampler}"])
    one = weighted_sum_advantages((REWARD1,), (1.0,), GROUP, STDS[is_global])
    close(one, GOLDEN[f"flow_factory/sum/global_std={is_global}/reward1_only"])


def test_dancegrpo():
    order = GOLDEN["dancegrpo/order"]
    close(dancegrpo_advantages(REWARD1, GROUP)[order], GOLDEN["dancegrpo/advantages_in_that_order"])


def test_by_hand():
    rewards, groups = torch.tensor([1.0, 5.0, 3.0, 3.0]), torch.tensor([4, 9, 4, 9])
    assert group_std(rewards, groups).tolist() == [1, 1, 1, 1]
    assert unbiased_group_std(rewards, groups).tolist() == global_std(rewards, groups).tolist() == [2**0.5] * 4
    close(group_advantages(rewards, groups), torch.tensor([-1.0, 1.0, 1.0, -1.0]))
    close(group_advantages(rewards, groups, eps=1.0), torch.tensor([-0.5, 0.5, 0.5, -0.5]))
    close(group_advantages(rewards, groups, global_std, clip=0.25), torch.tensor([-0.25, 0.25, 0.25, -0.25]))
    # GDPO's own example: rewards that differ by scale weigh alike.
    close(gdpo_advantages((rewards, 100 * rewards), (1.0, 1.0), groups), torch.tensor([-1.0, 1.0, 1.0, -1.0]))


RULES = [
    lambda r, g: group_advantages(r, g),
    lambda r, g: group_advantages(r, g, global_std),
    lambda r, g: group_advantages(r, g, unbiased_group_std, eps=1e-8),
    flow_grpo_advantages,
    dancegrpo_advantages,
    lambda r, g: weighted_sum_advantages((r, r.square()), (0.3, 0.7), g),
    lambda r, g: gdpo_advantages((r, r.square()), (0.3, 0.7), g),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.0, 1e6 / 3])
@pytest.mark.parametrize("size", [1, 3, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_equals_gets_exactly_0(rule, value, size, dtype):
    rewards = torch.cat([torch.full((size,), value, dtype=dtype), torch.tensor([0.2, 0.9], dtype=dtype)])
    groups = torch.tensor([0] * size + [1, 1])
    advantages = rule(rewards, groups)
    assert (advantages[:size] == 0).all()
    assert advantages[-1] > 0 > advantages[-2]
    assert (rule(rewards[:size], groups[:size]) == 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_sums_order_and_offsets(rule):
    rewards = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(24) % 4
    advantages = rule(rewards, groups)
    close(torch.zeros(4, dtype=torch.float64).index_add(0, groups, advantages), torch.zeros(4).double(), atol=1e-12)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    close(rule(rewards[order], groups[order]), advantages[order], atol=1e-12)
    close(rule(rewards, 100 - 7 * groups), advantages, atol=1e-12)
    assert advantages.dtype == torch.float64


@pytest.mark.parametrize("rule", [RULES[0], RULES[2]])
def test_a_constant_per_prompt_changes_nothing(rule):
    rewards = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(24) % 4
    offset = torch.tensor([3.0, -1.0, 100.0, 0.5]).double()
    close(rule(rewards + offset[groups], groups), rule(rewards, groups), atol=1e-10)


def test_steps_are_normalised_apart():
    rewards = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.01])
    groups = torch.arange(12) // 4
    for std in (group_std, unbiased_group_std, global_std):
        together = group_advantages(rewards, groups, std)
        apart = torch.stack([group_advantages(rewards[:, t], groups, std) for t in range(3)], dim=1)
        close(together, apart)


def test_ties_and_lone_samples():
    rewards, groups = torch.tensor([2.0, 1.0, 2.0, 0.0, 0.0]), torch.tensor([0, 0, 0, 1, 1])
    assert best_in_group(rewards, groups).tolist() == [1, 0, 1, 1, 1]
    labels = best_and_worst(rewards, groups)
    assert labels[1] == -1
    assert sorted(labels[:3].tolist()) == [-1, 0, 1]
    assert labels[3:].tolist() == [-1, 1]
    with pytest.raises(ValueError, match="group 1 has one sample"):
        best_and_worst(rewards[:4], groups[:4])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rewards_that_are_not_numbers_raise(value):
    rewards, groups = torch.tensor([0.0, 1.0, value]), torch.tensor([0, 0, 0])
    for rule in (*RULES, best_and_worst, best_in_group):
        with pytest.raises(ValueError, match=r"reward \[2\] is"):
            rule(rewards, groups)


def test_no_gradient_passes():
    rewards = torch.tensor([0.0, 1.0, 5.0], requires_grad=True)
    assert not group_advantages(rewards, torch.tensor([0, 0, 0])).requires_grad

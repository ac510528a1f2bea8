"""Credit: from the rewards of groups of samples to advantages.

A group is the samples of one prompt entry; `group_ids` names it by number, in any order, never by the prompt's text.
Rewards may be [b], or [b, t] where every step has a reward of its own: statistics are then taken per step.
Statistics are float64, results have the rewards' dtype and carry no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Rewards = Float[Tensor, "b *t"]
GroupIds = Int[Tensor, " b"]
Spread = Callable[[Tensor, Tensor], Tensor]


def _checked(rewards: Tensor) -> Tensor:
    if not rewards.isfinite().all():
        bad = (~rewards.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"reward {bad} is {rewards[tuple(bad)].item()}: leave samples without a valid score out")
    return rewards.detach().double()


def _group_mean(values: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    sums = values.new_zeros(len(counts), *values.shape[1:]).index_add(0, index, values)
    return (sums / counts.view(-1, *[1] * (values.ndim - 1)))[index]


def _centred(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards less their group's mean, with the group number of each row and the size of each group.

    A member of the group is subtracted first, so that equal rewards give exactly 0 whatever their mean rounds to.
    """
    _, index, counts = group_ids.unique(return_inverse=True, return_counts=True)
    a_member = index.argsort(stable=True)[counts.cumsum(0) - counts]
    above = rewards - rewards[a_member][index]
    return above - _group_mean(above, index, counts), index, counts


def group_std(rewards: Rewards, group_ids: GroupIds) -> Rewards:
    """Each row's group's population std; the std of the Flow-GRPO paper (arXiv:2505.05470, eq. 5)."""
    centred, index, counts = _centred(_checked(rewards), group_ids)
    return _group_mean(centred.square(), index, counts).sqrt()


def unbiased_group_std(rewards: Rewards, group_ids: GroupIds) -> Rewards:
    """Each row's group's sample std (divisor n - 1); the std of DanceGRPO (arXiv:2505.07818)."""
    centred, index, counts = _centred(_checked(rewards), group_ids)
    variance = _group_mean(centred.square(), index, counts)
    besselised = counts / (counts - 1).clamp(min=1)
    return (variance * besselised.view(-1, *[1] * (centred.ndim - 1))[index]).sqrt()


def global_std(rewards: Rewards, group_ids: GroupIds) -> Rewards:
    """The population std of all rewards, about their common mean; the std of Flow-GRPO's code (its `global_std`)."""
    rewards = _checked(rewards)
    return (rewards - rewards.mean(0)).square().mean(0).sqrt().expand_as(rewards)


def unbiased_global_std(rewards: Rewards, group_ids: GroupIds) -> Rewards:
    """The sample std of all rewards (divisor n - 1), about their common mean; the batch's std of GDPO's code."""
    count = len(rewards)
    return global_std(rewards, group_ids) * (count / max(count - 1, 1)) ** 0.5


def group_advantages(
    rewards: Rewards, group_ids: GroupIds, std: Spread = group_std, eps: float = 0.0, clip: float | None = None
) -> Rewards:
    """(reward - mean of its group) / (std + eps), clipped to [-clip, clip].

    Before clipping they sum to 0 over a group; a constant added to a group's rewards changes nothing; a group whose
    rewards are all equal gets exactly 0. With eps 0 the smallest difference counts in full, so a reward that is noisy
    in its last digits wants an eps above that noise. Deep clipping makes groups sum to something other than 0.

    Args:
        rewards: finite, higher is better. Raises ValueError otherwise.
        group_ids: the group of each row.
        std: `group_std`, `unbiased_group_std` or `global_std`.
        eps: added to the std, >= 0.
        clip: largest magnitude, or None.
    """
    centred, _, _ = _centred(_checked(rewards), group_ids)
    advantages = torch.where(centred == 0, centred, centred / (std(rewards.double(), group_ids) + eps))
    return (advantages if clip is None else advantages.clamp(-clip, clip)).to(rewards.dtype)


def flow_grpo_advantages(
    rewards: Rewards, group_ids: GroupIds, std: Spread = global_std, clip: float | None = 5.0
) -> Rewards:
    """Flow-GRPO's code: `group_advantages` with 1e-4 added to the std of the whole batch, clipped to 5."""
    return group_advantages(rewards, group_ids, std, eps=1e-4, clip=clip)


def dancegrpo_advantages(rewards: Rewards, group_ids: GroupIds, clip: float | None = 5.0) -> Rewards:
    """DanceGRPO's code: `group_advantages` with 1e-8 added to the group's sample std, clipped to 5."""
    return group_advantages(rewards, group_ids, unbiased_group_std, eps=1e-8, clip=clip)


def ddpo_advantages(rewards: Rewards, group_ids: GroupIds, clip: float | None = 5.0) -> Rewards:
    """DDPO's code: `group_advantages` with 1e-6 added to the group's std, clipped to 5 (arXiv:2305.13301).

    Its statistics are of a prompt's last 16 or 32 rewards, those of past epochs among them, and of the whole batch
    until there are 16; here they are of the group, the same prompt's samples of the present policy.
    """
    return group_advantages(rewards, group_ids, eps=1e-6, clip=clip)


def rlcm_advantages(rewards: Rewards, group_ids: GroupIds) -> Rewards:
    """RLCM's code (arXiv:2404.03673): `ddpo_advantages`, clipped to 10."""
    return ddpo_advantages(rewards, group_ids, clip=10.0)


def floored_group_std(rewards: Rewards, group_ids: GroupIds) -> Rewards:
    """`group_std`, at least 1e-6: Flow-Factory's guard against a std of 0, where flow_grpo adds to the std."""
    return group_std(rewards, group_ids).clamp(min=1e-6)


def floored_global_std(rewards: Rewards, group_ids: GroupIds) -> Rewards:
    """`global_std`, at least 1e-6; see `floored_group_std`."""
    return global_std(rewards, group_ids).clamp(min=1e-6)


def weighted_sum_advantages(
    parts: Sequence[Rewards], weights: Sequence[float], group_ids: GroupIds, std: Spread = group_std
) -> Rewards:
    """Several rewards, summed then normalised: `group_advantages` of sum_k w_k r_k, std >= 1e-6 (Flow-Factory)."""
    total = torch.as_tensor(sum(weight * part.double() for weight, part in zip(weights, parts, strict=True)))
    spread = std(total, group_ids).clamp(min=1e-6)
    return group_advantages(total, group_ids, lambda rewards, groups: spread).to(parts[0].dtype)


def gdpo_advantages(
    parts: Sequence[Rewards],
    weights: Sequence[float],
    group_ids: GroupIds,
    std: Spread = floored_group_std,
    batch_std: Spread | None = floored_global_std,
    eps: float = 0.0,
) -> Rewards:
    """Several rewards, normalised then summed, so that no reward's scale outweighs another's.

        A = sum_k w_k z_k,  z_k = group_advantages(r_k, std, eps);   advantage = A / (std of A over the batch + eps)

    GDPO (arXiv:2601.05242). The defaults are Flow-Factory's: population stds, at least 1e-6. The authors' own
    (NVlabs/GDPO) are sample stds with 1e-4 added: `unbiased_group_std`, `unbiased_global_std` and eps 1e-4, as in
    `flowalign.credit.GDPO`. The batch mean of A, which they subtract, is 0 already.

    Args:
        parts: the rewards, higher is better. weights: of each, after it is normalised.
        std: of a group, and batch_std: of the whole batch; None leaves the sum as it is, so that of one reward of
            weight 1 these are `group_advantages`.
        eps: added to both, >= 0.
    """
    normalised = [group_advantages(part.double(), group_ids, std, eps) for part in parts]
    total = torch.stack([weight * part for weight, part in zip(weights, normalised, strict=True)]).sum(0)
    if batch_std is not None:
        total = torch.where(total == 0, total, total / (batch_std(total, group_ids) + eps))
    return total.to(parts[0].dtype)


def best_and_worst(rewards: Float[Tensor, " b"], group_ids: GroupIds) -> Float[Tensor, " b"]:
    """+1 for the best sample of each group, -1 for its worst, 0 for the rest: the pairs of preference learning.

    Of equals one is taken; of a group of equals the first is the worst and the second the best, as in flow_grpo's
    "dpo" labels. Raises ValueError for a group of one.
    """
    values, labels = _checked(rewards), torch.zeros_like(rewards)
    for group in group_ids.unique():
        members = (group_ids == group).nonzero().flatten()
        if len(members) < 2:
            raise ValueError(f"group {group.item()} has one sample; a pair needs two")
        best, worst = values[members].argmax(), values[members].argmin()
        equal = bool(best == worst)
        labels[members[1 if equal else best]] = 1
        labels[members[0 if equal else worst]] = -1
    return labels


def best_in_group(rewards: Float[Tensor, " b"], group_ids: GroupIds) -> Float[Tensor, " b"]:
    """1 for every sample whose reward is its group's largest, else 0; flow_grpo's "sft" labels."""
    values, labels = _checked(rewards), torch.zeros_like(rewards)
    for group in group_ids.unique():
        members = group_ids == group
        labels[members] = (values[members] == values[members].max()).to(labels.dtype)
    return labels

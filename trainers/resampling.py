"""Which of an epoch's samples a policy gradient is made of, and which groups are sampled again before that.

A group whose samples all have the same reward teaches nothing. It can be kept, as a part of the mean (`EverySample`);
left out of it (`DropEqual`), so that the gradient grows by all groups over those left; or sampled again, round by
round, until its samples tell something (`Resample`). `BestAndWorst` spends an update on the ends of each group.

What is left out has weight 0: it is not a term of the loss's mean, neither of its KL, and no network call is made for
it. Advantages are always those of all samples that were drawn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainers.batch import Sampling
from trainers.collection import Epoch

Rewards = Float[Tensor, " b"]
Advantages = Float[Tensor, "b *t"]
GroupIds = Int[Tensor, " b"]


class Selection(ABC):
    """What an update takes of an epoch's samples; of those without a valid score it takes none."""

    @abstractmethod
    def weights(self, rewards: Rewards, advantages: Advantages, group_ids: GroupIds, size: int) -> Rewards:
        """1 for each valid sample that is taken, else 0. size: `sampling.group_size`."""

    def again(self, rewards: Rewards, group_ids: GroupIds, sampling: Sampling, rounds: int) -> list[int]:
        """The groups that are sampled once more, of which so many rounds have been drawn; in order, none by default."""
        return []

    def taken(self, size: int) -> int:
        """The most samples that it takes of a group."""
        return size

    def check(self, sampling: Sampling) -> None:
        """Raises: ValueError for what it cannot choose from."""
        return

    def remarks(self, sampling: Sampling) -> tuple[str, ...]:
        """What is told of it when a run starts."""
        return ()


def _groups(group_ids: GroupIds) -> Iterator[tuple[int, Int[Tensor, " m"]]]:
    """Each group's number and its samples."""
    for group in group_ids.unique().tolist():
        yield group, (group_ids == group).nonzero().flatten()


def tell(advantages: Advantages, group_ids: GroupIds) -> Rewards:
    """1 for the samples of groups of which some advantage is not 0, else 0."""
    taught = advantages.reshape(len(group_ids), -1).ne(0).any(1)
    return torch.isin(group_ids, group_ids[taught]).float()


def ends(rewards: Rewards, members: Int[Tensor, " m"], best: int, worst: int) -> Int[Tensor, " n"]:
    """Of a group's samples so many with the highest and so many with the lowest rewards; of equals the first."""
    order = members[rewards[members].argsort(descending=True, stable=True)]
    lowest = members[rewards[members].argsort(stable=True)]
    chosen = order[:best]
    rest = lowest[~torch.isin(lowest, chosen)]
    return torch.cat([chosen, rest[:worst]])


@dataclass(frozen=True)
class EverySample(Selection):
    """All of them: a group of equals counts in the mean, and adds nothing but its KL."""

    def weights(self, rewards: Rewards, advantages: Advantages, group_ids: GroupIds, size: int) -> Rewards:
        return torch.ones_like(rewards)


@dataclass(frozen=True)
class DropEqual(Selection):
    """All but the samples of groups that have no advantage other than 0.

    Flow-GRPO's code drops samples like these too, but puts some back so that its batches have one size; here they need
    none, as micro-batches are padded.
    """

    def weights(self, rewards: Rewards, advantages: Advantages, group_ids: GroupIds, size: int) -> Rewards:
        return tell(advantages, group_ids)


@dataclass(frozen=True)
class BestAndWorst(Selection):
    """The `count` samples of each group with the highest rewards and as many with the lowest; nothing of equals.

    DanceGRPO's best-of-N (arXiv:2505.07818), with advantages that are held against the whole group's mean and std.
    Where samples share their start they share network calls too, and few are saved.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"BestAndWorst.count must be at least 1, got {self.count}")

    def weights(self, rewards: Rewards, advantages: Advantages, group_ids: GroupIds, size: int) -> Rewards:
        chosen = torch.zeros_like(rewards)
        for _, members in _groups(group_ids):
            chosen[ends(rewards, members, self.count, self.count)] = 1
        return chosen * tell(advantages, group_ids)

    def taken(self, size: int) -> int:
        return 2 * self.count

    def check(self, sampling: Sampling) -> None:
        if 2 * self.count > sampling.group_size:
            raise ValueError(
                f"BestAndWorst.count is {self.count}, of the best and as many of the worst: a group of "
                f"{sampling.group_size} has no {2 * self.count} samples"
            )


@runtime_checkable
class Settled(Protocol):
    """Whether the rewards of a group's samples so far are enough to learn from; size: how many are wanted."""

    def __call__(self, rewards: Float[Tensor, " m"], size: int) -> bool: ...


@dataclass(frozen=True)
class HasSpread:
    """Enough where the highest reward is more than `least` above the lowest: for rewards on a scale."""

    least: float = 0.0

    def __post_init__(self) -> None:
        if self.least < 0:
            raise ValueError(f"HasSpread.least must be at least 0, got {self.least}")

    def __call__(self, rewards: Float[Tensor, " m"], size: int) -> bool:
        return len(rewards) > 1 and float(rewards.max() - rewards.min()) > self.least


@dataclass(frozen=True)
class Balanced:
    """Enough where half of a group's samples are above `threshold` and as many are not: Reinforce-Ada's balance."""

    threshold: float = 0.5

    def __call__(self, rewards: Float[Tensor, " m"], size: int) -> bool:
        above = int((rewards > self.threshold).sum())
        return min(above, len(rewards) - above) >= size // 2


@dataclass(frozen=True)
class Resample(Selection):
    """Groups are drawn again, `group_size` samples a round, until they are settled or have had `rounds` rounds.

    Reinforce-Ada (arXiv:2510.04996): effort goes where it is needed, and a prompt that is nearly always failed, or
    never, still shows both. Of what a group then has the update takes `group_size` samples, the best half and the worst
    half; each is held against the mean of all of them. Groups without any advantage other than 0 are left out.

    A member of a later round has noise of its own number, so that a run that is stopped draws the same again; where a
    group shares its start, it does so in all rounds. What is logged of rewards is of the first round, which is what
    the policy makes of prompts as they come.

    rounds: the first one included, 2 or more; theirs is 4. settled: see `HasSpread` and `Balanced`.
    """

    rounds: int = 4
    settled: Settled = HasSpread()

    def __post_init__(self) -> None:
        if self.rounds < 2:
            raise ValueError(f"Resample.rounds counts the first round too and must be at least 2, got {self.rounds}")

    def again(self, rewards: Rewards, group_ids: GroupIds, sampling: Sampling, rounds: int) -> list[int]:
        if rounds >= self.rounds:
            return []
        size = sampling.group_size
        return [g for g in range(sampling.groups) if not self.settled(rewards[group_ids == g], size)]

    def weights(self, rewards: Rewards, advantages: Advantages, group_ids: GroupIds, size: int) -> Rewards:
        chosen = torch.zeros_like(rewards)
        for _, members in _groups(group_ids):
            chosen[ends(rewards, members, size - size // 2, size // 2)] = 1
        return chosen * tell(advantages, group_ids)

    def remarks(self, sampling: Sampling) -> tuple[str, ...]:
        once = sampling.groups * sampling.group_size
        return (
            f"selection: an epoch has {once} rollouts, and up to {self.rounds * once} where groups are drawn again "
            f"({self.rounds} rounds at most); sampled_again tells how many there were",
        )


def grown(epoch: Epoch, groups: Sequence[int], size: int) -> Epoch:
    """The epoch with one more round: `size` further samples of each of these groups, in rows after all others."""
    number, wanted = len(epoch.rounds), {*groups}
    first = (*epoch.rounds, len(epoch.rows))[1]
    chosen = [at for at in range(first) if epoch.rows[at][0] in wanted]
    rows = tuple((epoch.rows[at][0], epoch.rows[at][1] + number * size) for at in chosen)
    start, buckets = len(epoch.rows), [*epoch.buckets]
    for bucket in epoch.buckets:
        held = sum(at in bucket.rows for at in chosen)  # of later rounds' buckets none
        if held:
            buckets.append(replace(bucket, rows=range(start, start + held)))
            start += held
    return replace(epoch, rows=epoch.rows + rows, buckets=tuple(buckets), rounds=(*epoch.rounds, len(epoch.rows)))


def learnt_of(epoch: Epoch, selection: Selection, sampling: Sampling) -> Epoch:
    """The rows that an update takes at most, as an epoch: of each group as many as the selection does, or all together.

    Where samples share their start a row holds several, and all of them if one is taken.
    """
    first, size = (*epoch.rounds, len(epoch.rows))[1], sampling.group_size
    share = selection.taken(size) if epoch.members == 1 else size
    kept = [bucket for bucket in epoch.buckets if bucket.rows.start < first]
    stops = [bucket.rows.start + len(bucket.rows) * share // size for bucket in kept]
    buckets = [replace(one, rows=range(one.rows.start, stop)) for one, stop in zip(kept, stops, strict=True)]
    return replace(epoch, buckets=tuple(buckets))

"""Trainers that compare two samples of a prompt: which are compared, and how many held-out pairs they get right."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.advantages import best_and_worst
from flowalign.records import Scores
from flowalign.tracking import Run
from trainers.collection import Epoch
from trainers.evaluation import Asked
from trainers.forward_process import ForwardProcessTrainer
from trainers.forward_source import StoredPairs
from trainers.forward_steps import Noised, Units
from trainers.held_out_pairs import accuracy, decisive, held_out_leads, right

Pairing = Callable[[Tensor, Tensor], Tensor]  # rewards and group ids to labels: 1 for a group's best, -1 for its worst


def best_and_worst_unless_equal(rewards: Float[Tensor, " b"], group_ids: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """`flowalign.advantages.best_and_worst`, but no pair in a group of equals, where flow_grpo takes the first two."""
    labels = best_and_worst(rewards, group_ids)
    for group in group_ids.unique():
        members = rewards[group_ids == group]
        if members.amax() == members.amin():
            labels[group_ids == group] = 0
    return labels


class PairTrainer(ForwardProcessTrainer):
    """A trainer whose units are pairs; a pair's credit is by how much `part` of the scores differs, 0 without one.

    pairing: which samples of a group are a pair; of stored pairs, as they stand. To be set before the base's __init__.
    """

    members = 2
    pairing: Pairing
    part: str | None

    @abstractmethod
    def lead(self, noised: Noised) -> Float[Tensor, " u"]:
        """By how much the preferred one of each pair is ahead, as the policy's velocities have it."""

    def units(self, epoch: Epoch, scores: Scores) -> Units:
        groups, size = self.sampling.groups, self.sampling.group_size
        group_ids = torch.arange(groups).repeat_interleave(size)
        known = scores.valid & (scores.valid.view(groups, size).sum(1) > 1)[group_ids]
        labels = torch.zeros(len(scores))
        labels[known] = self.pairing(scores.total[known], group_ids[known])
        members = labels.view(groups, size)
        samples = torch.arange(groups)[:, None] * size + torch.stack([members.argmax(1), members.argmin(1)], 1)
        counts = members.amax(1) > 0
        return Units(samples, counts * self.source.weights(epoch), self._gap(scores, samples, counts))

    def _gap(self, scores: Scores, samples: Tensor, counts: Tensor) -> Float[Tensor, " g"]:
        if self.part is None:
            return torch.zeros(len(samples))
        if self.part not in scores.parts:
            raise ValueError(f"margin.part {self.part!r} is no part of the scores, which have {sorted(scores.parts)}")
        best, worst = scores.parts[self.part][samples].T
        gap = (best - worst).where(counts, 0.0)
        if not gap.isfinite().all():
            raise ValueError(f"margin: {int((~gap.isfinite()).sum())} of the pairs have no {self.part!r} on both sides")
        return gap

    def headline(self) -> tuple[str, ...]:
        return ("accuracy",) if self.stored else ("reward", "accuracy")

    def told(self, units: Units, scores: Scores) -> dict[str, float]:
        """Pairs, and groups without one though two of their samples have valid scores."""
        counted, known = units.weights > 0, scores.valid.view(len(units), -1).sum(1) > 1
        return {"pairs": float(counted.sum()), "ties": float((known & ~counted).sum())}

    def watched(self) -> tuple[str, ...]:
        return ("loss", "accuracy", "lead")

    def watch(self, noised: Noised, losses: Float[Tensor, " u"]) -> dict[str, Float[Tensor, " u"]]:
        """With the share of pairs that the policy gets right, and by how much the preferred one leads."""
        lead = self.lead(noised)
        return super().watch(noised, losses) | {"accuracy": right(lead), "lead": lead}

    def evaluates(self) -> bool:
        return super().evaluates() or self.held_out_pairs is not None

    def held_out(self) -> str:
        held = self.held_out_pairs
        return super().held_out() if held is None else f"{super().held_out()}; {held.fingerprint()}"

    def judge(self, run: Run, asked: Asked) -> dict[str, float] | None:
        """With the share of held-out pairs that are got right, which decides on the best where no prompts do."""
        if self.held_out_pairs is None:
            return super().judge(run, asked)
        began = time.monotonic()
        leads = held_out_leads(self, self.held_out_pairs, self.lead, asked)
        if leads is None:
            return None
        if self.evaluator.prompts is not None:
            return self.evaluator.run(run, self.state.epoch, asked, accuracy(leads), began)
        found = decisive(leads) | accuracy(leads)
        run.log(self.state.epoch, found | {"time/evaluation": round(time.monotonic() - began, 4)})
        return found

    def _check(self) -> None:
        super()._check()
        if isinstance(self.source, StoredPairs):
            self.source.check(self.pairing is best_and_worst_unless_equal, self.part)

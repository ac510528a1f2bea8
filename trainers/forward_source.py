"""Where trainers of the forward process get clean latents: from samples of a policy, or from preferences in a cache.

Either way an epoch has groups of samples, numbered group by group, and every process knows all their scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.distributed import data_rank, data_size, share
from flowalign.fitting import Fit, centre_crop
from flowalign.models.base import Model
from flowalign.preferences import PreferenceData
from flowalign.preferences.latents import PairLatents
from flowalign.preferences.sources import OnBad
from flowalign.prompts import PromptData
from flowalign.records import Media, Prompts, PromptSet, Scores, Size
from rewards.base import Card, Reward
from trainers.batch import no_steps, summary_of
from trainers.collection import Epoch
from trainers.gathering import gather_scores

if TYPE_CHECKING:
    from trainers.base import Trainer
    from trainers.keeper import Keeper

Latents = Float[Tensor, "k *d"]
SCORE = "score"  # the part of stored pairs' scores that holds what their data say besides the label


class Source(ABC):
    """Clean latents of an epoch's samples; a number of a sample is group * group_size + member."""

    @abstractmethod
    def prompts(self, given: PromptData | None) -> PromptData:
        """Those of the run: given, or the source's own."""

    @abstractmethod
    def draw(self, epoch: Epoch, keeper: Keeper | None) -> Scores:
        """Have the epoch's latents at hand; returns the scores of all samples, on every process."""

    @abstractmethod
    def shares(self, epoch: Epoch, processes: int, batch_size: int) -> list[range]:
        """The samples whose latents each of so many processes has."""

    @abstractmethod
    def latents(self, epoch: Epoch, samples: Sequence[int]) -> Latents:
        """Of samples of one size that this process holds, on the model's device."""

    @abstractmethod
    def weights(self, epoch: Epoch) -> Float[Tensor, " g"]:
        """How much each group counts."""

    @abstractmethod
    def needed(self, epoch: Epoch) -> Rows:
        """The fewest network rows that drawing an epoch takes."""

    @abstractmethod
    def summary(self, scores: Scores) -> dict[str, float]:
        """What to log of an epoch's scores."""


class PolicySamples(Source):
    """Samples of the trainer's policy, or an older one (`Trainer.sampler`), scored by its reward."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def prompts(self, given: PromptData | None) -> PromptData:
        assert given is not None
        return given

    def draw(self, epoch: Epoch, keeper: Keeper | None) -> Scores:
        trainer, sampling = self.trainer, self.trainer.sampling
        parts = trainer.fill(epoch, keeper, clean=True)
        total = sampling.groups * sampling.group_size
        mine = self.shares(epoch, data_size(), sampling.batch_size)[data_rank()]
        scores = gather_scores([part.scores for part in parts], mine, total)
        return trainer.usable(scores, epoch.number, torch.arange(total) // sampling.group_size)

    def shares(self, epoch: Epoch, processes: int, batch_size: int) -> list[range]:
        cuts = [row * epoch.members for row in epoch.cuts(batch_size)]
        parts = [share(len(cuts) - 1, process, processes) for process in range(processes)]
        return [range(cuts[part.start], cuts[part.stop]) for part in parts]

    def latents(self, epoch: Epoch, samples: Sequence[int]) -> Latents:
        trainer = self.trainer
        cuts = [row * epoch.members for row in epoch.cuts(trainer.sampling.batch_size)]
        found = []
        for sample in samples:
            index = bisect_right(cuts, sample) - 1
            held = trainer.state.buffer[index].latents
            assert held is not None
            found.append(held[sample - cuts[index]])
        return torch.stack(found).to(trainer.model.device)

    def weights(self, epoch: Epoch) -> Float[Tensor, " g"]:
        return torch.ones(self.trainer.sampling.groups)

    def needed(self, epoch: Epoch) -> Rows:
        return self.trainer.collection.needed(epoch, no_steps, False)

    def summary(self, scores: Scores) -> dict[str, float]:
        return summary_of(scores, self.trainer.sampling.groups)


@dataclass(frozen=True)
class Pairs:
    """Preferences to learn from, and how their media become latents, once; see `PairLatents`.

    preferences: a file or folder of them, or a set (`flowalign.preferences`). held_out: others, of which is told how
    many the policy gets right. cache: a folder for the latents of both. embeddings: whether prompts' embeddings are
    kept there too, where the model was given no folder for them.
    """

    preferences: PreferenceData
    held_out: PreferenceData | None = None
    cache: str = "runs/latents"
    fit: Fit = centre_crop
    most_enlarged: float = 2.0
    on_bad: OnBad = "stop"
    batch_size: int = 8
    embeddings: bool = True

    def latents(self, model: Model) -> PairLatents:
        """Those to learn from."""
        return self._latents(model, self.preferences)

    def held_out_latents(self, model: Model) -> PairLatents | None:
        """Those to judge by, if any."""
        return None if self.held_out is None else self._latents(model, self.held_out)

    def _latents(self, model: Model, preferences: PreferenceData) -> PairLatents:
        if self.embeddings:
            model.keep_embeddings(self.cache)
        return PairLatents(model, preferences, self.cache, self.fit, self.most_enlarged, self.on_bad, self.batch_size)


class StoredPairs(Source):
    """Preferences in a cache: pairs are groups of two samples, the preferred one scored 1, the other 0, ties .5.

    What is not valid has no valid scores. Where the data say scores, they are a part of these called "score".
    """

    def __init__(self, pairs: PairLatents) -> None:
        self.pairs = pairs

    def prompts(self, given: PromptData | None) -> PromptData:
        return PairPrompts(self.pairs)

    def draw(self, epoch: Epoch, keeper: Keeper | None) -> Scores:
        index = [*epoch.prompts]
        sign, valid = torch.from_numpy(self.pairs.signs[index]).float(), torch.from_numpy(self.pairs.valid[index])
        total = torch.stack([0.5 + sign / 2, 0.5 - sign / 2], 1).flatten()
        told = torch.from_numpy(self.pairs.scores[index]).flatten()
        return Scores(total, {SCORE: told}, valid.repeat_interleave(2))

    def shares(self, epoch: Epoch, processes: int, batch_size: int) -> list[range]:
        parts = [share(len(epoch.prompts), process, processes) for process in range(processes)]
        return [range(2 * part.start, 2 * part.stop) for part in parts]

    def latents(self, epoch: Epoch, samples: Sequence[int]) -> Latents:
        numbers = [*dict.fromkeys(epoch.prompts[sample // 2] for sample in samples)]
        held, place = self.pairs.rows(numbers), {number: i for i, number in enumerate(numbers)}
        both = torch.stack([held.first, held.second], 1)
        chosen = [both[place[epoch.prompts[sample // 2]], sample % 2] for sample in samples]
        return torch.stack(chosen).to(self.pairs.model.device)

    def weights(self, epoch: Epoch) -> Float[Tensor, " g"]:
        return torch.from_numpy(self.pairs.weights[[*epoch.prompts]])

    def needed(self, epoch: Epoch) -> Rows:
        return Rows()

    def summary(self, scores: Scores) -> dict[str, float]:
        return {"invalid": float((~scores.valid).sum()) / 2}

    def check(self, as_they_are: bool, part: str | None) -> None:
        """Raises: ValueError where no pair is decided, where pairs are to be chosen anew, or have no scores.

        Args:
            as_they_are: whether each pair is taken as it stands. part: of the scores that a margin reads, if any.
        """
        decided = self.pairs.signs != 0
        if not decided.any():
            raise ValueError(f"none of the {len(self.pairs)} pairs is decided: ties and invalid ones teach nothing")
        if not as_they_are:
            raise ValueError("pairing chooses among samples of a prompt; stored pairs are pairs already: leave it out")
        without = int(np.isnan(self.pairs.scores[decided]).any(1).sum())
        if part is not None and (part != SCORE or without):
            raise ValueError(
                f"margin reads the scores of stored pairs, which are called {SCORE!r}, not {part!r}"
                if part != SCORE
                else f"margin reads the scores of stored pairs, and {without} of {int(decided.sum())} have none"
            )


class PairPrompts(PromptSet):
    """The prompts of stored pairs, whose media all have the model's own size."""

    def __init__(self, pairs: PairLatents) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def rows(self, index: Sequence[int]) -> Prompts:
        return self.pairs.prompts(index)

    def fingerprint(self) -> str:
        return self.pairs.fingerprint()

    def sizes(self) -> frozenset[Size]:
        return frozenset([Size()])


class NoReward(Reward):
    """Stands where nothing is scored: in a run on stored preferences without an evaluation of samples."""

    name = "none"
    card = Card(modality="any")

    def score(self, media: Media, prompts: Prompts) -> Scores:
        raise ValueError("this run has no reward: give it one, or evaluation.reward")

"""Rollouts before training, which measure something and which no epoch pays for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowalign.distributed import data_size
from flowalign.records import Scores
from trainers.collection import Collection
from trainers.gathering import gather_scores
from trainers.overlap import Scoring
from trainers.state import Collected

if TYPE_CHECKING:
    from trainers.base import Trainer
    from trainers.keeper import Keeper


def measured(trainer: Trainer, collection: Collection, number: int, keeper: Keeper, what: str) -> Scores:
    """The scores of a collection's epoch under the trainer's policy, on every process.

    Args:
        what: of the rollouts, for progress.

    Raises: Stopped where a signal asked for it; ValueError for scores that are not valid, as in an epoch.
    """
    epoch, model = collection.epoch(number), trainer.model
    mine, made = collection.mine(epoch), dict[int, Collected]()
    turns = -(-collection.micro_batches(epoch) // data_size())
    with Scoring(trainer.ahead(), trainer.reward.ahead, model.meter, made) as scoring:
        for turn in range(turns):
            if keeper.asked(what, turn, turns):
                keeper.stop()
            if turn < len(mine):
                with trainer.sampler():
                    begun = collection.begin(epoch, mine[turn], scoring.ask, True)
                scoring.add(mine[turn], begun)
        scoring.drain()
    rows, members = collection.rows_of(epoch, mine), epoch.members
    at, total = range(rows.start * members, rows.stop * members), len(epoch.rows) * members
    scores = gather_scores([made[index].scores for index in mine], at, total)
    model.meter.take()  # no epoch's costs
    return trainer.usable(scores, number, epoch.group_ids)

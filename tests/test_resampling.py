"""Samples that an update leaves out, and groups that are drawn again: by hand, in gradients, and in calls."""

from __future__ import annotations

import functools
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.models.gaussian import GaussianModel
from flowalign.records import Media, Prompts, Size
from flowalign.schedules import AllSteps, FanOut, linear
from flowalign.schedules import Path as Plan
from flowalign.transitions import ODE, FlowSDE
from tests import processes
from tests.interrupted import GENTLE, assert_close, dying, slow_but, state_of, told
from tests.jobs import digest, rows
from trainers import DenseGRPO, FlowGRPO, Optimizer, Sampling
from trainers.batch import Batch, Bucket
from trainers.collection import Epoch
from trainers.preflight.geometry import floor_rows, geometry, spent_rows
from trainers.regularisers import Refresh
from trainers.resampling import (
    Balanced,
    BestAndWorst,
    DropEqual,
    EverySample,
    HasSpread,
    Resample,
    Selection,
    grown,
    learnt_of,
)
from trainers.update import Update

SDE = FlowSDE(0.7)
PLAN = AllSteps(SDE, last_step=False)
SAMPLING = Sampling(PLAN, 4, 6, 6, 64, 3, 1.0)

REWARDS = torch.tensor([1.0, 5.0, 2.0, 5.0, 0.0, 3.0, 3.0, 3.0, 3.0])
IDS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1])
ADVANTAGES = torch.where(IDS == 0, REWARDS - 2.6, 0.0)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (EverySample(), [1] * 9),
        (DropEqual(), [1] * 5 + [0] * 4),
        (BestAndWorst(1), [0, 1, 0, 0, 1] + [0] * 4),
        (BestAndWorst(2), [1, 1, 0, 1, 1] + [0] * 4),
        (Resample(), [1, 1, 0, 1, 1] + [0] * 4),  # four of five, and nothing of what is equal still
    ],
    ids=str,
)
def test_what_is_taken_by_hand(selection, expected):
    assert selection.weights(REWARDS, ADVANTAGES, IDS, 4).tolist() == expected
    steps = torch.stack([torch.zeros(9), ADVANTAGES], 1)  # an advantage for each step, the first of which is equal
    assert selection.weights(REWARDS, steps, IDS, 4).tolist() == expected
    order = torch.tensor([8, 3, 0, 6, 2, 5, 1, 4, 7])
    again = selection.weights(REWARDS[order], ADVANTAGES[order], IDS[order], 4)
    if selection != BestAndWorst(1):  # of the two best one is taken, which comes first
        assert again.tolist() == torch.tensor(expected)[order].tolist()


def test_an_odd_group_takes_one_more_of_its_best():
    rewards, ids = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 1.0]), torch.zeros(6, dtype=torch.int64)
    assert Resample().weights(rewards, rewards - 0.5, ids, 3).tolist() == [1, 1, 0, 0, 1, 0]


def test_what_is_settled():
    half = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert [Balanced(0.5)(half, size) for size in (2, 3, 4)] == [True, True, False]
    assert Balanced(0.5)(torch.cat([half, torch.zeros(1)]), 4)
    assert not Balanced(1.0)(half, 2)
    assert HasSpread()(half, 4)
    assert not HasSpread(1.0)(half, 4)
    assert not HasSpread()(half[:1], 4)
    assert not HasSpread()(half[:0], 4)


def test_groups_that_are_drawn_again_by_hand():
    sampling = Sampling(PLAN, groups=3, group_size=4)
    ids = torch.tensor([0, 0, 1, 1, 1])  # of the third no score is valid
    rewards = torch.tensor([0.0, 1.0, 2.0, 2.0, 2.0])
    assert Resample(rounds=3).again(rewards, ids, sampling, 1) == [1, 2]
    assert Resample(rounds=3).again(rewards, ids, sampling, 3) == []
    assert Resample(settled=Balanced(0.5)).again(rewards, ids, sampling, 1) == [0, 1, 2]
    assert DropEqual().again(rewards, ids, sampling, 1) == []


@pytest.mark.parametrize("members", [1, 2])
def test_a_further_round_of_an_epoch(members):
    """Two sizes of media: the rows of the groups again, with buckets of their own, and cut apart from the others."""
    path, small, large = Plan((ODE(),) * 3), Size(8, 8), Size(16, 16)
    each = 4 // members
    rows_held = tuple((g, m) for g in range(3) for m in range(0, 4, members))
    buckets = (Bucket(large, range(each)), Bucket(small, range(each, 3 * each), path))
    epoch = Epoch(7, path, (5, 0, 2), rows_held, members, buckets)
    once = grown(epoch, [0, 2], 4)
    assert once.rows == (*rows_held, *((g, 4 + m) for g in (0, 2) for m in range(0, 4, members)))
    assert once.buckets == (
        *buckets, Bucket(large, range(3 * each, 4 * each)), Bucket(small, range(4 * each, 5 * each), path)
    )  # fmt: skip
    assert once.rounds == (0, 3 * each)
    twice = grown(once, [2], 4)
    assert twice.rows[5 * each :] == tuple((2, 8 + m) for m in range(0, 4, members))
    assert twice.buckets == (*once.buckets, Bucket(small, range(5 * each, 6 * each), path))
    assert twice.rounds == (0, 3 * each, 5 * each)
    assert twice.group_ids.tolist() == [g for g in (0, 1, 2, 0, 2, 2) for _ in range(4)]
    assert [row for row in twice.cuts(3) if row in twice.rounds] == [*twice.rounds]
    assert learnt_of(twice, DropEqual(), Sampling(PLAN, 3, 4)) == replace(twice, buckets=buckets)


def level(media: Media, prompts: Prompts) -> Tensor:
    return media.pixels[:, 0, 0, 0]


def for_some(media: Media, prompts: Prompts) -> Tensor:
    """The level where the prompt is x, else the same for all."""
    return level(media, prompts) * torch.tensor([float(text == "x") for text in prompts.text])


def coarse(media: Media, prompts: Prompts) -> Tensor:
    """1 where the level is high, which it is of a sixth of the samples."""
    return (level(media, prompts) > 1).float()


def trainer(
    folder: Path, reward: Any, selection: Selection, sampling: Sampling = SAMPLING, kind: Any = FlowGRPO, **changes: Any
) -> FlowGRPO:
    settings: dict[str, Any] = {
        "optimizer": Optimizer(0.05, weight_decay=0.0), "updates_per_epoch": 1, "kl_coef": 0.0, "epochs": 1,
        "folder": str(folder),
    }  # fmt: skip
    made: FlowGRPO = kind(
        GaussianModel(grid=linear(3)), reward, ["x", "y"], sampling, selection=selection, **settings | changes
    )
    return made


def gradient(run: FlowGRPO, batch: Batch, part: int = 0) -> Tensor:
    """Of an optimizer step."""
    update = Update(run, batch, None)
    update._accumulate(update._parts(run.updates_per_epoch)[part], update._watch())
    zero = torch.zeros(4)
    found = torch.cat([zero if value.grad is None else value.grad for value in run.model.trainable().values()]).clone()
    run.optimizer.discard()
    return found


@pytest.mark.parametrize("size", [6, 4])
def test_leaving_groups_of_equals_out_scales_the_gradient_by_all_over_those_left(size, tmp_path):
    """Two of four groups: twice the gradient, at half the calls."""
    sampling = replace(SAMPLING, batch_size=size)
    kept, dropped = (trainer(tmp_path / "run", for_some, one, sampling) for one in (EverySample(), DropEqual()))
    both = [gradient(run, run.collect(0)) for run in (kept, dropped)]
    assert both[0].abs().max() > 1e-3
    torch.testing.assert_close(both[1], 2 * both[0], atol=1e-7, rtol=1e-6)
    assert dropped.collect(0).weights.sum() == 12
    dropped = trainer(tmp_path / "run", for_some, DropEqual(), sampling)
    dropped.train(report=False)
    row = rows(tmp_path / "run")[-1]
    assert (row["left_out"], row["sampled_again"]) == (2, 0)
    assert row["rows/gradient"] == 2 * 12  # two steps of two groups


def test_with_a_kl_too_nothing_is_called_for_what_is_left_out(tmp_path):
    run = trainer(tmp_path / "run", for_some, DropEqual(), kl_coef=0.1)
    batch = run.collect(0)
    run.state.rows = Rows()
    run.update(batch)
    assert run.state.rows == Rows(24, 24)


def test_an_epoch_that_teaches_nothing_is_told_and_goes_by(tmp_path):
    run = trainer(tmp_path / "run", lambda media, prompts: torch.ones(len(media)), DropEqual(), updates_per_epoch=2)
    run.train(report=False)
    row = rows(tmp_path / "run")[-1]
    assert (row["left_out"], row["rows/gradient"], row["grad_norm"]) == (4, 0, 0)
    assert not run.model.bias.any()


@pytest.mark.parametrize("plan", [PLAN, AllSteps(SDE, shared_noise=True)], ids=["apart", "shared"])
def test_the_best_and_the_worst_alone_make_the_gradient(plan, tmp_path):
    """The same as of all samples where the others' advantages are 0, but for the divisor; and no call for them."""
    sampling = Sampling(plan, 4, 6, 4 if plan is PLAN else 2, 64, 3, 1.0)
    run, every = (trainer(tmp_path / "run", level, one, sampling) for one in (BestAndWorst(2), EverySample()))
    batch, whole = run.collect(0), every.collect(0)
    assert torch.equal(batch.advantages, whole.advantages), "advantages are held against all samples"
    ranks = batch.scores.total.view(4, 6).argsort(1).argsort(1).flatten()
    assert batch.weights.tolist() == [float(rank not in (2, 3)) for rank in ranks]
    taught = replace(whole, advantages=whole.advantages * batch.weights)
    torch.testing.assert_close(gradient(run, batch), gradient(every, taught) * 6 / 4, atol=1e-6, rtol=1e-5)
    run.model.meter.take()
    run.train(report=False)
    row = rows(tmp_path / "run")[-1]
    assert (row["rows/forward"], row["rows/gradient"]) == (row["floor/forward"], row["floor/gradient"])
    assert spent_rows(run, run.collection.epoch(0), geometry(run)) == floor_rows(run, run.collection.epoch(0))
    if plan is PLAN:
        assert row["rows/gradient"] == 4 * 4 * 2


def test_every_optimizer_step_gets_its_share_of_what_is_taken(tmp_path):
    run = trainer(tmp_path / "run", level, BestAndWorst(1), updates_per_epoch=2)
    batch = run.collect(0)
    parts = Update(run, batch, None)._parts(2)
    assert [len(part) for part in parts] == [4, 4]
    assert sorted(torch.cat(parts).tolist()) == batch.weights.nonzero().flatten().tolist()
    with pytest.raises(ValueError, match=r"must lie in 1 \.\.\. 8"):
        trainer(tmp_path / "x", level, BestAndWorst(1), updates_per_epoch=9)


def drawn_again(run: FlowGRPO) -> Batch:
    batch = run.collect(0)
    assert len(run.state.rounds) >= 2, "the seed has groups that need several rounds"
    return batch


def test_groups_are_drawn_until_they_have_spread(tmp_path):
    """The first round is the plain epoch's; a group stops once it is settled, and no later than after four rounds."""
    run = trainer(tmp_path / "run", coarse, Resample(), seed=0)
    plain = trainer(tmp_path / "plain", coarse, EverySample(), seed=0)
    batch, first = drawn_again(run), plain.collect(0)
    assert torch.equal(batch.scores.total[:24], first.scores.total)
    assert torch.equal(batch.parts[0].steps[0].latents, first.steps[0].latents)
    every = torch.cat([part.steps[0].latents for part in batch.parts])
    assert len(every.unique(dim=0)) == len(batch.rows) == len(batch.scores)
    for group in range(4):
        rewards = batch.scores.total[batch.group_ids == group]
        again = sum(group in one for one in run.state.rounds)
        assert len(rewards) == 6 * (1 + again)
        assert again <= 3
        before = rewards[: 6 * again]  # all but the last round: they had no spread yet
        assert not len(before) or bool((before == before[0]).all())
        assert rewards.amax() > rewards.amin() or again == 3
        taken = batch.weights[batch.group_ids == group]
        assert taken.sum() == (6 if rewards.amax() > rewards.amin() else 0)
        assert batch.advantages[batch.group_ids == group].sum().abs() < 1e-5  # against the mean of all rounds
        if taken.any():
            chosen = batch.scores.total[(batch.group_ids == group) & (batch.weights > 0)]
            assert min((chosen > 0.5).sum(), (chosen < 0.5).sum()) == min(3, (rewards > 0.5).sum())
    assert torch.equal(drawn_again(run).scores.total, batch.scores.total)


def test_half_are_to_pass_and_half_to_fail(tmp_path):
    run = trainer(tmp_path / "run", coarse, Resample(4, Balanced(0.5)), seed=0)
    batch = drawn_again(run)
    for group in range(4):
        rewards = batch.scores.total[batch.group_ids == group]
        passed = int((rewards > 0.5).sum())
        assert passed >= 3 or len(rewards) == 24
        chosen = batch.scores.total[(batch.group_ids == group) & (batch.weights > 0)]
        if passed >= 3:
            assert sorted(chosen.tolist()) == [0, 0, 0, 1, 1, 1]


def test_a_run_tells_of_the_first_round_and_counts_the_others(tmp_path):
    """The rows that it takes are those that it needs; a row is 3 velocities, and 2 with gradient."""
    run = trainer(tmp_path / "run", coarse, Resample(), replace(SAMPLING, batch_size=1), seed=0, updates_per_epoch=2)
    plain = trainer(tmp_path / "plain", coarse, EverySample(), seed=0)
    for one in (run, plain):
        one.train(report=False)
    row, same = rows(tmp_path / "run")[-1], rows(tmp_path / "plain")[-1]
    names = ("reward", "reward_std_in_group", "equal_groups", "invalid")
    assert [row[name] for name in names] == [same[name] for name in names]
    assert row["equal_groups"] > 0
    assert row["sampled_again"] % 6 == 0
    assert row["rows/forward"] == row["floor/forward"] == 3 * (24 + row["sampled_again"])
    assert row["rows/gradient"] == row["floor/gradient"] - 2 * 6 * row["left_out"]
    assert row["sampled_again"] >= 12
    assert run.state.rounds == []
    assert row["ratio_max"] < 0.2


def test_the_first_step_of_a_drawn_again_epoch_is_on_policy(tmp_path):
    for sampling in (SAMPLING, replace(SAMPLING, batch_size=5)):
        run = trainer(tmp_path / "run", coarse, Resample(), sampling, seed=0)
        assert run.update(drawn_again(run))["ratio_max"] == 0


@pytest.mark.parametrize(
    "plan", [FanOut(SDE, (1,)), AllSteps(SDE, last_step=False, shared_noise=True)], ids=["fan", "all"]
)
def test_a_group_that_shares_its_start_does_so_in_all_rounds(plan, tmp_path):
    sampling = Sampling(plan, 4, 6, 3, 64, 3, 1.0)
    run = trainer(tmp_path / "run", coarse, Resample(), sampling, seed=0)
    batch = drawn_again(run)
    first = [part.steps[0] for part in batch.parts]
    starts, ends = torch.cat([one.latents for one in first]), torch.cat([one.latents_next for one in first])
    anchors: dict[int, Tensor] = {}
    for row, latents in enumerate(starts):
        group = int(batch.group_ids[row * 6])
        assert torch.equal(anchors.setdefault(group, latents), latents)
    assert len(starts) > 4 == len(anchors)
    assert len(ends.unique(dim=0)) == len(batch.scores)
    assert run.update(batch)["ratio_max"] == 0


def sometimes(media: Media, prompts: Prompts) -> Tensor:
    """`coarse`, which cannot be had where the level is low."""
    return coarse(media, prompts).where(level(media, prompts) > -0.8, torch.nan)


def test_samples_without_a_valid_score_are_neither_counted_nor_taken(tmp_path):
    run = trainer(tmp_path / "run", sometimes, Resample(), seed=0, on_invalid="drop")
    batch = drawn_again(run)
    known = batch.scores.valid
    assert 0 < (~known).sum() < len(known)
    assert not batch.weights[~known].any()
    for group in range(4):
        inside = (batch.group_ids == group) & known
        assert batch.advantages[inside].sum().abs() < 1e-5
        assert batch.weights[inside].sum() in (0, min(6, int(inside.sum())))
    assert run.update(batch)["ratio_max"] == 0
    assert "up to 96 where groups are drawn again (4 rounds at most)" in run.remarks()[0]


def test_gains_of_drawn_again_groups(tmp_path):
    run = trainer(tmp_path / "run", coarse, Resample(2), kind=DenseGRPO, seed=0)
    batch = run.collect(0)
    assert run.state.rounds
    assert batch.advantages.shape == (len(batch.scores), 2)
    for group in range(4):
        assert batch.advantages[batch.group_ids == group].sum(0).abs().max() < 1e-5
    assert run.update(batch)["ratio_max"] == 0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of a run with all that credit, selection and regularisers keep, the second of three rounds."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    processes.run(1, folder.parent, functools.partial(told, folder, **CHANGES))
    return folder


CHANGES: dict[str, Any] = {"kind": "credit", "optimizer": GENTLE, "refresh": Refresh(1), "epochs": 2}


@pytest.mark.parametrize(("before", "after"), slow_but([(2, 3)], [(1, 1), (2, 3)]))
def test_a_run_that_is_stopped_amid_a_further_round_goes_on_there(before, after, tmp_path, unbroken):
    """Of five micro-batches in the first epoch, and five, three and three in the second: in the last three."""
    folder, turn = tmp_path / "run", {1: 15, 2: 9}[before]
    work = functools.partial(told, folder, **CHANGES)
    messages = processes.run(before, tmp_path, dying(work, "rollout", turn, before - 1, signal.SIGTERM))
    assert all("stopped by SIGTERM" in message for message in messages)
    state = state_of(folder)
    assert (state.epoch, state.part, state.rounds) == (1, 0, [[1, 2], [1, 2]])
    assert 8 < len(state.buffer) < 11
    assert state.older
    assert state.kl_coef == 0.05
    processes.run(after, tmp_path, work)
    assert_close(folder, unbroken)
    if after == 1:
        assert digest(folder) == digest(unbroken)
    assert rows(folder)[-2]["sampled_again"] == 12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BestAndWorst(0), "count must be at least 1"),
        (lambda: Resample(rounds=1), "must be at least 2"),
        (lambda: HasSpread(-0.1), "least must be at least 0"),
        (lambda: BestAndWorst(4).check(SAMPLING), "a group of 6 has no 8 samples"),
        (lambda: FlowGRPO("no/such/model", level, ["x"], SAMPLING, selection=BestAndWorst(4)), "a group of 6 has no 8"),
    ],
)
def test_what_cannot_be_chosen_is_refused(make, message):
    """Before the model is loaded."""
    with pytest.raises(ValueError, match=message):
        make()

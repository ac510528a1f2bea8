"""The same run on any number of processes: rollouts bit for bit, policies but for the order of addition."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowalign import distributed
from flowalign.distributed import share
from flowalign.records import Scores
from flowalign.schedules import AllSteps, FanOut
from flowalign.transitions import FlowSDE
from tests import processes
from tests.interrupted import slow_but
from tests.jobs import BY_GRADIENT, FORWARD, JOBS, REPLAYED, job, rows
from trainers import Evaluation, Optimizer, Sampling
from trainers.gathering import gather_files, gather_scores

GENTLE = Optimizer(
    3e-4,  # the default: AdamW moves what has no gradient but rounding by up to its learning rate
    ema_decay=0.5,
    ema_every=1,
)
FANNED = Sampling(FanOut(FlowSDE(0.7), (1,)), 5, 4, batch_size=2, rows_per_call=4, steps=3, guidance_scale=1.0)
SHARED = Sampling(
    AllSteps(FlowSDE(0.7), shared_noise=True), 5, 4, batch_size=2, rows_per_call=4, steps=3, guidance_scale=2.0
)
UNEVEN = Sampling(AllSteps(FlowSDE(0.7)), 3, 3, batch_size=2, rows_per_call=2, steps=3, guidance_scale=2.0)


def first_rollout(folder: Path, sampling: Sampling, rank: int = 0) -> dict[str, Any]:
    batch = job(folder, sampling=sampling).collect(0)
    steps = [(step.latents_next.numpy(), step.log_probs.numpy()) for step in batch.steps]
    return {
        "rows": batch.rows.tolist(),
        "steps": steps,
        "rewards": batch.scores.total.numpy(),
        "advantages": batch.advantages.numpy(),
    }


@pytest.mark.parametrize("sampling", [UNEVEN, FANNED], ids=["uneven", "fanned"])
def test_the_first_rollout_is_bit_equal(sampling, tmp_path):
    """9 rows in micro-batches of 2, or 5 groups in micro-batches of 2, on 1, 2, 3 and 5 processes."""
    work = functools.partial(first_rollout, tmp_path / "run", sampling)
    (alone,) = processes.run(1, tmp_path, work)
    for world in (2, 3, 5):
        found = processes.run(world, tmp_path, work)
        assert [row for one in found for row in one["rows"]] == alone["rows"]
        for one in found:
            assert np.array_equal(one["rewards"], alone["rewards"])
            assert np.array_equal(one["advantages"], alone["advantages"])
        held = [one for one in found if one["rows"]]
        for at, (latents, log_probs) in enumerate(alone["steps"]):
            assert np.array_equal(np.concatenate([one["steps"][at][0] for one in held]), latents)
            assert np.array_equal(np.concatenate([one["steps"][at][1] for one in held]), log_probs)


def policy(folder: Path, changes: dict[str, Any], rank: int = 0, kind: str = "flow_grpo") -> dict[str, Any]:
    trainer = JOBS[kind](folder, optimizer=GENTLE, **changes)
    trainer.train(report=False)
    return {name: value.detach().numpy() for name, value in trainer.model.trainable().items()}


SOME = {"fanned": FANNED, "uneven": UNEVEN, "shared": SHARED}


@pytest.mark.parametrize("sampling", slow_but(["fanned"], SOME))
def test_six_updates_come_to_the_same_policy(sampling, tmp_path):
    """Within 1e-6, at a learning rate at which they move it by more than 1e-3; and to the same metrics."""
    start = {name: value.detach().numpy() for name, value in job(tmp_path / "x").model.trainable().items()}
    changes = {"sampling": SOME[sampling]}
    (alone,) = processes.run(1, tmp_path, functools.partial(policy, tmp_path / "1", changes))
    assert max(np.abs(alone[name] - start[name]).max() for name in alone) > 1e-3
    for world in (2, 5):
        folder = tmp_path / str(world)
        found = processes.run(world, tmp_path, functools.partial(policy, folder, changes))
        for one in found:
            assert all(np.array_equal(one[name], found[0][name]) for name in one)  # exactly replicated
            assert max(np.abs(one[name] - alone[name]).max() for name in one) <= 1e-6
        for row, same in zip(rows(folder), rows(tmp_path / "1"), strict=True):
            kept = [name for name in same if not name.startswith("rows/")]  # padding depends on the split
            assert {name: row[name] for name in kept} == pytest.approx({n: same[n] for n in kept}, abs=1e-4, rel=1e-3)


def test_gains_are_the_same_on_any_number_of_processes(tmp_path):
    """So is the noise that they calibrate, to the last bit, with odd micro-batches; policies but for rounding."""

    def work(folder: Path, rank: int) -> tuple[Any, ...]:
        trainer = JOBS["dense_grpo"](folder, sampling=UNEVEN, optimizer=GENTLE, epochs=1)
        trainer.train(report=False)
        credit = trainer.collect(1).advantages.numpy()
        return trainer.state.noise, credit, {n: v.detach().numpy() for n, v in trainer.model.trainable().items()}

    (alone,) = processes.run(1, tmp_path, functools.partial(work, tmp_path / "1"))
    assert alone[1].shape == (9, 3)
    for world in (2, 3):
        for noise, credit, end in processes.run(world, tmp_path, functools.partial(work, tmp_path / str(world))):
            assert noise == alone[0]
            assert np.abs(credit - alone[1]).max() < 1e-2
            assert max(np.abs(end[name] - alone[2][name]).max() for name in end) <= 1e-6


def first_gradient(kind: str, folder: Path, rank: int = 0) -> list[Any]:
    """What the first optimizer step is made of."""
    trainer, seen = JOBS[kind](folder, epochs=1, updates_per_epoch=1), list[Any]()
    values = [*trainer.model.trainable().values()]
    trainer.optimizer.adamw.register_step_pre_hook(lambda *_: seen.extend(v.grad.numpy().copy() for v in values))
    trainer.train(report=False)
    return seen


@pytest.mark.parametrize("kind", REPLAYED)
def test_other_rollouts_and_their_gradient_are_the_same_on_any_number_of_processes(kind, tmp_path):
    """Whole trees, in micro-batches of two out of three; and rollouts that follow a reward's gradient."""

    def work(folder: Path, rank: int) -> tuple[Any, ...]:
        batch = JOBS[kind](folder / "rollout").collect(0)
        return batch.scores.total.numpy(), batch.advantages.numpy(), first_gradient(kind, folder / "run")

    (alone,) = processes.run(1, tmp_path, functools.partial(work, tmp_path / "1"))
    assert max(np.abs(one).max() for one in alone[2]) > 1e-3
    for rewards, advantages, gradient in processes.run(2, tmp_path, functools.partial(work, tmp_path / "2")):
        assert np.array_equal(rewards, alone[0])
        assert np.array_equal(advantages, alone[1])
        assert max(np.abs(a - b).max() for a, b in zip(gradient, alone[2], strict=True)) <= 1e-6


@pytest.mark.parametrize("kind", slow_but(["draft"], BY_GRADIENT))
def test_a_gradient_of_the_reward_is_the_same_on_any_number_of_processes(kind, tmp_path):
    """6 rows in micro-batches of 2, on 1, 2 and 4 processes, the last of which has nothing to do."""
    (alone,) = processes.run(1, tmp_path, functools.partial(first_gradient, kind, tmp_path / "1"))
    assert max(np.abs(one).max() for one in alone) > 1e-3
    for world in (2, 4):
        for found in processes.run(world, tmp_path, functools.partial(first_gradient, kind, tmp_path / str(world))):
            assert max(np.abs(a - b).max() for a, b in zip(found, alone, strict=True)) <= 1e-6


@pytest.mark.parametrize("kind", slow_but(["draft"], BY_GRADIENT))
def test_updates_by_gradient_come_to_the_same_policy(kind, tmp_path):
    """Six optimizer steps of three rows, in two micro-batches."""
    (alone,) = processes.run(1, tmp_path, functools.partial(policy, tmp_path / "1", {}, kind=kind))
    found = processes.run(2, tmp_path, functools.partial(policy, tmp_path / "2", {}, kind=kind))
    for one in found:
        assert all(np.array_equal(one[name], found[0][name]) for name in one)
        assert max(np.abs(one[name] - alone[name]).max() for name in one) <= 1e-6
    for row, same in zip(rows(tmp_path / "2"), rows(tmp_path / "1"), strict=True):
        assert row == pytest.approx(same, abs=1e-4, rel=1e-3)


@pytest.mark.parametrize("kind", slow_but(["pairs"], FORWARD))
def test_noising_anew_is_the_same_on_any_number_of_processes(kind, tmp_path):
    """Stored pairs; and pairs out of groups of three in micro-batches of two, which processes do not hold whole."""
    (alone,) = processes.run(1, tmp_path, functools.partial(first_gradient, kind, tmp_path / "1"))
    assert max(np.abs(one).max() for one in alone) > 1e-3
    for world in (2, 5):
        for found in processes.run(world, tmp_path, functools.partial(first_gradient, kind, tmp_path / str(world))):
            assert max(np.abs(a - b).max() for a, b in zip(found, alone, strict=True)) <= 1e-6


@pytest.mark.parametrize("kind", slow_but(["nft"], FORWARD))
def test_updates_by_noising_anew_come_to_the_same_policy(kind, tmp_path):
    """Six optimizer steps, the last two of which are compared with another reference online."""
    (alone,) = processes.run(1, tmp_path, functools.partial(policy, tmp_path / "1", {}, kind=kind))
    found = processes.run(3, tmp_path, functools.partial(policy, tmp_path / "3", {}, kind=kind))
    for one in found:
        assert all(np.array_equal(one[name], found[0][name]) for name in one)
        assert max(np.abs(one[name] - alone[name]).max() for name in one) <= 1e-6
    for row, same in zip(rows(tmp_path / "3"), rows(tmp_path / "1"), strict=True):
        kept = [name for name in same if not name.startswith("rows/")]
        assert {name: row[name] for name in kept} == pytest.approx({n: same[n] for n in kept}, abs=1e-4, rel=1e-3)


def test_accumulation_changes_nothing_under_a_smooth_reward(tmp_path):
    """8 samples an optimizer step, in 1, 2 and 4 micro-batches; and in micro-batches of 3 with padding."""

    def sampled(batch_size: int) -> dict[str, Any]:
        plan = AllSteps(FlowSDE(0.7))
        sampling = Sampling(plan, 2, 8, batch_size=batch_size, rows_per_call=8, steps=3, guidance_scale=2.0)
        return {"sampling": sampling, "epochs": 1, "evaluation": Evaluation()}

    def made(size: int) -> dict[str, Any]:
        (found,) = processes.run(1, tmp_path, functools.partial(policy, tmp_path / str(size), sampled(size)))
        return dict(found)

    whole = made(2)
    assert max(np.abs(value).max() for name, value in whole.items() if "lora_B" in name) > 1e-4  # it was 0
    for size in (8, 4, 3):
        other = made(size)
        assert max(np.abs(other[name] - whole[name]).max() for name in whole) <= 1e-6, size


def test_shares_leave_nothing_out_and_differ_by_one():
    for total, world in itertools.product(range(40), range(1, 34)):
        shares = [share(total, rank, world) for rank in range(world)]
        assert [unit for one in shares for unit in one] == [*range(total)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def exchange(rank: int) -> tuple[list[float], list[float], list[str]]:
    one, two = torch.arange(3.0) + rank, torch.full((2, 2), 10.0**rank)
    distributed.sum_over_ranks([one, two])
    return (
        [*one.tolist(), *two.flatten().tolist()],
        distributed.largest([rank, -rank]),
        distributed.gather_text("ab" * rank),
    )


def test_sums_largest_values_and_texts_reach_every_process(tmp_path):
    for found in processes.run(3, tmp_path, exchange):
        assert found == ([3.0, 6.0, 9.0, *[111.0] * 4], [2.0, 0.0], ["", "ab", "abab"])


def films(rank: int) -> dict[int, bytes]:
    return gather_files({0: {4: b"four", 1: b""}, 1: {}, 2: {0: b"\x00\xff"}}[rank])


def test_files_of_any_size_reach_every_process(tmp_path):
    for found in processes.run(3, tmp_path, films):
        assert found == {0: b"\x00\xff", 1: b"", 4: b"four"}


def scores_by_name(names: tuple[tuple[str, ...], ...], rank: int) -> Any:
    """Two samples on each process but the third, whose parts are 10 times the place of their name's first letter."""
    rows = torch.tensor([2.0 * rank, 2.0 * rank + 1])
    parts = {name: 10.0 * "abc".index(name[0]) + rows for name in names[rank]}
    mine = [] if rank == 2 else [Scores(rows, parts, rows > 0)]
    try:
        return gather_scores(mine, [2 * rank, 2 * rank + 1] if mine else [], 4)
    except ValueError as error:
        return str(error)


def test_parts_of_scores_are_gathered_by_name(tmp_path):
    for found in processes.run(3, tmp_path, functools.partial(scores_by_name, (("b", "a"), ("a", "b"), ()))):
        assert found.total.tolist() == [0, 1, 2, 3]
        assert found.valid.tolist() == [False, True, True, True]
        parts = {name: values.tolist() for name, values in found.parts.items()}
        assert parts == {"b": [10, 11, 12, 13], "a": [0, 1, 2, 3]}
        assert [*parts] == ["b", "a"], "in the order of the first"


@pytest.mark.parametrize("other", [("a", "c"), ("a",), ("a", "b", "c"), ()])
def test_parts_of_other_names_end_every_process_with_both(other, tmp_path):
    line = f"the reward's parts differ: on process 0 a, b, on process 1 {', '.join(other) or 'none'}"
    assert processes.run(3, tmp_path, functools.partial(scores_by_name, (("b", "a"), other, ()))) == [line] * 3


def failing(rank: int) -> str:
    def fail() -> None:
        if rank == 1:
            raise ValueError("no room for it")

    try:
        distributed.together(fail)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def test_what_fails_on_one_process_is_raised_on_all(tmp_path):
    found = processes.run(3, tmp_path, failing)
    assert found[1] == "ValueError: no room for it"
    assert found[0] == found[2] == "LostProcess: process 1: no room for it"


def uneven_reward(media: Any, prompts: Any) -> Tensor:
    return torch.rand(len(media))


def random_scores(folder: Path, rank: int = 0) -> Any:
    return job(folder, reward=uneven_reward).collect(1).scores.total.numpy()


def test_a_reward_that_draws_random_numbers_does_not_depend_on_the_split(tmp_path):
    (alone,) = processes.run(1, tmp_path, functools.partial(random_scores, tmp_path / "run"))
    assert len({*alone.tolist()}) == len(alone)
    for one in processes.run(3, tmp_path, functools.partial(random_scores, tmp_path / "run")):
        assert np.array_equal(one, alone)


@pytest.mark.parametrize(
    ("environ", "places"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}, (5, 6, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}, (0, 1, 0)),  # the batch script itself, not a step of srun
    ],
)
def test_launchers_tell_who_is_who(environ, places):
    assert distributed._places(environ) == places


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("n1,n7", "n1"),
        ("gpu[03-05,11],cpu1", "gpu03"),
        ("gpu[8,11]", "gpu8"),
        ("login1,gpu[03-05]", "login1"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_processes_of_srun_meet_at_its_first_host(nodes, first):
    assert distributed.first_host(nodes) == first


def test_a_launcher_s_variable_that_is_no_number_is_named():
    with pytest.raises(ValueError, match="the launcher's variable WORLD_SIZE is no number: 'x'"):
        distributed.start({"RANK": "0", "WORLD_SIZE": "x"})


def test_processes_that_have_not_met_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"call flowalign\.distributed\.start"):
        job(tmp_path / "run")
    with pytest.raises(ValueError, match="without MASTER_ADDR"):
        distributed.start({"RANK": "1", "WORLD_SIZE": "2"})

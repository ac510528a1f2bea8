"""A run that a signal stops, and gone on with on as many processes or others: all is saved, and nothing lost."""

from __future__ import annotations

import functools
import json
import signal

import pytest

from flowalign import checkpoint
from tests import processes
from tests.interrupted import GENTLE, assert_close, dying, slow_but, state_of, told, train
from tests.jobs import BY_GRADIENT, FORWARD, digest

STOPS = [
    (signal.SIGTERM, "rollout", 6, 1), (signal.SIGUSR1, "update", 9, 1), (signal.SIGINT, "reward", 2, 1),
    (signal.SIGTERM, "rollout", 6, 2), (signal.SIGUSR1, "update", 9, 2), (signal.SIGINT, "reward", 2, 2),
]  # fmt: skip


@pytest.mark.parametrize(("number", "place", "turn", "world"), slow_but([STOPS[2], STOPS[3]], STOPS))
def test_a_signal_stops_all_processes_within_a_step_and_loses_nothing(number, place, turn, world, tmp_path, unbroken):
    folder = tmp_path / "run"
    turn = turn if world == 1 else -(-turn // 2)
    stopped = dying(functools.partial(told, folder), place, turn, world - 1, number)
    messages = processes.run(world, tmp_path, stopped)
    assert all(f"stopped by {number.name}; all is saved in {folder}" in message for message in messages)
    assert (folder / "PREEMPTED").exists() == (number != signal.SIGINT)
    last = checkpoint.names(folder / "checkpoints")[-1]
    if place == "rollout":  # saved amid the rollouts: the micro-batch in hand is finished, and no other one begun
        assert "-rollout-" in last
    processes.run(world, tmp_path, functools.partial(train, folder))
    assert digest(folder) == unbroken(world)
    assert not (folder / "PREEMPTED").exists()


AMID = [
    ("draft", "path", 6), ("draft", "step", 3), ("refl", "path", 2), ("instruct_video", "path", 8), ("ipro", "path", 5),
    ("pairs", "forward", 2),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "place", "turn"), slow_but([AMID[0], AMID[5]], AMID))
@pytest.mark.parametrize("world", slow_but([2], [1, 2]))
def test_a_signal_amid_a_gradient_makes_its_step_anew(kind, place, turn, world, tmp_path, unbroken):
    """Six optimizer steps of two micro-batches each; half of them a process where there are two."""
    folder = tmp_path / "run"
    turn = turn if world == 1 or place == "step" else -(-turn // 2)
    stopped = dying(functools.partial(told, folder, kind=kind), place, turn, world - 1, signal.SIGTERM)
    messages = processes.run(world, tmp_path, stopped)
    assert all(f"stopped by SIGTERM; all is saved in {folder}" in message for message in messages)
    assert "-rollout-" not in checkpoint.names(folder / "checkpoints")[-1]
    processes.run(world, tmp_path, functools.partial(train, folder, kind=kind))
    assert digest(folder) == unbroken(world, kind)


@pytest.mark.parametrize(("before", "after"), slow_but([(2, 2)], [(1, 1), (2, 2), (2, 1)]))
def test_a_calibration_that_is_stopped_goes_on_where_it_was(before, after, tmp_path, unbroken):
    """In the second of its two rounds: of each process's rollouts, four on one and two on two, the third or second."""
    folder = tmp_path / "run"
    work = functools.partial(told, folder, kind="dense_grpo")
    stopped = dying(work, "rollout", 3 if before == 1 else 2, before - 1, signal.SIGTERM)
    messages = processes.run(before, tmp_path, stopped)
    assert all(f"stopped by SIGTERM; all is saved in {folder}" in message for message in messages)
    (name,) = checkpoint.names(folder / "checkpoints")
    assert name == f"step-00000000-calibration-00000{1 if before == 1 else 2}"
    assert len(state_of(folder).noise["rounds"]) == int(name[-1])
    processes.run(after, tmp_path, functools.partial(train, folder, kind="dense_grpo"))
    noise = json.loads((folder / "noise.json").read_text())
    assert noise == state_of(folder).noise
    if before == after:
        assert digest(folder) == unbroken(after, "dense_grpo")


def test_a_second_signal_does_not_wait(tmp_path, monkeypatch):
    monkeypatch.setattr("flowalign.interrupt.PATIENCE", -1.0)
    work = functools.partial(train, tmp_path / "run")
    twice = dying(dying(work, "update", 1, 0, signal.SIGTERM), "update", 1, 0, signal.SIGTERM)
    assert processes.killed(twice) == -signal.SIGTERM


@pytest.mark.parametrize(("before", "after"), slow_but([(3, 2)], [(2, 1), (1, 3), (3, 2)]))
def test_it_goes_on_with_another_number_of_processes(before, after, tmp_path):
    """Stopped amid the rollouts, so that what each process held is shared out anew."""
    folder = tmp_path / "run"
    processes.run(1, tmp_path, functools.partial(train, tmp_path / "whole", optimizer=GENTLE))
    work = functools.partial(told, folder, optimizer=GENTLE)
    messages = processes.run(before, tmp_path, dying(work, "rollout", 2, 0, signal.SIGTERM))
    assert "-rollout-" in messages[0]
    processes.run(after, tmp_path, functools.partial(train, folder, optimizer=GENTLE))
    assert_close(folder, tmp_path / "whole")


@pytest.mark.parametrize("kind", slow_but(["refl"], BY_GRADIENT))
def test_a_run_by_gradient_goes_on_with_another_number_of_processes(kind, tmp_path):
    """Stopped between two optimizer steps of an epoch: the scores of the first are kept."""
    folder, changes = tmp_path / "run", {"kind": kind, "optimizer": GENTLE}
    processes.run(1, tmp_path, functools.partial(train, tmp_path / "whole", **changes))
    work = functools.partial(told, folder, **changes)
    processes.run(2, tmp_path, dying(work, "step", 3, 0, signal.SIGTERM))
    assert state_of(folder).part == 1
    processes.run(1, tmp_path, functools.partial(train, folder, **changes))
    assert_close(folder, tmp_path / "whole")


@pytest.mark.parametrize("kind", slow_but(["nft"], FORWARD))
def test_a_run_by_the_forward_process_goes_on_with_another_number_of_processes(kind, tmp_path):
    """Stopped between two optimizer steps of the last epoch, whose reference is another than the first one's."""
    folder, changes = tmp_path / "run", {"kind": kind, "optimizer": GENTLE}
    processes.run(1, tmp_path, functools.partial(train, tmp_path / "whole", **changes))
    work = functools.partial(told, folder, **changes)
    processes.run(2, tmp_path, dying(work, "forward step", 5, 0, signal.SIGTERM))
    assert state_of(folder).part == 1
    assert bool(state_of(folder).older) == (kind in ("dpo", "rwr", "nft"))
    processes.run(3, tmp_path, functools.partial(train, folder, **changes))
    assert_close(folder, tmp_path / "whole")

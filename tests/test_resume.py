"""A run that is killed, stopped or damaged, and gone on with by the same command: the same to the last bit."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign import checkpoint
from flowalign.interrupt import Stopped
from flowalign.records import Media, Prompts
from rewards.base import as_reward
from tests import jobs, processes
from tests.jobs import BY_GRADIENT, FORWARD, JOBS, digest, job, rows
from trainers import Checkpoints, Evaluation, FlowGRPO, Optimizer
from trainers.batch import Batch
from trainers.collection import Collection
from trainers.forward_steps import ForwardSteps
from trainers.path_steps import PathSteps
from trainers.state import State
from trainers.update import Update


def train(folder: Path, rank: int = 0, kind: str = "flow_grpo", **changes: Any) -> None:
    JOBS[kind](folder, **changes).train(resume=True, report=False)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """What a run that nothing happens to comes to, on so many processes."""

    @functools.cache
    def of(world: int, kind: str = "flow_grpo") -> dict[str, str]:
        folder = tmp_path_factory.mktemp("unbroken")
        processes.run(world, folder, functools.partial(train, folder / "run", kind=kind))
        return digest(folder / "run")

    return of


# AdamW moves a parameter whose gradient is near 0 by up to the learning rate, whatever rounding makes of its sign: so
# runs that add gradients in another order are compared at a usual learning rate.
GENTLE = Optimizer(3e-4, ema_decay=0.5, ema_every=1)

PLACES = {
    "rollout": (Collection, "collect"),
    "reward": (jobs, "redness"),
    "update": (Update, "_backward"),
    "path": (PathSteps, "_backward"),
    "step": (PathSteps, "_count_skipped"),
    "forward": (ForwardSteps, "micro_batch"),
    "forward step": (ForwardSteps, "_count_skipped"),
    "write": (checkpoint, "_write"),
    "seal": (checkpoint, "_seal"),
    "rename": (checkpoint, "_sync_folder"),
    "retire": (checkpoint, "_discard"),
}


def dying(work: Callable[[int], Any], place: str, turn: int, victim: int, number: int) -> Callable[[int], Any]:
    """The same work, in which one process is sent a signal as it comes to a place for the n-th time."""
    owner, name = PLACES[place]

    def change(rank: int = 0) -> Any:
        real, seen = getattr(owner, name), [0]

        @functools.wraps(real)
        def counted(*arguments: Any) -> Any:
            seen[0] += 1
            if seen[0] == turn and rank == victim:
                os.kill(os.getpid(), number)
            return real(*arguments)

        setattr(owner, name, counted)
        return work(rank)

    return change


KILLS = [
    ("rollout", 1), ("rollout", 6), ("reward", 14), ("update", 3), ("update", 20),
    ("write", 2), ("write", 7), ("seal", 3), ("rename", 5), ("retire", 2),
]  # fmt: skip
GRADIENT_KILLS = [("path", 1), ("path", 7), ("step", 3), ("reward", 9), ("seal", 3)]
ALL_KILLS = [
    *(("flow_grpo", *kill) for kill in KILLS),
    *(("dense_grpo", *kill) for kill in [("rollout", 3), ("rollout", 10), ("reward", 9), ("update", 15), ("seal", 3)]),
    ("tree", "update", 11), ("euphonium", "rollout", 6), ("guard", "update", 9),
    *(("draft", *kill) for kill in GRADIENT_KILLS),
    *(("refl", *kill) for kill in GRADIENT_KILLS[1:3]),
    *((kind, *GRADIENT_KILLS[1]) for kind in BY_GRADIENT[2:]),
    *(("dpo", *kill) for kill in [("rollout", 9), ("forward", 3), ("forward", 10), ("forward step", 6), ("seal", 6)]),
    ("g2rpo", "update", 9), ("awm", "forward", 12),
    *(("pairs", *kill) for kill in [("forward", 2), ("forward step", 3), ("seal", 3)]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "place", "turn"), ALL_KILLS)
def test_a_killed_run_comes_to_the_same(kind, place, turn, tmp_path, unbroken):
    work = functools.partial(train, tmp_path / "run", kind=kind)
    assert processes.killed(dying(work, place, turn, 0, signal.SIGKILL)) == -signal.SIGKILL
    assert processes.killed(work) == 0
    assert digest(tmp_path / "run") == unbroken(1, kind)


@pytest.mark.parametrize(
    ("kind", "place", "turn", "victim"),
    [
        ("flow_grpo", "rollout", 3, 0), ("flow_grpo", "reward", 3, 1), ("flow_grpo", "update", 8, 1),
        ("flow_grpo", "write", 2, 1), ("flow_grpo", "seal", 4, 0), ("dense_grpo", "update", 7, 1),
        ("tree", "update", 5, 1), ("draft", "path", 3, 1), ("refl", "step", 2, 0), ("instruct_video", "path", 3, 0),
        ("dpo", "forward", 6, 1), ("pairs", "forward step", 4, 0),
    ],
)  # fmt: skip
def test_one_of_two_processes_is_killed(kind, place, turn, victim, tmp_path, unbroken):
    work = functools.partial(train, tmp_path / "run", kind=kind)
    with pytest.raises(RuntimeError, match=r"another process has gone|processes \[\d\] have gone"):
        processes.run(2, tmp_path, dying(work, place, turn, victim, signal.SIGKILL))
    processes.run(2, tmp_path, work)
    assert digest(tmp_path / "run") == unbroken(2, kind)


@pytest.mark.parametrize(("number", "place", "turn"), [
    (signal.SIGTERM, "rollout", 6), (signal.SIGUSR1, "update", 9), (signal.SIGINT, "reward", 2),
])  # fmt: skip
@pytest.mark.parametrize("world", [1, 2])
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


@pytest.mark.parametrize(("kind", "place", "turn"), [
    ("draft", "path", 6), ("draft", "step", 3), ("refl", "path", 2), ("instruct_video", "path", 8), ("ipro", "path", 5),
    ("pairs", "forward", 2),
])  # fmt: skip
@pytest.mark.parametrize("world", [1, 2])
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


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1)])
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


def told(folder: Path, rank: int, **changes: Any) -> str:
    try:
        train(folder, **changes)
    except Stopped as stop:
        return str(stop)
    return "not stopped"


def test_a_second_signal_does_not_wait(tmp_path, monkeypatch):
    monkeypatch.setattr("flowalign.interrupt.PATIENCE", -1.0)
    work = functools.partial(train, tmp_path / "run")
    twice = dying(dying(work, "update", 1, 0, signal.SIGTERM), "update", 1, 0, signal.SIGTERM)
    assert processes.killed(twice) == -signal.SIGTERM


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (3, 2)])
def test_it_goes_on_with_another_number_of_processes(before, after, tmp_path):
    """Stopped amid the rollouts, so that what each process held is shared out anew."""
    folder = tmp_path / "run"
    processes.run(1, tmp_path, functools.partial(train, tmp_path / "whole", optimizer=GENTLE))
    work = functools.partial(told, folder, optimizer=GENTLE)
    messages = processes.run(before, tmp_path, dying(work, "rollout", 2, 0, signal.SIGTERM))
    assert "-rollout-" in messages[0]
    processes.run(after, tmp_path, functools.partial(train, folder, optimizer=GENTLE))
    assert_close(folder, tmp_path / "whole")


@pytest.mark.parametrize("kind", BY_GRADIENT)
def test_a_run_by_gradient_goes_on_with_another_number_of_processes(kind, tmp_path):
    """Stopped between two optimizer steps of an epoch: the scores of the first are kept."""
    folder, changes = tmp_path / "run", {"kind": kind, "optimizer": GENTLE}
    processes.run(1, tmp_path, functools.partial(train, tmp_path / "whole", **changes))
    work = functools.partial(told, folder, **changes)
    processes.run(2, tmp_path, dying(work, "step", 3, 0, signal.SIGTERM))
    assert state_of(folder).part == 1
    processes.run(1, tmp_path, functools.partial(train, folder, **changes))
    assert_close(folder, tmp_path / "whole")


@pytest.mark.parametrize("kind", FORWARD)
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


def assert_close(folder: Path, other: Path, atol: float = 1e-6) -> None:
    """Equal but for the order in which gradients were added."""
    mine, theirs = (state_of(one) for one in (folder, other))
    for name, value in theirs.policy.items():
        torch.testing.assert_close(mine.policy[name], value, atol=atol, rtol=0)
    for row, same in zip(rows(folder), rows(other), strict=True):
        assert row.keys() == same.keys()
        for name, value in same.items():
            if name.startswith("rows/"):
                continue  # padding depends on the split
            assert row[name] == pytest.approx(value, abs=1e-4, rel=1e-3), name


def state_of(folder: Path) -> State:
    path = folder / "checkpoints" / checkpoint.names(folder / "checkpoints")[-1]
    shared, own = checkpoint.load(path)
    shared.pop("facts")
    return State.from_trees(shared, own, range(99), first=True)


def test_a_finished_run_is_left_as_it_is_and_more_epochs_go_on(tmp_path, capsys):
    job(tmp_path / "run", epochs=1).train()
    before = digest(tmp_path / "run")
    job(tmp_path / "run", epochs=1).train(resume=True)
    assert "has finished its 1 epochs" in capsys.readouterr().err
    assert digest(tmp_path / "run") == before
    job(tmp_path / "run", epochs=3).train(resume=True)
    job(tmp_path / "whole", epochs=3).train()
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


# `seconds` and `clock` are of the clock alone, `scaler` matters where a gradient overflows in fp16, and `skipped` where
# several optimizer steps in a row do: each has a test of its own below. `older`, `noise`, `rounds` and
# `kl_coef` are none of this trainer's.
APART = {"seconds", "clock", "scaler", "skipped", "older", "noise", "rounds", "kl_coef"}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped between the two optimizer steps of its second epoch; its best evaluation is that of its first."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    hard(folder.with_name("first"), epochs=1).train(report=False)
    TARGETS.clear()
    for row, text in zip(rows(folder.with_name("first") / "evaluations", "epoch-000001.jsonl"), HELD_OUT, strict=True):
        TARGETS[text] = row["total"]
    with pytest.MonkeyPatch.context() as patch:
        real, seen = Update._count_skipped, [0]

        def counted(self: Update, *arguments: Any) -> None:
            seen[0] += 1
            if seen[0] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            real(self, *arguments)

        patch.setattr(Update, "_count_skipped", counted)
        with pytest.raises(Stopped):
            hard(folder).train(resume=True)
    return folder


HELD_OUT = ["a green cross", "a star", "a circle"]
TARGETS: dict[str, float] = {}


def nearness(media: Media, prompts: Prompts) -> torch.Tensor:
    """How near a picture's redness is to what it was after one epoch."""
    wanted = torch.tensor([TARGETS.get(text, 0.0) for text in prompts.text])
    return -(jobs.redness(media, prompts) - wanted).abs()


def hard(folder: Path, epochs: int = 3) -> FlowGRPO:
    """Judged by another reward than it is trained on, so that the best policy is not the newest."""
    reward = as_reward(nearness if TARGETS else jobs.redness)
    return job(folder, epochs=epochs, evaluation=Evaluation(HELD_OUT, every=1, pictures=2, reward=reward))


def go_on(source: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> dict[str, str]:
    """The digest of a run that goes on from a changed record, or what it fails with."""
    shutil.copytree(source, folder)
    real = State.from_trees

    def changed(*trees: Any) -> State:
        state = real(*trees)
        change(state.__dict__)
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(State, "from_trees", changed)
        try:
            hard(folder).train(resume=True, report=False)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
    return digest(folder)


@pytest.fixture(scope="module")
def gone_on(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What it comes to when nothing is left out."""
    whole = go_on(stopped, tmp_path_factory.mktemp("whole") / "run", lambda held: None)
    assert "error" not in whole
    return whole


@pytest.mark.parametrize("name", [f.name for f in fields(State) if f.name not in APART])
def test_no_field_of_the_record_can_be_left_out(name, stopped, gone_on, tmp_path):
    fresh = getattr(State(), name)
    dropped = go_on(stopped, tmp_path / "dropped", lambda held: held.update({name: fresh}))
    assert dropped != gone_on, f"{name} changes nothing: it is not covered, or need not be kept"


def test_the_clock_goes_on(stopped, tmp_path):
    state = state_of(stopped)
    assert state.clock > 0
    assert state.seconds["rollout"] > 0
    whole = go_on(stopped, tmp_path / "whole", lambda held: held.update(clock=1000.0, seconds={"rollout": 500.0}))
    assert "error" not in whole
    told = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    after = [row for row in told if row["step"] == 2 and "reward" in row]
    assert after[0]["seconds"] > 1000
    assert after[0]["time/rollout"] >= 500


def test_steps_skipped_in_a_row_are_counted_over_a_stop(stopped, tmp_path):
    def outcome(skipped: int, folder: Path) -> str:
        shutil.copytree(stopped, folder)
        trainer = hard(folder)
        real = trainer.loss
        trainer.loss = lambda *arguments: real(*arguments) * torch.nan
        with pytest.MonkeyPatch.context() as patch:
            made = State.from_trees
            patch.setattr(State, "from_trees", lambda *trees: replace(made(*trees), skipped=skipped))
            with pytest.raises(ValueError, match="optimizer steps in a row") as error:
                trainer.train(resume=True, report=False)
        return str(error.value)

    assert "2 optimizer steps" in outcome(0, tmp_path / "0")
    assert "2 optimizer steps" in outcome(1, tmp_path / "1")
    assert json.loads((tmp_path / "0" / "events.jsonl").read_text().splitlines()[-1])["event"] == "start"
    assert len([*(tmp_path / "0" / "non_finite").glob("*.jsonl")]) == 2
    assert len([*(tmp_path / "1" / "non_finite").glob("*.jsonl")]) == 1


def test_the_loss_scale_is_kept(tmp_path):
    """fp16: the scale and its count of steps without overflow decide when gradients overflow next."""
    saved = job(tmp_path / "a")
    saved.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=3)
    saved.update(saved.collect(0))
    saved.optimizer.capture(saved.state)
    assert saved.state.scaler["_growth_tracker"] == 2
    restored = job(tmp_path / "b")
    restored.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
    restored.optimizer.restore(saved.state)
    assert restored.optimizer.scaler.state_dict() == saved.optimizer.scaler.state_dict()


def test_a_gradient_that_is_not_finite_is_skipped_counted_and_in_the_end_stops_the_run(tmp_path):
    folder = tmp_path / "run"
    trainer = job(folder, optimizer=Optimizer(1e-2, max_skipped=2))
    real = trainer.loss

    def broken(new: Any, *rest: Any) -> torch.Tensor:
        losses = real(new, *rest)
        return losses * torch.where(new.log_probs > new.log_probs.median(), torch.nan, 1.0)

    trainer.loss = broken
    before = {name: value.detach().clone() for name, value in trainer.model.trainable().items()}
    with pytest.raises(ValueError, match="3 optimizer steps in a row had a loss or gradient that is not finite"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.trainable().items())
    assert [row["skipped"] for row in rows(folder) if "reward" in row] == [2.0]
    told = [json.loads(line) for line in (folder / "non_finite" / "epoch-000000-step-0-process-0.jsonl").open()]
    assert {row["loss"] for row in told} == {"nan"}
    assert len(told) < 12  # those samples, not all
    assert (folder / "non_finite" / "epoch-000000-step-0-process-0.safetensors").exists()


def test_one_process_with_a_bad_gradient_is_every_process_s_decision(tmp_path):
    def work(rank: int) -> tuple[list[float], dict[str, Any]]:
        trainer = job(tmp_path / "run", epochs=2, optimizer=Optimizer(1e-2))
        real, calls = trainer.loss, [0]

        def broken(*arguments: Any) -> torch.Tensor:
            calls[0] += 1
            return real(*arguments) * (torch.nan if rank == 1 and calls[0] == 1 else 1.0)

        trainer.loss = broken
        trainer.train()
        policy = {name: value.detach().numpy() for name, value in trainer.model.trainable().items()}
        return trainer.optimizer.steps, policy

    (steps, policy), (others, same) = processes.run(2, tmp_path, work)
    assert steps == others == 3
    assert all((policy[name] == same[name]).all() for name in policy)
    assert [row["skipped"] for row in rows(tmp_path / "run") if "reward" in row] == [1.0, 0.0]


def test_every_optimizer_step_gets_an_equal_share_of_all_rows(tmp_path):
    trainer = job(tmp_path / "run", updates_per_epoch=3)
    batch: Batch = trainer.collect(0)
    parts = Update(trainer, batch, None)._parts(3)
    assert sorted(torch.cat(parts).tolist()) == [*range(8)]
    for start in (0, 3):
        assert all(((part >= start) & (part < start + 3)).sum() == 1 for part in parts)


def test_checkpoints_are_due_by_count_and_by_time(tmp_path, monkeypatch):
    made: list[str] = []
    real = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda folder, name, *rest: made.append(name) or real(folder, name, *rest))
    job(tmp_path / "a", checkpoints=Checkpoints(every=4, minutes=0), evaluation=job(tmp_path / "x").evaluation).train()
    assert [name for name in made if "evaluated" not in name] == []
    made.clear()
    job(tmp_path / "b", checkpoints=Checkpoints(every=0, minutes=1e-9), epochs=1).train()
    assert any("-rollout-" in name for name in made)
    assert any(name == "step-00000001" for name in made)


def test_what_replaces_a_broken_checkpoint_stays(tmp_path):
    """Without evaluation; the newest is damaged, and the run that goes on makes it anew under the same name."""
    folder = tmp_path / "run"
    settings = {"evaluation": Evaluation(), "epochs": 2}
    train(folder, **settings)
    newest = checkpoint.names(folder / "checkpoints")[-1]
    (folder / "checkpoints" / newest / "state.json").write_text("{}")
    train(folder, **settings)
    assert checkpoint.names(folder / "checkpoints")[-1] == newest
    assert checkpoint.verify(folder / "checkpoints" / newest) is None


def test_a_micro_batch_without_a_valid_score_is_left_out(tmp_path):
    """With the reference's pass, which is otherwise made for every micro-batch."""

    def half(media: Media, prompts: Prompts) -> torch.Tensor:
        scores = jobs.redness(media, prompts)
        return scores.where(torch.tensor(prompts.groups) > 0, torch.nan)

    trainer = job(tmp_path / "run", reward=half, on_invalid="drop", epochs=1, evaluation=Evaluation())
    trainer.train(report=False)
    (row,) = [row for row in rows(tmp_path / "run") if "reward" in row]
    assert row["invalid"] == 4
    assert row["reward_std_in_group"] > 0
    assert row["kl"] is not None


def smaller(folder: Path) -> FlowGRPO:
    sampling = replace(job(folder).sampling, batch_size=1)
    return job(folder, sampling=sampling)


def test_settings_that_change_amid_the_rollouts_make_them_anew(tmp_path):
    folder = tmp_path / "run"
    stop = dying(functools.partial(told, folder), "rollout", 2, 0, signal.SIGTERM)
    assert "-rollout-" in processes.run(1, tmp_path, stop)[0]
    with pytest.raises(ValueError, match=r"holds a run with another sampling; .*--allow-change sampling"):
        smaller(folder).train(resume=True)
    smaller(folder).train(resume=True, report=False, allow_change=["sampling"])
    assert [row["step"] for row in rows(folder) if "reward" in row] == [1, 2, 3]


def test_settings_cannot_change_between_two_steps_of_an_epoch(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    other = hard(tmp_path / "run")
    other.sampling = replace(other.sampling, guidance_scale=3.0)
    with pytest.raises(ValueError, match=r"let that epoch end with the old settings first \(--epochs 2\)"):
        other.train(resume=True, allow_change=["sampling"])
    with pytest.raises(ValueError, match="another updates_per_epoch, which no run can change"):
        job(tmp_path / "run", updates_per_epoch=1).train(resume=True, allow_change=["updates_per_epoch", "held_out"])


def test_fewer_epochs_end_the_one_in_hand_first(stopped, tmp_path):
    """Stopped in the second epoch, then asked for one: the second ends, is judged whole, and nothing is left open."""
    shutil.copytree(stopped, tmp_path / "run")
    hard(tmp_path / "run", epochs=1).train(resume=True, report=False)
    assert [row["step"] for row in rows(tmp_path / "run") if "held-out" in row] == [0, 1, 2]
    state = state_of(tmp_path / "run")
    assert (state.epoch, state.part) == (2, 0)


def test_a_run_without_its_checkpoints_is_not_written_over(tmp_path):
    job(tmp_path / "run", epochs=1).train(report=False)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="whose checkpoints/ has gone; move the run's folder away"):
        job(tmp_path / "run", epochs=1).train(resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_the_same_trainer_can_go_on_after_a_stop(tmp_path, monkeypatch):
    trainer = job(tmp_path / "run", epochs=1)
    monkeypatch.setattr(Update, "_backward", lambda *arguments: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped):
        trainer.train()
    monkeypatch.undo()
    trainer.train(resume=True, report=False)
    assert trainer.state.epoch == 1

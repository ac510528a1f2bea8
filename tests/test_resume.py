"""What a run keeps to be gone on with, each piece of it; what must not change on the way, and what may."""

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
from tests.interrupted import dying, slow_but, state_of, told, train
from tests.jobs import digest, job, rows
from trainers import Checkpoints, Evaluation, FlowGRPO, Optimizer
from trainers.batch import Batch
from trainers.state import State
from trainers.update import Update


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


FIELDS = [f.name for f in fields(State) if f.name not in APART]


@pytest.mark.parametrize("name", slow_but(["epoch", "part", "buffer", "average", "moments", "normalisers"], FIELDS))
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


def test_a_stop_after_settings_have_changed_saves_what_it_has(tmp_path):
    """At the same place as the stop before, whose checkpoint holds other settings and rollouts."""
    folder = tmp_path / "run"
    first = dying(functools.partial(told, folder), "rollout", 2, 0, signal.SIGTERM)
    (before,) = processes.run(1, tmp_path, first)

    def again(rank: int) -> str:
        try:
            smaller(folder).train(resume=True, report=False, allow_change=["sampling"])
        except Stopped as error:
            return str(error)
        return ""

    (after,) = processes.run(1, tmp_path, dying(again, "rollout", 2, 0, signal.SIGTERM))
    assert before == after, "one name for one place in a run"
    smaller(folder).train(resume=True, report=False)  # the settings are those saved
    smaller(tmp_path / "unbroken").train(report=False)
    assert digest(folder) == digest(tmp_path / "unbroken")


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

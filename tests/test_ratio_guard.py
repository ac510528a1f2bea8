"""The ratios of an epoch's first optimizer step: 1 in a healthy run, and made so where rollout and update differ."""

from __future__ import annotations

import functools
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.interrupt import Stopped
from flowalign.models.sd3 import SD3
from flowalign.records import join_steps
from flowalign.rollout import replay
from tests import processes
from tests.jobs import JOBS, digest, job, rows
from tests.tiny import tiny_sd3
from trainers import Evaluation, FlowGRPO, Optimizer
from trainers.batch import Batch
from trainers.update import Update

APART = 3e-3  # what a call with gradient differs by, as that of a kernel chosen by it would
GENTLE = Optimizer(3e-4, ema_decay=0.5, ema_every=1)
NO_EVALUATION = {"evaluation": Evaluation()}


class Fused(SD3):
    """A network that computes other numbers where it keeps what a backward pass needs."""

    def network(self, *arguments: Any, **named: Any) -> Tensor:
        made = super().network(*arguments, **named)
        return made * (1 + APART) if torch.is_grad_enabled() else made


def fused(folder: Path, kind: str = "flow_grpo", **changes: Any) -> Any:
    return JOBS[kind](folder, model=Fused(tiny_sd3(), max_sequence_length=0), **changes)


def by_hand(trainer: FlowGRPO, batch: Batch) -> Batch:
    """The batch with the log-probs of the network with gradient, in calls of the update's shape."""
    (part,), told, anew = batch.parts, batch.condition(trainer.model, range(len(batch.texts))), []
    for step in part.steps:
        calls = []
        for at in torch.arange(len(step.latents)).split(trainer.sampling.batch_size):
            taken, transition = step.rows(at), part.path.transitions[step.interval.index]
            made = replay(trainer.model, taken, transition, told.rows(at), trainer.policy)
            calls.append(replace(taken, log_probs=made.log_probs.detach()))
        anew.append(join_steps(calls))
    return replace(batch, steps=tuple(anew))


def test_a_healthy_run_is_the_same_to_the_last_bit_with_no_call_more(tmp_path):
    job(tmp_path / "on", epochs=1).train(report=False)
    job(tmp_path / "off", epochs=1, ratio_check="off").train(report=False)
    job(tmp_path / "exact", epochs=1, ratio_check="exact").train(report=False)
    assert digest(tmp_path / "on") == digest(tmp_path / "off") == digest(tmp_path / "exact")


def test_old_log_probs_are_those_of_the_updates_own_calls(tmp_path, capfd):
    off, on = fused(tmp_path / "off", ratio_check="off"), fused(tmp_path / "on")
    batch = off.collect(0)
    order = torch.arange(len(batch.texts))
    expected = off.update(by_hand(off, batch), order)
    assert expected["ratio_max"] > 0, "the second optimizer step moves on"
    found = on.update(on.collect(0), order)
    assert on.state.seen[0]["ratio_max"] == 0
    gap = found.pop("ratio_before_recompute")
    assert 1e-4 < gap < 1
    assert found == expected
    for name, value in on.model.trainable().items():
        assert torch.equal(value, off.model.trainable()[name])
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "ratio" in line]
    assert line.startswith(f"flowalign: the ratios of an epoch's first optimizer step are up to {gap:.2g} from 1, and ")
    assert "may be 0.0001: rollout and update do not compute the same numbers" in line


def test_without_the_guard_most_samples_would_be_clipped_before_anything_is_learnt(tmp_path):
    guided = replace(fused(tmp_path / "plain").sampling, guidance_scale=2.0)
    trainer = fused(tmp_path / "run", ratio_check="off", clip_range=1e-4, sampling=guided)
    trainer.update(trainer.collect(0))
    assert trainer.state.seen[0]["clip_fraction"] > 0.5


@pytest.mark.parametrize(
    ("check", "line"),
    [
        ("tolerance", r"from 1, and may be 0.0001 \(ratio_check: tolerance\)"),
        ("exact", r"from 1, and may be 0 \(ratio_check: exact\)"),
    ],
)
def test_it_stops_the_run_where_that_is_asked_for(check, line, tmp_path):
    with pytest.raises(ValueError, match=f"{line}: rollout and update .* find which, or set ratio_check: recompute"):
        fused(tmp_path / "run", ratio_check=check).train(report=False)


@pytest.mark.parametrize("kind", ["credit", "tree", "g2rpo", "euphonium", "guard"])
def test_the_first_ratios_are_one_of_every_kind_of_rollout(kind, tmp_path, monkeypatch, capfd):
    """Fans and trees, whose calls have other rows than there are samples, and rounds of samples; said once."""
    seen, real = list[float](), Update._accumulate

    def looked(self: Update, number: Tensor, watch: Any) -> Any:
        kept = real(self, number, watch)
        if self.trainer.state.part == 0:
            seen.append(watch.furthest())
        return kept

    monkeypatch.setattr(Update, "_accumulate", looked)
    trainer = fused(tmp_path / "run", kind, epochs=2, **NO_EVALUATION)
    trainer.train(report=False)
    assert seen[0] <= (trainer.clip_range / 10 if kind == "guard" else 0.0), "GRPO-Guard's old mean: of second order"
    told = [row["ratio_before_recompute"] for row in rows(tmp_path / "run")]
    assert len(told) == 2
    assert min(told) > trainer.ratio_guard.limit
    assert len([line for line in capfd.readouterr().err.splitlines() if "the ratios of" in line]) == 1
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").open()]
    assert len([row for row in events if row["event"] == "ratio"]) == 1


def test_a_run_that_is_stopped_between_two_steps_keeps_them(tmp_path, monkeypatch):
    fused(tmp_path / "whole", epochs=1).train(report=False)
    real, calls = Update._count_skipped, [0]

    def counted(self: Update, *arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, *arguments)

    monkeypatch.setattr(Update, "_count_skipped", counted)
    with pytest.raises(Stopped):
        fused(tmp_path / "run", epochs=1).train(report=False)
    monkeypatch.undo()
    fused(tmp_path / "run", epochs=1).train(report=False, resume=True)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def policy(folder: Path, rank: int = 0) -> dict[str, Any]:
    trainer = fused(folder, epochs=1, optimizer=GENTLE, **NO_EVALUATION)
    trainer.train(report=False)
    return {name: value.detach().numpy() for name, value in trainer.model.trainable().items()}


def test_processes_decide_it_together(tmp_path):
    (alone,) = processes.run(1, tmp_path, functools.partial(policy, tmp_path / "1"))
    for found in processes.run(2, tmp_path, functools.partial(policy, tmp_path / "2")):
        assert max(abs(found[name] - alone[name]).max() for name in alone) <= 1e-6

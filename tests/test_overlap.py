"""Scores beside rollouts: the same to the last bit, in order, never too many at once, and nothing is left behind."""

from __future__ import annotations

import functools
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowalign import interrupt
from flowalign.accounting import Meter
from flowalign.records import Media, Prompts, Scores
from flowalign.report.costs import beside, phases
from flowalign.report.reading import read_run
from rewards.base import FunctionReward, as_reward
from rewards.remote import RemoteReward
from tests import odd_rewards, processes
from tests.interrupted import dying, told, train
from tests.jobs import BY_GRADIENT, JOBS, digest, rows
from tests.processes import run as on_processes
from tests.test_reward_remote import honest, served
from trainers import Evaluation, Sampling
from trainers.base import Trainer
from trainers.overlap import Answer, Asked, Scoring, at_once
from trainers.state import Collected

ROLLED_OUT = [kind for kind in JOBS if kind not in (*BY_GRADIENT, "pairs")]


@functools.cache
def sampling_of(kind: str) -> Sampling:
    return JOBS[kind](Path("nowhere")).sampling


def made(kind: str, folder: Path, overlap: int | None, **changes: Any) -> Trainer:
    return JOBS[kind](folder, sampling=replace(sampling_of(kind), overlap=overlap), **changes)


def slowly(*values: Any) -> list[Any]:
    return [pytest.param(*value if isinstance(value, tuple) else (value,), marks=pytest.mark.slow) for value in values]


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def assert_same(mine: list[Collected], theirs: list[Collected]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one.scores.total, other.scores.total)
        assert list(one.scores.parts) == list(other.scores.parts)
        for name, value in other.scores.parts.items():
            assert torch.equal(one.scores.parts[name], value), name
        assert torch.equal(one.scores.valid, other.scores.valid)
        for step, same in zip(one.steps, other.steps, strict=True):
            assert torch.equal(step.latents_next, same.latents_next)


@pytest.mark.parametrize("kind", ["credit", "dense_grpo", "g2rpo", *slowly("flow_grpo", "tree", "nft")])
def test_scores_beside_the_rollouts_are_the_same_to_the_last_bit(kind, tmp_path):
    """With a reward that draws from all global generators, while rollouts go on."""
    found = []
    for overlap in (0, 2):
        trainer = made(kind, tmp_path / str(overlap), overlap, reward=FunctionReward(odd_rewards.drawing))
        before = threads()
        found.append(trainer.fill(trainer.collection.epoch(0), None, clean=kind == "nft"))
        assert threads() == before
        assert list(trainer.state.buffer) == list(trainer.mine(trainer.collection.epoch(0)))
        assert ("beside/reward" in trainer.state.seconds) == (overlap > 0)
    assert len(found[0]) > 1
    assert_same(found[1], found[0])


@pytest.mark.parametrize("kind", [kind for kind in ROLLED_OUT if kind not in ("euphonium", "credit", "rwr", "nft")])
def test_what_runs_beside_a_reward_draws_from_no_global_generator(kind, tmp_path, monkeypatch):
    """Neither openly nor within a fork of the state, which a reward in another thread would see."""
    trainer = made(kind, tmp_path, 0)
    epoch, looked = trainer.collection.epoch(0), list[str]()
    for owner, name in ((torch.random, "fork_rng"), (torch, "manual_seed"), (torch, "set_rng_state")):
        monkeypatch.setattr(owner, name, lambda *given, name=name: looked.append(name))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    trainer.collection.begin(epoch, 0, lambda asked, work: lambda: pytest.fail("asked"))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert looked == []


def test_calls_and_rows_are_counted_once_and_seconds_told_apart(tmp_path):
    def slow(media: Media, prompts: Prompts) -> torch.Tensor:
        time.sleep(0.05)
        return odd_rewards.drawing(media, prompts)

    spent, calls = {}, []
    for overlap in (0, 2):
        trainer = made(
            "flow_grpo", tmp_path / str(overlap), overlap, reward=as_reward(slow), epochs=1, evaluation=Evaluation(None)
        )
        real = trainer.model.meter.count
        calls.append(0)

        def counted(kind: str, real: Callable[[str], None] = real) -> None:
            calls[-1] += kind == "decode"
            real(kind)

        trainer.model.meter.count = counted
        trainer.train(report=False)
        spent[overlap] = read_run(trainer.folder)
    assert calls[0] == calls[1] > 0
    assert rows(tmp_path / "0") == rows(tmp_path / "2")  # rows of network calls among them
    alone, overlapped = ({phase.name: phase for phase in phases(spent[overlap])} for overlap in (0, 2))
    (reward,) = beside(spent[2])
    assert (reward.name, beside(spent[0])) == ("reward", ())
    assert reward.seconds > 4 * 0.05  # four micro-batches
    assert alone["reward"].seconds > 4 * 0.05
    assert overlapped["reward"].seconds < reward.seconds  # the run stood still for less than they took
    assert sum(phase.share for phase in overlapped.values()) == pytest.approx(1)


PROMPTS = Prompts(("a", "b"), ({}, {}))
SCORES = Scores(torch.tensor([1.0, 2.0]), {}, torch.ones(2, dtype=torch.bool))


def test_an_answer_is_taken_for_no_other_question():
    asked = Asked.about(PROMPTS, "reward", 4, 2)
    assert Answer(asked, SCORES).to(asked) is SCORES
    for other in (
        Asked.about(PROMPTS, "reward", 4, 3), Asked.about(PROMPTS, "reward", 5, 2),
        Asked.about(PROMPTS, "completion_reward", 4, 2), Asked.about(PROMPTS.rows([1, 0]), "reward", 4, 2),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"asked about the 2 samples of micro-batch 2 of epoch 4 .* that to the 2"):
            Answer(other, SCORES).to(asked)
    with pytest.raises(ValueError, match=r"micro-batch 2 of epoch 4 .*, and gave 1 scores"):
        at_once(Meter())(asked, lambda: SCORES.rows([0]))


def test_answers_that_come_in_another_order_are_seen(monkeypatch):
    with Scoring(2, 1, Meter(), {}) as scoring:
        later = [scoring.ask(Asked.about(PROMPTS, "reward", 0, index), lambda: SCORES) for index in range(2)]
        swapped = [future.result() for future in scoring._under_way]
        monkeypatch.setattr("concurrent.futures.Future.result", lambda self: swapped[1])
        with pytest.raises(ValueError, match=r"micro-batch 0 of epoch 0 .* micro-batch 1 of epoch 0"):
            later[0]()


@pytest.mark.parametrize(("ahead", "calls"), [(1, 1), (2, 1), (3, 2)])
def test_the_queue_is_bounded_and_taken_in_order(ahead, calls):
    taken, begun, running, most = dict[int, Collected](), 0, 0, [0, 0]
    turn = threading.Lock()

    def work() -> Scores:
        nonlocal running
        with turn:
            running += 1
            most[0] = max(most[0], running)
        time.sleep(0.003 * random.random())
        with turn:
            running -= 1
        return SCORES

    with Scoring(ahead, calls, Meter(), taken) as scoring:
        for index in range(12):
            scores = scoring.ask(Asked.about(PROMPTS, "reward", 0, index), work)
            begun += 1
            scoring.add(index, lambda scores=scores: Collected((), scores()))
            most[1] = max(most[1], begun - len(taken))
        scoring.drain()
    assert list(taken) == [*range(12)]
    assert most == [calls, ahead]


def failing(after: int) -> Callable[[Media, Prompts], torch.Tensor]:
    seen = [0]

    def reward(media: Media, prompts: Prompts) -> torch.Tensor:
        seen[0] += 1
        if seen[0] > after:
            raise ValueError(f"call {seen[0]} has no score")
        return odd_rewards.drawing(media, prompts)

    return reward


def test_a_reward_that_fails_beside_stops_the_run_as_it_would_before_it(tmp_path):
    before, said = threads(), []
    for overlap in (0, 3):
        trainer = made("flow_grpo", tmp_path / str(overlap), overlap, reward=failing(2), evaluation=Evaluation(None))
        with pytest.raises(ValueError, match="call 3 has no score") as error:
            trainer.train(report=False)
        said.append(str(error.value))
        assert threads() == before
        assert list(trainer.state.buffer) == [0, 1][: len(trainer.state.buffer)]
    assert said[0] == said[1]


def test_a_later_failure_does_not_wait_for_an_earlier_answer():
    def wait() -> Scores:
        release.wait(20)
        return SCORES

    def fail() -> Scores:
        raise ValueError("no score")

    def ask_both(scoring: Scoring) -> None:
        try:
            for index, work in enumerate((wait, fail)):
                scores = scoring.ask(Asked.about(PROMPTS, "reward", 0, index), work)
                scoring.add(index, lambda scores=scores: Collected((), scores()))
            scoring.drain()
        finally:
            seconds.append(time.monotonic() - started)
            release.set()

    release, started, seconds = threading.Event(), time.monotonic(), list[float]()
    with Scoring(2, 2, Meter(), {}) as scoring, pytest.raises(ValueError, match="no score"):
        ask_both(scoring)
    assert seconds[0] < 10


def fails_on_one(folder: Path, rank: int) -> None:
    reward = failing(1) if rank else odd_rewards.drawing
    try:
        made("flow_grpo", folder, 2, reward=reward, evaluation=Evaluation(None)).train(report=False)
    except (ValueError, OSError) as error:
        raise RuntimeError(f"{error} | {sorted(threads())}") from error


def test_it_stops_all_processes(tmp_path):
    with pytest.raises(RuntimeError, match=r"call 2 has no score|process has gone") as error:
        on_processes(2, tmp_path, functools.partial(fails_on_one, tmp_path / "run"), 30)
    assert "flowalign-score" not in str(error.value)


@pytest.mark.parametrize(("world", "overlap"), [(1, 2), *slowly((2, 1))])
def test_a_signal_amid_scores_saves_what_is_whole_and_the_run_comes_to_the_same(world, overlap, tmp_path, unbroken):
    folder, changes = tmp_path / "run", {"sampling": replace(sampling_of("flow_grpo"), overlap=overlap)}
    stopped = dying(functools.partial(told, folder, **changes), "rollout", 6 if world == 1 else 3, 0, signal.SIGTERM)
    messages = processes.run(world, tmp_path, stopped)
    assert all(f"stopped by SIGTERM; all is saved in {folder}" in message for message in messages)
    assert any("-rollout-" in name.name for name in (folder / "checkpoints").iterdir())
    processes.run(world, tmp_path, functools.partial(train, folder))  # without overlap: it may change
    assert digest(folder) == unbroken(world)


@pytest.mark.slow
def test_a_run_that_is_killed_amid_a_score_comes_to_the_same(tmp_path, unbroken):
    changes = {"sampling": replace(sampling_of("flow_grpo"), overlap=2)}
    work = functools.partial(train, tmp_path / "run", **changes)
    assert processes.killed(dying(work, "reward", 14, 0, signal.SIGKILL)) == -signal.SIGKILL
    assert processes.killed(work) == 0
    assert digest(tmp_path / "run") == unbroken(1)


def interrupted_twice(folder: Path, rank: int = 0) -> str:
    """The first signal is noted, the second one acts, while a score is awaited."""
    interrupt.PATIENCE = -1.0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the workers of pytest-xdist ignore

    def slow(media: Media, prompts: Prompts) -> torch.Tensor:
        time.sleep(0.3)
        signal.raise_signal(signal.SIGINT)  # a thread's: python runs the handler in the main one, when that comes to it
        while not trainer.stop.asked:
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.2)
        return odd_rewards.drawing(media, prompts)

    trainer = made("flow_grpo", folder, 2, reward=as_reward(slow), evaluation=Evaluation(None))
    try:
        trainer.train(report=False)
    except KeyboardInterrupt as stop:
        return f"{type(stop).__name__} {sorted(threads())}"
    return "nothing"


def test_ctrl_c_twice_leaves_no_thread(tmp_path):
    (said,) = on_processes(1, tmp_path, functools.partial(interrupted_twice, tmp_path / "run"))
    assert said.startswith("KeyboardInterrupt ")
    assert "flowalign" not in said


def test_a_remote_reward_is_asked_several_times_at_once_by_default(tmp_path):
    """By a server that answers when so many ask: as many as may be in flight, and the scores are in their places."""
    busy, turn = [0], threading.Condition()

    def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with turn:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
            turn.notify_all()
            turn.wait_for(lambda: most[0] >= wanted, 10)
        honest(handler, body)
        with turn:
            busy[0] -= 1

    found = list[list[Collected]]()
    with served(answer) as (url, seen):
        for overlap, wanted in ((0, 2), (None, 3)):  # a micro-batch has two samples
            most = [0]
            trainer = made("flow_grpo", tmp_path, overlap, reward=RemoteReward(url, batch_size=1, in_flight=3))
            found.append(trainer.fill(trainer.collection.epoch(0), None))
            assert most == [wanted]
    assert len(seen) == 16
    assert_same(found[1], found[0])


def test_the_default_is_none_where_a_reward_computes_here_and_its_own_number_elsewhere(tmp_path):
    remote = RemoteReward("http://localhost:1", in_flight=3)
    assert made("flow_grpo", tmp_path, None).ahead() == 0
    assert made("flow_grpo", tmp_path, None, reward=remote).ahead() == 3
    assert made("flow_grpo", tmp_path, None, reward=remote + FunctionReward(odd_rewards.drawing)).ahead() == 0
    assert made("flow_grpo", tmp_path, 0, reward=remote).ahead() == 0
    assert made("g2rpo", tmp_path, None, reward=0.5 * remote).ahead() == 3
    assert made("euphonium", tmp_path, None).ahead() == 0


@pytest.mark.parametrize(("kind", "reason"), [
    ("draft", "goes back through a score before a next rollout"), ("euphonium", "rollouts ask a reward themselves"),
    ("pairs", "stored pairs are not scored"),
])  # fmt: skip
def test_what_has_nothing_to_overlap_says_so(kind, reason, tmp_path):
    with pytest.raises(ValueError, match=f"sampling.overlap is 1, but .*{reason}.*leave it out"):
        made(kind, tmp_path, 1)
    with pytest.raises(ValueError, match=r"sampling\.overlap must be at least 0, got -1"):
        Sampling(overlap=-1)

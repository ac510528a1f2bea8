"""What goes wrong by itself in a run: each fault passes, or ends in one line that says what, where and what to do."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign import determinism, distributed, watchdog
from flowalign.accounting import Meter
from flowalign.cli import main
from flowalign.config import load_yaml
from flowalign.models.sd3 import SD3
from flowalign.out_of_memory import CallSize, OutOfMemory, explained, out_of_memory
from flowalign.prompts import as_prompts
from flowalign.records import Media, Prompts, Scores
from flowalign.schedules import AllSteps
from flowalign.tracking import Run
from flowalign.transitions import FlowSDE
from rewards.base import Card, FunctionReward, Reward, as_reward, simple_scores
from tests import jobs, processes
from tests.jobs import job, rows
from tests.launched import Ended, launched
from trainers import Evaluation, Sampling

TINY = [
    "--epochs=1", "--sampling.groups=2", "--sampling.group_size=4", "--sampling.batch_size=4", "--sampling.steps=3",
    "--prompts.count=8", "--evaluation.prompts=null", "--reward=rewards.JPEGCompressibility",
]  # fmt: skip
HOST = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


def told_of(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """The one line of an error that a command says; all else of it is looked at too."""
    capsys.readouterr()
    assert main([*words]) == code
    told = capsys.readouterr().err
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("flowalign: error: ")]
    return line.removeprefix("flowalign: error: ")


# --- memory


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), True),
        (RuntimeError(f"{HOST} 4 bytes."), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_running_out_of_memory_looks_like(error, found):
    assert out_of_memory(error) == found


def narrow(real: Callable[..., Any], most: int, error: Exception, sizes: list[int]) -> Callable[..., Any]:
    """A call that only so many rows fit."""

    def call(first: Any, *rest: Any, **named: Any) -> Any:
        sizes.append(len(first))
        if len(first) > most:
            raise error
        return real(first, *rest, **named)

    return call


PLAN = AllSteps(FlowSDE(0.7))
WIDE = {"sampling": Sampling(PLAN, 2, 8, batch_size=8, rows_per_call=8, steps=3, guidance_scale=2.0)}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(HOST), MemoryError()])
def test_decodes_are_halved_for_good_and_said_once(error, tmp_path, monkeypatch, capfd):
    plain = job(tmp_path / "a", **WIDE, epochs=1)
    expected = plain.collect(0).scores.total
    trainer, sizes = job(tmp_path / "b", **WIDE, epochs=1), list[int]()
    monkeypatch.setattr(trainer.model, "decode", narrow(trainer.model.decode, 3, error, sizes))
    torch.testing.assert_close(trainer.collect(0).scores.total, expected, rtol=1e-5, atol=1e-5)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2], "and the second micro-batch is not tried whole again"
    lines = [line for line in capfd.readouterr().err.splitlines() if "memory" in line]
    assert lines == ["flowalign: out of memory in decoding 8 samples at once: 2 at a time from now on"]


def test_rewards_are_halved_for_good_and_said_once(tmp_path, capfd):
    sizes = list[int]()
    error = torch.OutOfMemoryError("CUDA out of memory.")
    reward = FunctionReward(narrow(jobs.redness, 3, error, sizes))
    expected = job(tmp_path / "a", **WIDE, reward=as_reward(jobs.redness)).collect(0).scores.total
    found = job(tmp_path / "b", **WIDE, reward=reward).collect(0).scores.total
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    lines = [line for line in capfd.readouterr().err.splitlines() if "memory" in line]
    assert lines == ["flowalign: out of memory in scoring by call 8 samples at once: 2 at a time from now on"]


def test_a_single_sample_that_does_not_fit_stops_the_run():
    def call(rows: range) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(OutOfMemory, match=r"^out of memory in decoding a single sample: lower this$"):
        CallSize("decoding", "lower this").apart(8, 8, call)


class Rank(Reward):
    """Of each sample within its group: nothing of it can be scored alone."""

    name, card = "rank", Card(modality="any", scope="group")

    def score(self, media: Media, prompts: Prompts) -> Scores:
        if len(media) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return simple_scores(self.name, media.pixels.flatten(1).mean(1).argsort().argsort().float())


def test_what_compares_samples_is_not_split(tmp_path):
    with pytest.raises(OutOfMemory, match=r"^out of memory in reward: lower sampling.batch_size \(and sampling.group_"):
        job(tmp_path / "run", **WIDE, reward=Rank()).collect(0)
    fits = Sampling(PLAN, 2, 4, batch_size=4, rows_per_call=4, steps=3, guidance_scale=2.0)
    assert job(tmp_path / "b", reward=Rank(), sampling=fits).collect(0).scores.valid.all()


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("velocity_split", "in rollout: lower sampling.batch_size or sampling.rows_per_call"),
        ("loss", "in update: lower sampling.batch_size, or take model.gradient_checkpointing"),
        ("evaluation", "in evaluation: lower sampling.rows_per_call"),
    ],
)
def test_where_nothing_can_be_halved_the_line_says_what_to_lower(place, line, tmp_path, monkeypatch):
    def full(*arguments: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer = job(tmp_path / "run", epochs=1, **({} if place == "evaluation" else {"evaluation": Evaluation()}))
    owner, name = (trainer, place) if place == "loss" else (trainer.model, place.replace("evaluation", "velocity"))
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(OutOfMemory, match=f"^out of memory {line}"):
        trainer.train()


def test_no_memory_for_the_model_itself_is_one_line(capsys, monkeypatch, tmp_path):
    def full(*arguments: Any) -> None:
        raise RuntimeError(f"{HOST} 16106127360 bytes. Error code 12 (Cannot allocate memory)")

    monkeypatch.setattr(SD3, "prepare", full)
    line = told_of(capsys, 2, "train", "flow_grpo/shapes", "--folder", str(tmp_path / "run"), *TINY)
    assert line.startswith("out of memory: take model.memory (offload, quantize")
    assert not (tmp_path / "run").exists()


def test_another_error_of_torch_is_ours_and_has_its_traceback(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), explained("rollout"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


# --- several processes


def hang(seconds: float, at: int = 1) -> Callable[[int], None]:
    """The second process sleeps in its reward."""

    def change(rank: int) -> None:
        from rewards import JPEGCompressibility

        os.environ["FLOWALIGN_TIMEOUT"] = "3"
        if rank == at:
            JPEGCompressibility.score = lambda *arguments: time.sleep(seconds)  # type: ignore[method-assign]

    return change


def error_of(ended: Ended) -> str:
    assert "Traceback" not in ended.said, ended.said
    (line,) = [line for line in ended.said.splitlines() if "error: " in line]
    return line


def train(tmp_path: Path, *words: str) -> list[str]:
    return ["train", "flow_grpo/shapes", "--folder", str(tmp_path / "run"), *TINY, *words]


def test_a_process_that_hangs_is_named_with_what_it_does(tmp_path):
    first, _ = launched(tmp_path, train(tmp_path), hang(60), leave=[1])
    assert first.code == 2
    early = [line for line in first.said.splitlines() if "has waited for" in line]
    assert len(early) == 1
    assert re.match(r"flowalign: process 0 has waited for \d s: process 1 has been in reward for \d s$", early[0])
    line = error_of(first)
    assert line.startswith("flowalign: error: waited for 3 s: process 1 has been in reward for ")
    assert "where it is only slow, set FLOWALIGN_TIMEOUT to more seconds" in line


def test_the_process_that_keeps_the_notes_is_named_where_it_hangs_itself(tmp_path):
    """Stopped whole, so that nothing of it answers, as if its host were gone."""

    def change(rank: int) -> None:
        from rewards import JPEGCompressibility

        os.environ["FLOWALIGN_TIMEOUT"] = "3"
        if rank == 0:
            JPEGCompressibility.score = lambda *arguments: os.kill(os.getpid(), signal.SIGSTOP)  # type: ignore

    shared = [word for word in train(tmp_path) if "batch_size" not in word] + ["--sampling.batch_size=1"]
    _, second = launched(tmp_path, shared, change, leave=[0])
    assert second.code == 2, "and it ends by itself"
    silent = r"process 0, which keeps the notes of all, does not answer; this one was \w+"
    early = [line for line in second.said.splitlines() if "has waited for" in line]
    assert all(re.search(f"process 1 has waited for \\d+ s: {silent}", line) for line in early)
    assert re.search(f"error: waited for 3 s: {silent}.*; where it is only slow, set FLOWALIGN", error_of(second))


class Silent:
    """A store that takes notes, and answers nothing until it is told to."""

    def __init__(self) -> None:
        self.taken, self.answers = list[str](), threading.Event()

    def set(self, name: str, value: str) -> None:
        self.taken.append(value)

    def check(self, names: list[str]) -> bool:
        return not self.answers.wait(60)


def test_no_process_waits_for_a_store_that_does_not_answer(monkeypatch):
    """To note something neither, while another thread's question is open; once it answers all is as before."""
    monkeypatch.setattr(watchdog, "ANSWERED_IN", 0.05)
    store = Silent()
    watch = watchdog.Watchdog(store, 1, 2, 600)
    try:
        watch.enter("reward")
        told = "process 0, which keeps the notes of all, does not answer; this one was in reward"
        assert [watch.blamed(gone) for gone in (False, True)] == [told, told]
        watch.write("left out")
        store.answers.set()
        while watch.notes() is None:
            time.sleep(0.01)
        watch.write("noted")
    finally:
        watch.close()
    noted = [(doing, failed) for doing, _, failed in map(json.loads, store.taken)]
    assert noted == [("starting", ""), ("reward", ""), ("reward", "noted")]


def test_what_one_process_fails_with_is_said_by_all(tmp_path):
    def change(rank: int) -> None:
        if rank == 1:
            SD3.decode = lambda *arguments: torch.empty(2**60)  # type: ignore[method-assign]

    first, second = launched(tmp_path, train(tmp_path), change)
    assert (first.code, second.code) == (2, 2)
    said = "out of memory in decoding a single sample: lower sampling.batch_size"
    assert error_of(second).startswith(f"flowalign: process 1: error: {said}")
    assert error_of(first).startswith(f"flowalign: error: process 1: {said}")


def test_a_process_that_is_killed_is_named(tmp_path):
    def change(rank: int) -> None:
        from rewards import JPEGCompressibility

        if rank == 1:
            JPEGCompressibility.score = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore

    first, second = launched(tmp_path, train(tmp_path), change)
    assert (first.code, second.code) == (2, -signal.SIGKILL)
    assert error_of(first).startswith("flowalign: error: process 1 has gone, in reward")


def phases(rank: int) -> list[tuple[int, str]]:
    """What is noted of the others at each moment, between exchanges that keep all in step."""
    found, watch = [], watchdog._Here.present
    assert watch is not None

    def look() -> None:
        distributed.largest([0.0])
        found.extend((note.rank, note.doing) for note in watch.notes() or [])
        distributed.largest([0.0])

    meter = Meter()
    with meter.phase("update"):
        with meter.phase("reward"):
            look()
        time.sleep(0.05)
        look()
    look()
    return found


def test_notes_say_the_innermost_phase(tmp_path):
    seen = processes.run(2, tmp_path, phases)
    told = [doing for _, doing in seen[0] if doing != watchdog.WAITING]
    assert set(told) <= {"reward", "update", watchdog.BETWEEN}
    assert {rank for rank, _ in seen[0]} == {1}


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan", "inf"])
def test_a_patience_that_is_no_number_of_seconds(text):
    with pytest.raises(ValueError, match=f"FLOWALIGN_TIMEOUT has to be a number of seconds, at least 1, got '{text}'"):
        distributed.patience({"FLOWALIGN_TIMEOUT": text})
    assert distributed.patience({}) == 600


def taken(environ: dict[str, str]) -> str:
    """What a process is told where its meeting place is not to be had."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "MEETING", timedelta(seconds=1))
        try:
            distributed.start(environ)
        except distributed.LostProcess as error:
            return str(error)
    return "met"


def test_a_port_that_is_taken_and_processes_that_do_not_come():
    """Of a run that is still going on, or of one that has left only one process behind."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        line = taken(told)
        assert line.startswith(f"the 2 processes did not meet at tcp://127.0.0.1:{port}: ")
        assert "\n" not in line
    started = time.monotonic()
    assert taken(told).startswith("the 2 processes did not meet at tcp://")  # the other one never comes
    assert time.monotonic() - started < 30


# --- rewards


def constant(media: Media, prompts: Prompts) -> Tensor:
    return torch.full((len(media),), 0.25)


def test_rewards_that_are_all_equal_teach_nothing_and_are_counted(tmp_path):
    """Without a KL no call is made for them, and no number is broken."""
    trainer = job(tmp_path / "run", reward=as_reward(constant), kl_coef=0.0, epochs=1, evaluation=Evaluation())
    trainer.train(report=False)
    (row,) = rows(tmp_path / "run")
    assert (row["equal_groups"], row["reward_std_in_group"], row["grad_norm"], row["rows/gradient"]) == (1.0, 0, 0, 0)
    assert all(value.isfinite().all() for value in trainer.model.trainable().values())


def test_a_reward_server_that_is_down(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    reward = f"{{class: rewards.RemoteReward, url: '{url}', budget: 1.0, retries: 1}}"
    words = [word for word in TINY if not word.startswith("--reward")]
    line = told_of(
        capsys, 2, "train", "flow_grpo/shapes", "--folder", str(tmp_path / "run"), *words, "--reward", reward
    )
    assert line.startswith(f"reward server {url}: no connection (Connection refused): is it running?; gave up after ")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


# --- data


def test_prompts_that_are_the_same_are_groups_of_their_own(tmp_path):
    """Told apart by their place: neither by text nor by a hash of it."""
    trainer = job(tmp_path / "run", prompts=["a red circle"] * 3)
    batch = trainer.collect(0)
    assert batch.group_ids.tolist() == [0] * 4 + [1] * 4
    assert len({*batch.scores.total.tolist()}) == 8, "each has noise of its own"


LONG = "a red circle " * 8000
STRANGE = [
    "\u05d0\u05d3\u05d5\u05dd \u0645\u0631\u0628\u0639", "\U0001f98a\u200d\U0001f525 x", "a\u0301\u0323 \u2028 b", LONG,
    "\t x", "\x00 x",
]  # fmt: skip


def test_any_text_is_a_prompt(tmp_path):
    """Right to left, joined emoji, combining marks, 100,000 characters, control characters; from a file too."""
    lines = "\n".join(json.dumps({"prompt": text}) for text in STRANGE)
    (tmp_path / "p.jsonl").write_text(lines)
    assert as_prompts(str(tmp_path / "p.jsonl")).all().text == tuple(STRANGE)
    told = job(tmp_path / "run").model.encode(STRANGE)
    assert told.prompt_embeds.isfinite().all()
    assert len({row.numpy().tobytes() for row in told.prompt_embeds}) == len(STRANGE), "told apart"


# --- determinism


@pytest.fixture
def plain() -> Iterator[None]:
    """Back to how torch was."""
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop(determinism.WORKSPACE, None)


@pytest.mark.usefixtures("plain")
def test_a_deterministic_run_says_so_and_writes_it_down(tmp_path, capsys):
    capsys.readouterr()
    assert main(train(tmp_path, "--deterministic=true")) == 0
    assert f"flowalign: {determinism.COST}" in capsys.readouterr().err
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ[determinism.WORKSPACE] == ":4096:8"
    assert load_yaml(tmp_path / "run" / "config.yaml")["deterministic"] is True
    torch.use_deterministic_algorithms(False)
    again = ["train", str(tmp_path / "run" / "config.yaml"), "--folder", str(tmp_path / "again")]
    assert main(again) == 0
    assert torch.are_deterministic_algorithms_enabled(), "what a run writes down repeats it"
    assert rows(tmp_path / "again") == rows(tmp_path / "run")


@pytest.mark.usefixtures("plain")
def test_an_operation_without_a_deterministic_form_is_one_line(tmp_path, capsys, monkeypatch):
    def anyhow(*arguments: Any) -> Any:
        return torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))

    monkeypatch.setattr(SD3, "decode", anyhow)
    line = told_of(capsys, 2, *train(tmp_path, "--deterministic=true"))
    assert line.startswith("put_ has no deterministic form on this device: leave deterministic: true out")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--deterministic=perhaps"], "deterministic: expected true or false, got 'perhaps'"),
        (
            ["--deterministic=true", "--model.memory={attention: flash}"],
            "deterministic: the backward pass of",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "check"])
def test_what_cannot_be_deterministic_is_told_before_a_model_is_loaded(command, words, line, tmp_path, capsys):
    asked = ["flow_grpo/shapes", "--folder", str(tmp_path / "run"), "--model.pipeline", "./no-such-model", *words]
    assert line in told_of(capsys, 2, command, *asked)


# --- another machine


def test_other_libraries_are_told_when_a_run_goes_on(tmp_path, capsys):
    Run(tmp_path).close()
    path = tmp_path / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch": "1.0"}))
    capsys.readouterr()
    Run(tmp_path, resume=True).close()
    line = "the run goes on with something else than it was made with, so not to the last bit: torch 1.0 then, "
    assert capsys.readouterr().err == f"flowalign: {line}{torch.__version__} now\n"
    events = [json.loads(row) for row in (tmp_path / "events.jsonl").open()]
    assert [row["detail"].startswith(line) for row in events if row["event"] == "environment"] == [True]
    Run(tmp_path, resume=True).close()
    path.write_text("{")
    Run(tmp_path, resume=True).close()
    assert capsys.readouterr().err == (
        f"flowalign: {path} cannot be read: whether the run goes on with what it was made with is not known\n"
    )

"""A reward in a process of its own: the same numbers, one line for what goes wrong, and no process left behind."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flowalign.config import ConfigError, build, resolve
from flowalign.randomness import keyed_globals
from flowalign.records import Media, Prompts
from rewards.base import FunctionReward, Reward, WeightedSum
from rewards.placed import OnDevice
from rewards.process import OwnProcess, ending
from tests import odd_rewards, processes
from tests.jobs import digest, job
from trainers import Evaluation, Sampling

ODD = "tests.odd_rewards.odd"


@pytest.fixture(scope="module")
def own() -> Iterator[OwnProcess]:
    with ending(reward := OwnProcess(ODD)):
        yield reward


def asked(*texts: str) -> tuple[Media, Prompts]:
    pixels = torch.rand(len(texts), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return Media(pixels), Prompts(texts, tuple({"weight": i} for i in range(len(texts))))


def draws() -> tuple[float, ...]:
    return random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(torch.randn(()))


def test_it_scores_and_draws_as_it_would_here(own):
    """Two calls of three pictures, and what the generators give after them."""
    found = []
    for reward in (own, FunctionReward(odd_rewards.odd)):
        with keyed_globals(3, "reward", 7):
            scores = [reward(*asked("a", "b", "c")) for _ in range(2)]
            found.append((scores, draws()))
    (there, after), (here, same) = found
    assert after == same
    for one, other in zip(there, here, strict=True):
        assert one.total.equal(other.total)
        assert one.parts["odd"].equal(other.parts["odd"])
    assert not there[0].total.equal(there[1].total)
    assert (own.name, own.card, own.ahead, own.differentiable) == ("odd", FunctionReward.card, 1, False)


def test_all_that_a_reward_is_told_comes_through(own, capfd):
    media, prompts = asked("told", "b")
    pictures = torch.rand(2, 3, 4, 4)
    whole = replace(media, pixels=media.pixels[:, None], fps=8.0, references=(pictures, pictures))
    assert own(whole, replace(prompts, groups=(4, 4))).total.tolist() == [8.0, 9.0]
    talking = own(*asked("talk"))  # what it prints is no part of an answer
    assert len(talking) == 1
    said = capfd.readouterr()
    assert "to no one" not in said.out


@pytest.mark.parametrize(("prompt", "kind", "message"), [
    ("refuse x", ValueError, "^no score for x$"),
    ("fail x", ValueError, "process of the reward odd has failed, its traceback stands above: KeyError: 'x'"),
    ("memory", ValueError, "out of memory in scoring by odd a single sample"),
])  # fmt: skip
def test_what_a_reward_raises_is_one_line_and_the_process_stays(own, prompt, kind, message):
    before = own._worker.process.pid
    with pytest.raises(kind, match=message) as error:
        own(*asked(prompt))
    assert "\n" not in str(error.value)
    assert len(own(*asked("a"))) == 1
    assert own._worker.process.pid == before


def test_a_process_that_dies_is_named_with_its_exit_code(own):
    own._worker.process.kill()
    with pytest.raises(OSError, match=r"process of the reward odd has ended with exit code -9 \(SIGKILL\)"):
        own(*asked("a"))
    assert own._worker.process.returncode == -signal.SIGKILL


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_no_process_outlives_its_owner(tmp_path):
    """Killed amid a long score, which the other process does not finish."""

    def work() -> None:
        reward = OwnProcess(ODD)
        (tmp_path / "pid").write_text(str(reward._worker.process.pid))
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        reward(*asked("sleep 60"))

    assert processes.killed(work) == -signal.SIGKILL
    pid, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


@pytest.mark.slow
def test_a_run_with_one_is_the_run_without_and_ends_it(tmp_path):
    sampling = Sampling(**{**vars(job(tmp_path / "x").sampling), "overlap": None})
    own = OwnProcess("tests.odd_rewards.drawing")
    for name, reward in (("here", FunctionReward(odd_rewards.drawing)), ("there", own)):
        job(tmp_path / name, reward=reward, sampling=sampling, epochs=2, evaluation=held_out()).train(report=False)
    assert digest(tmp_path / "here") == digest(tmp_path / "there")
    assert own._worker.process.poll() == 0
    with ending([0.5 * own]):
        assert len(own(*asked("a"))) == 1  # it is started again
    assert own._worker.process.poll() == 0


def held_out() -> Evaluation:
    return Evaluation(["a green cross", "a star"], every=1, pictures=1)


def test_a_config_is_checked_before_any_process_starts(monkeypatch):
    started = list[object]()
    monkeypatch.setattr("rewards.process._Worker", lambda recipe: started.append(recipe))

    def read(inner: object, allow_code: bool = False) -> object:
        return build(holder, {"reward": {"class": "rewards.process.OwnProcess", "reward": inner}}, allow_code)

    for wrong, message in (
        ({"class": "rewards.CLIPScore", "modle": "x"}, "unknown key 'modle' in CLIPScore; did you mean 'model'"),
        ({"class": "os.system", "command": "true"}, "code from outside flowalign, rewards and trainers"),
        ({"class": "rewards.process.Recipe", "config": "os.system", "allow_code": True}, "code from outside|is no"),
        (3, "expected Reward"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(wrong)
    assert started == []


def holder(reward: Reward) -> Reward:
    return reward


def test_a_config_is_written_out_as_it_was_given():
    inner = {"class": "rewards.JPEGCompressibility"}
    written = resolve(holder, {"reward": {"class": "rewards.process.OwnProcess", "reward": inner}})
    assert written["reward"] == {"class": "rewards.process.OwnProcess", "reward": inner, "device": None}


def test_on_a_device_it_is_the_same_with_its_gradient():
    def reward(media: Media, prompts: Prompts) -> torch.Tensor:
        assert media.pixels.device.type == "cpu"
        return media.pixels.mean((1, 2, 3))

    plain = FunctionReward(reward, differentiable=True)
    placed = OnDevice(plain, "cpu")
    media, prompts = asked("a", "b")
    assert placed(media, prompts).total.equal(plain(media, prompts).total)
    pixels = media.pixels.requires_grad_()
    (gradient,) = torch.autograd.grad(placed(Media(pixels), prompts, grad=True).total.sum(), [pixels])
    assert gradient.unique().tolist() == pytest.approx([1 / pixels[0].numel()])
    assert (placed.name, placed.card.scope, isinstance(0.5 * placed, WeightedSum)) == (plain.name, "sample", True)
    for wrong in ("cuda:99", "nowhere"):
        with pytest.raises(ValueError, match=f"device '{wrong}' cannot be had"):
            OnDevice(plain, wrong)

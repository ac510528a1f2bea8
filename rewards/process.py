"""A reward in a process of its own, so that it scores while this process does something else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from signal import Signals
from typing import Annotated, Any

import torch
from torch import Tensor

from flowalign.config import Elsewhere, Recipe
from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, Reward
from rewards.worker import Message, generators, media_message, receive, scores_of, send, set_generators, settings

START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rewards.worker import main; main()"
PATIENCE = 5.0  # seconds for a process to end by itself

Named = Recipe | str | Mapping[str, Any]


class OwnProcess(Reward):
    """The same scores, to the last bit, from a process that is started for them; no gradient.

    The reward is made there alone, of its config: {class: rewards.PickScore, device: "cuda:1"}, a dotted path or an
    expression. What it draws from global generators is what it would have drawn here; of a GPU's, after the same seed.
    A trainer scores a micro-batch there while it rolls out the next (`Sampling.overlap`). The process ends with the
    run, and when this process is gone, however that came about. A term of a sum that has terms in it is one term.

    Args:
        reward: what the other process makes.
        device: where it puts the pictures; None for the device that they are on here.

    Raises: ValueError where the reward cannot be made. Scoring raises what the reward raises, in one line; OSError
    where the process has ended.
    """

    ahead = 1

    def __init__(
        self, reward: Annotated[Named, Elsewhere(Reward | Callable[..., Any] | str)], device: str | None = None
    ) -> None:
        self.recipe = reward if isinstance(reward, Recipe) else Recipe(reward, True)  # python names what it likes
        self.device = device if device is None else _device(device)
        self._turn, self._worker = threading.Lock(), _Worker(self.recipe)
        weakref.finalize(self, _Worker.end, self._worker)
        card = self._worker.made["card"]
        usual = card["usual"] if card["usual"] is None else tuple(card["usual"])
        self.name, self.card = self._worker.made["name"], Card(**card | {"usual": usual})

    def score(self, media: Media, prompts: Prompts) -> Scores:
        told, tensors = media_message(media, prompts)
        device = media.pixels.device
        with self._turn:
            drawn, states = generators()
            said, values = self._running().ask(told | drawn | {"device": self.device or str(device)}, tensors | states)
            set_generators(said, values, seed=False)
        return scores_of(said, values, device)

    def _running(self) -> _Worker:
        """The process, started again where it was ended, or where this one was forked off from the one that has it."""
        if not self._worker.mine():
            self._worker = _Worker(self.recipe)
            weakref.finalize(self, _Worker.end, self._worker)
        return self._worker

    def close(self) -> None:
        """End the process; another call starts one again."""
        self._worker.end()


class _Worker:
    """A started process and its pipes."""

    def __init__(self, recipe: Recipe) -> None:
        command = [sys.executable, "-c", START, json.dumps(sys.path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.owner, self.number, self.ended = os.getpid(), 0, False
        self.made: dict[str, Any] = {}
        told = settings() | {"reward": recipe.config, "allow_code": recipe.allow_code}
        self.made, _ = self._exchange(told, {})

    def mine(self) -> bool:
        """Whether it is there, and this process's."""
        return not self.ended and self.owner == os.getpid()

    def ask(self, told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Message:
        """The answer to a message. Raises: as `OwnProcess` says."""
        self.number += 1
        said, values = self._exchange({**told, "number": self.number}, tensors)
        if said["number"] != self.number:
            self.end()
            raise ValueError(f"{self._called()} was asked for answer {self.number} and gave answer {said['number']}")
        return said, values

    def _exchange(self, told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Message:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            send(self.process.stdin, told, tensors)
            said, values = receive(self.process.stdout)
        except (OSError, EOFError) as error:
            raise OSError(self._gone()) from error
        except BaseException:  # a message may be half sent
            self.end()
            raise
        if "error" in said:
            self._raise(said["error"], said["message"])
        return said, values

    def _raise(self, kind: str, message: str) -> None:
        if not self.made:
            self.end()
        errors: dict[str, type[Exception]] = {"memory": torch.OutOfMemoryError, "value": ValueError, "os": OSError}
        if kind in errors:
            raise errors[kind](message)
        raise ValueError(f"{self._called()} has failed, its traceback stands above: {kind}: {message}")

    def _called(self) -> str:
        return f"the process of the reward {self.made.get('name', '')}".rstrip()

    def _gone(self) -> str:
        """Why there is no answer."""
        self.end()
        code = self.process.returncode
        how = f"exit code {code}" if code >= 0 else f"exit code {code} ({Signals(-code).name})"
        return f"{self._called()} has ended with {how}; what it said stands above, and SIGKILL may mean out of memory"

    def end(self) -> None:
        """End the process, which a closed pipe makes it do by itself."""
        if not self.mine():
            return
        self.ended = True
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _device(name: str) -> str:
    try:
        return str(torch.device(name))
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is none: {str(error).splitlines()[0]}") from error


@contextmanager
def ending(*held: Any) -> Iterator[None]:
    """On leaving, the processes of rewards among these, and of what they are made of, end; a call starts them again."""
    try:
        yield
    finally:
        for one in _own_processes(held, set()):
            one.close()


def _own_processes(value: Any, seen: set[int]) -> Iterator[OwnProcess]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, OwnProcess):
        yield value
    elif isinstance(value, Reward):
        for held in vars(value).values():
            yield from _own_processes(held, seen)
    elif isinstance(value, list | tuple):
        for held in value:
            yield from _own_processes(held, seen)

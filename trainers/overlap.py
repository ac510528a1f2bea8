"""Scores that are made beside the rollouts that follow: a bounded queue of micro-batches, taken in order.

A trainer rolls a micro-batch out and decodes it, and goes on to the next while a reward elsewhere looks at the first.
Nothing depends on which is sooner: what is drawn is keyed, and the rollouts draw from no generator that rewards use.
Decoding is no part of what runs beside: the device that does it is the network's, and the decoder of a video keeps
frames between its calls, so that two threads may not use it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from flowalign.accounting import Meter
from flowalign.distributed import data_size
from flowalign.randomness import keyed_globals
from flowalign.records import Prompts, Scores
from rewards.base import Reward
from trainers.state import Collected

if TYPE_CHECKING:
    from trainers.base import Trainer
    from trainers.collection import Epoch
    from trainers.keeper import Keeper

PATIENCE = 0.1  # seconds between two looks at what else may have failed, while an answer is awaited


@dataclass(frozen=True)
class Asked:
    """Which samples a reward is asked about; its answer carries the same.

    purpose, key: of the call, the key beginning with epoch and micro-batch. count: of samples. told: a fingerprint of
    their prompts and groups.
    """

    purpose: str
    key: tuple[int, ...]
    count: int
    told: str

    @classmethod
    def about(cls, prompts: Prompts, purpose: str, *key: int) -> Asked:
        """What is asked about samples of these prompts."""
        told = blake2b(repr((prompts.text, prompts.groups)).encode(), digest_size=8).hexdigest()
        return cls(purpose, key, len(prompts), told)

    def __str__(self) -> str:
        epoch, index, *_ = *self.key, 0, 0
        return f"the {self.count} samples of micro-batch {index} of epoch {epoch} ({self.purpose} {self.told})"


@dataclass(frozen=True)
class Answer:
    """Scores, what they are of, and the seconds that they took beside the rollouts, if they did."""

    asked: Asked
    scores: Scores
    seconds: float = 0.0

    def to(self, asked: Asked) -> Scores:
        """The scores. Raises: ValueError where they are not those of what was asked."""
        if self.asked != asked:
            raise ValueError(f"a reward was asked about {asked}, and the answer is that to {self.asked}")
        if len(self.scores) != asked.count:
            raise ValueError(f"a reward was asked about {asked}, and gave {len(self.scores)} scores")
        return self.scores


Work = Callable[[], Scores]
Later = Callable[[], Scores]
Ask = Callable[[Asked, Work], Later]  # have the work done, now or beside what follows; `Later` waits for it


def drawing(reward: Reward, seed: int, purpose: str, *key: int) -> AbstractContextManager[None]:
    """While entered, what a reward draws is a function of the key.

    One that may be asked several times at once draws nothing here, and need not wait for its turn to.
    """
    return nullcontext() if reward.ahead > 1 else keyed_globals(seed, purpose, *key)


def at_once(meter: Meter) -> Ask:
    """Have work done before anything else; its time is the phase "reward"."""

    def ask(asked: Asked, work: Work) -> Later:
        with meter.phase("reward"):
            made = work()
        scores = Answer(asked, made).to(asked)
        return lambda: scores

    return ask


class Scoring:
    """Micro-batches on their way to their scores; to be entered. On leaving, what has not begun is given up.

    The phase "reward" is the time that the run has stood still for scores; "beside/reward" is the time that they took
    in threads of their own.

    Args:
        ahead: the most micro-batches that wait for their scores while others are rolled out; 0 for no thread at all.
        calls: of the reward that may be under way at once, in a thread each.
        taken: where scored micro-batches go, in the order in which they were added.
    """

    def __init__(self, ahead: int, calls: int, meter: Meter, taken: dict[int, Collected]) -> None:
        self.ahead, self.meter, self.taken = ahead, meter, taken
        self.threads = max(min(ahead, calls), 1)
        self._waiting: deque[tuple[int, Callable[[], Collected]]] = deque()
        self._under_way: list[Future[Answer]] = []
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Scoring:
        if self.ahead:
            self._pool = ThreadPoolExecutor(self.threads, "flowalign-score", _on_device, (_device(),))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._waiting.clear()
        self._under_way.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def ask(self, asked: Asked, work: Work) -> Later:
        """An `Ask`."""
        if self._pool is None:
            return at_once(self.meter)(asked, work)
        future = self._pool.submit(_timed, asked, work)
        self._under_way.append(future)
        return lambda: self._answer(asked, future)

    def add(self, index: int, begun: Callable[[], Collected]) -> None:
        """Put a micro-batch that is rolled out at the end of the queue; waits where the queue is too long.

        Raises: whatever the scoring of any of them has raised by now.
        """
        self._waiting.append((index, begun))
        self._take(self.ahead)

    def drain(self) -> None:
        """Wait for all scores; raises as `add` does."""
        self._take(0)

    def _take(self, most: int) -> None:
        self._look()
        while len(self._waiting) > most:
            index, begun = self._waiting.popleft()
            self.taken[index] = begun()

    def _answer(self, asked: Asked, future: Future[Answer]) -> Scores:
        with self.meter.phase("reward"):
            while not wait([future], PATIENCE).done:
                self._look()
            answer = future.result()
        self.meter.add("beside/reward", answer.seconds)
        return answer.to(asked)

    def _look(self) -> None:
        """Raises: what anything under way has failed with, whether or not its turn has come."""
        for future in self._under_way:
            if future.done():
                future.result()
        self._under_way = [future for future in self._under_way if not future.done()]


def _timed(asked: Asked, work: Work) -> Answer:
    started = time.perf_counter()
    scores = work()
    return Answer(asked, scores, time.perf_counter() - started)


def _device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _on_device(device: int | None) -> None:
    """A thread starts with the first device, whatever that of the others is."""
    if device is not None:
        torch.cuda.set_device(device)


def fill(trainer: Trainer, epoch: Epoch, keeper: Keeper | None, clean: bool) -> list[Collected]:
    """This process's micro-batches of rollouts, of which those that `state.buffer` does not have are made.

    Args:
        clean: as of `Collection.begin`.
    """
    mine, state, collection = trainer.mine(epoch), trainer.state, trainer.collection
    turns = max(sum(map(len, collection.shares(epoch, process))) for process in range(data_size()))
    meter = trainer.model.meter
    with Scoring(trainer.ahead(), trainer.reward.ahead, meter, state.buffer) as scoring:
        for turn in range(turns):
            if keeper is not None and not state.part:
                keeper.poll("rollout", turn, turns, scoring.drain)
            if turn < len(mine) and mine[turn] not in state.buffer:
                with trainer.sampler():
                    begun = collection.begin(epoch, mine[turn], scoring.ask, clean)
                scoring.add(mine[turn], begun)
            state.spend(meter)
        scoring.drain()
    state.spend(meter)
    return [state.buffer[index] for index in mine]

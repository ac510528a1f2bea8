"""Search without training: for each prompt the best sample that some compute can find. No weight is changed.

    best = argmax_i r(G(e_i), prompt)   over start noises e_0, e_1, ...;   e_0 is the noise of the plain sample

Which noises are tried is a method's own: best-of-N draws them, ReNO (`trainers.reno`) follows the reward's gradient.
All else stands here once, and so the same compute counts the same: calls of one shape that many prompts share, the best
so far of each, and what each has cost. The plain sample is the one that `flowalign sample` makes with this seed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from flowalign.distributed import check_started, world_size
from flowalign.models import as_model
from flowalign.models.base import Model
from flowalign.prompts import PromptData, as_prompts
from flowalign.rollout import Policy
from flowalign.schedules import Path, Plan
from flowalign.sizes import calls_of
from flowalign.transitions import ODE
from rewards.base import Reward, as_reward
from trainers.search_cost import Prices
from trainers.search_sampler import Sampler
from trainers.search_state import Found, Line, Made, SearchState

Task = tuple[Line, int]  # a prompt, and the number of its candidate


class Search(ABC):
    """What all searches share. A method says which start noise a prompt tries next, and what it learns from a score.

    A prompt whose search has ended makes room for the next one. Calls keep one shape: where no prompt is left to fill
    one it is padded, and what padding costs is not the prompts'. So what a prompt comes to does not depend on which
    others are searched beside it.

    Args: see the subclasses.
    """

    needs_gradient = False  # whether `learn` reads the gradient of `objective`

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        tries: int,
        steps: int,
        guidance_scale: float,
        plan: Plan | None,
        recompute: bool,
        seed: int,
        batch_size: int,
        budget: float | None,
        prices: Prices | None,
        folder: str,
        save_seconds: float,
    ) -> None:
        check_started()
        for name, value in (("steps", steps), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if budget is not None and not 0 < budget < math.inf:
            raise ValueError(f"budget must be positive and finite, got {budget}")
        if save_seconds < 0:
            raise ValueError(f"save_seconds must be at least 0, got {save_seconds}")
        self.prompts, self.reward = as_prompts(prompts).all(), as_reward(reward)
        self.check_reward()
        self.model = as_model(model)
        self.check_media()
        self.tries, self.budget, self.prices, self.batch_size = tries, budget, prices, batch_size
        path = Path((ODE(),) * steps) if plan is None else plan.resolve(steps, 0, seed)
        if path.branches:
            raise ValueError("plan: a search has no groups that share a start; give it a plan that does not branch")
        if path.cut is not None or path.passed:
            raise ValueError("plan: a search makes all steps of its grid, and this plan leaves some out; lower steps")
        policy = Policy(guidance_scale, unconditional_grad=True)
        self.sampler = Sampler(self.model, self.reward, self.prompts, path, policy, recompute, seed)
        self.folder, self.save_seconds = FilePath(folder), save_seconds
        self.calls = calls_of(self.model, self.prompts, len(self.prompts))

    @abstractmethod
    def begin(self, number: int) -> dict[str, Tensor]:
        """What a prompt's search starts with, on the CPU; kept in checkpoints."""

    @abstractmethod
    def width(self, line: Line, most: int) -> int:
        """How many of a prompt's candidates can be tried at once, at least 1."""

    @abstractmethod
    def noise(self, line: Line, number: int) -> Float[Tensor, "*d"]:
        """The start noise of a prompt's candidate, of unit variance, on the CPU; the first is the plain sample's."""

    @abstractmethod
    def learn(self, line: Line, valid: bool, gradient: Float[Tensor, "*d"] | None) -> None:
        """What a candidate's score and gradient change; a reason in `line.stopped` ends the prompt's search."""

    def step_key(self, number: int) -> int:
        """Which step noise a candidate has, where the plan is stochastic: by default its own."""
        return number

    def objective(self, rewards: Float[Tensor, " b"], noise: Float[Tensor, b * d]) -> Float[Tensor, " b"]:
        """What the gradient is of, to be made large."""
        return rewards

    def settings(self) -> Mapping[str, Any]:
        """What of a method's own settings makes it another search; plain data."""
        return {}

    def check_reward(self) -> None:
        """Raises: ValueError for a reward that compares samples, or has no gradient where one is needed."""
        if self.reward.card.scope != "sample":
            raise ValueError(
                f"the reward {self.reward.name} compares samples of a {self.reward.card.scope}; "
                "a search needs one that scores each on its own"
            )
        if self.needs_gradient and not self.reward.differentiable:
            raise ValueError(
                f"{type(self).__name__} follows the reward's gradient, and {self.reward.name} has none: take a "
                "differentiable reward, say so of your own function with rewards.base.FunctionReward(function, "
                "differentiable=True), or search with best_of_n"
            )

    def check_media(self) -> None:
        """Raises: ValueError for a reward that looks at another kind of media than the model makes."""
        video, kind = self.model.fps is not None, self.reward.card.modality
        if video and kind == "image":
            raise ValueError(f"{self.reward.name} scores pictures, and the model makes videos: wrap it in OnFrames")
        if not video and kind == "video":
            raise ValueError(f"{self.reward.name} scores videos, and the model makes pictures")

    def start(self) -> SearchState:
        """An empty state: prices are measured, and with them how many candidates of a prompt are paid for.

        Raises: ValueError for a budget that does not pay for one.
        """
        prices = self.prices or self._measure()
        if self.budget is None:
            return SearchState(prices, self.tries)
        one = self.sampler.one(self.needs_gradient).cost(prices)
        if self.budget < one:
            raise ValueError(f"a budget of {self.budget:g} forwards does not pay for one sample, which costs {one:.4g}")
        return SearchState(prices, min(self.tries, int(self.budget / one)))

    def find(self) -> list[Found]:
        """Search for all prompts, and leave nothing on the disk; `run` leaves a folder.

        Of several processes each searches for itself: give each a share of the prompts.
        """
        return sorted((one for found in self.rounds(self.start()) for one in found), key=lambda one: one.number)

    def run(self, config: Mapping[str, Any] | None = None) -> FilePath:
        """Search for all prompts, or go on where a search in the same folder has stopped; returns the folder.

        Args:
            config: the resolved config, plain data, for the folder.

        Raises: Stopped where a signal asked for it, all being saved; ValueError for a folder of another search, and in
        one of several processes.
        """
        from trainers.search_run import run

        if world_size() > 1:
            raise ValueError("a search is one process; start it without a launcher, and give each a share of prompts")

        return run(self, config)

    def rounds(self, state: SearchState) -> Iterator[list[Found]]:
        """The search, call by call: the prompts that each call has ended. The state is true between two of them."""
        first = 0
        for call in self.calls:
            waiting = list(call.rows[max(state.started - first, 0) :])
            under_way = any(line.number in call.rows for line in state.open)
            first += len(call.rows)
            if not waiting and not under_way:
                continue
            lanes = min(self.batch_size, len(call.rows) * self.width(Line(0), state.most))
            with self.model.sized(call.size):
                while tasks := self._tasks(state, waiting, lanes):
                    yield self._round(state, tasks, lanes)

    def _tasks(self, state: SearchState, waiting: list[int], lanes: int) -> list[Task]:
        """Candidates for the next call: of the prompts under way, all of one size, then of new ones while they fit."""
        tasks: list[Task] = []
        for line in state.open:
            width = min(self.width(line, state.most), lanes - len(tasks))
            tasks += [(line, line.tried + i) for i in range(width)]
        while len(tasks) < lanes and waiting:
            line = Line(waiting.pop(0))
            line.state = self.begin(line.number)
            state.open.append(line)
            state.started += 1
            width = min(self.width(line, state.most), lanes - len(tasks))
            tasks += [(line, i) for i in range(width)]
        return tasks

    def _round(self, state: SearchState, tasks: list[Task], lanes: int) -> list[Found]:
        gradient = self.needs_gradient and any(number + 1 < state.most for _, number in tasks)
        made = self._call([*tasks, *[tasks[0]] * (lanes - len(tasks))], gradient)
        for lane, (line, number) in enumerate(tasks):
            line.take(made, lane, number, made.seconds / len(tasks))
            own = None if made.gradient is None else made.gradient[lane]
            self.learn(line, bool(made.scores.valid[lane]), own if line.tried < state.most else None)
        ended = [line for line in state.open if line.stopped or line.tried >= state.most]
        state.open = [line for line in state.open if line not in ended]
        state.rounds, state.finished = state.rounds + 1, state.finished + len(ended)
        state.padding += lanes - len(tasks)
        return [Found.of(line, self.prompts.text[line.number], state.prices) for line in ended]

    def _call(self, tasks: Sequence[Task], gradient: bool) -> Made:
        noise = torch.stack([self.noise(*task) for task in tasks])
        numbers, members = [line.number for line, _ in tasks], [self.step_key(number) for _, number in tasks]
        return self.sampler.call(noise, numbers, members, self.objective if gradient else None)

    def remake(self, noise: Float[Tensor, "*d"], number: int, candidate: int = 0) -> Float[Tensor, "*frames 3 h w"]:
        """The media in [0, 1] of a noise that a search of these prompts has found.

        Args:
            number: of the prompt. candidate: its number, which the step noise of a stochastic plan is drawn by.
        """
        size = next(call.size for call in self.calls if number in call.rows)
        with self.model.sized(size):
            return self.sampler.remake(noise, number, self.step_key(candidate))

    def _measure(self) -> Prices:
        with self.model.sized(self.calls[0].size):
            return self.sampler.measure(self.calls[0], self.batch_size)

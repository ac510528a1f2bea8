"""Rollouts whose noisy latents are completed and scored too: what the reward would be without the noise yet to come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.completions import complete, completion_points
from flowalign.models.base import Model
from flowalign.records import Prompts, PromptSet, Scores, Trajectory
from flowalign.rollout import Policy
from flowalign.schedules import Path
from flowalign.transitions import TableSDE
from rewards.base import Reward
from rewards.joined import join_scores
from rewards.terms import PREFIX as TERM
from trainers.batch import Sampling, rows_of_step
from trainers.collection import Collection, Draw, Epoch
from trainers.overlap import Ask, Later

PREFIX = "completed_"  # of the part of scores that holds the reward of a step's completion

Steps = Callable[[Path], tuple[int, ...]]


class CompletedCollection(Collection):
    """Scores have a part `completed_003` for each completed step: the reward of the ODE from its latents.

    Where a reward tells its terms apart (`rewards.terms`), there are parts `completed_003/term/clip` of these too.

    A sample of which a completion has no valid score is not valid.

    Args:
        completed: the stochastic steps whose latents are completed, the first ones of a path.
        count: ODE steps of a completion, None for all that are left.
        judge: scores the completions, as the reward does the samples.

    table: g of every step, once the noise is calibrated; it then stands in for the plan's own.
    """

    keep_velocities = True

    def __init__(
        self,
        model: Model,
        reward: Reward,
        prompts: PromptSet,
        sampling: Sampling,
        policy: Policy,
        seed: int,
        completed: Steps,
        count: int | None,
        judge: Reward,
    ) -> None:
        super().__init__(model, reward, prompts, sampling, policy, seed)
        self.completed, self.count, self.judge = completed, count, judge
        self.table: tuple[float, ...] = ()

    def path(self, number: int, prompt: int = 0) -> Path:
        path = super().path(number, prompt)
        if not self.table:
            return path
        rule, noisy = TableSDE(self.table), path.stochastic
        return replace(path, transitions=tuple(rule if i in noisy else one for i, one in enumerate(path.transitions)))

    def score(self, epoch: Epoch, index: int, draw: Draw, made: Trajectory, kept: int, ask: Ask) -> Later:
        own, numbers = super().score(epoch, index, draw, made, kept, ask), self.completed(epoch.path)
        ends = self._complete(epoch.path, draw, made, kept, len(numbers))
        rows = [len(end) for end in ends]
        whose = [sample for count in rows for sample in range(0, kept, kept // count)]  # a shared start has fewer rows
        judged = self._judge(torch.cat(ends), draw.told.rows(whose), ask, epoch.number, index)
        return lambda: with_completed(own(), judged(), numbers, rows)

    def _complete(self, path: Path, draw: Draw, made: Trajectory, kept: int, count: int) -> tuple[Tensor, ...]:
        """What the first so many stochastic steps would end at along the path's points, without padding."""
        steps = [rows_of_step(step, kept, len(made.latents)) for step in made.steps[:count]]
        velocities = [velocity[: len(step.latents)] for velocity, step in zip(made.velocities, steps, strict=False)]
        condition, sigmas = (
            draw.condition.rows(torch.arange(len(velocities[0]))),
            path.grid(self.model.sigmas(self.sampling.steps)),
        )
        with self.model.meter.phase("completion"):
            return complete(
                self.model, condition, steps, velocities, sigmas, self.policy.guidance_scale, self.count,
                self.sampling.rows_per_call,
            )  # fmt: skip

    def _judge(self, latents: Tensor, told: Prompts, ask: Ask, *key: int) -> Later:
        """So many at once as a decode has, so that what a reward needs does not grow with the number of steps."""
        parts = list[Later]()
        for number, at in enumerate(torch.arange(len(latents)).split(self.sampling.rows_per_call)):
            some, whose = latents[at.to(latents.device)], told.rows(at.tolist())
            parts.append(self.judged(self.judge, some, whose, ask, "completion_reward", *key, number))
        return lambda: join_scores([part() for part in parts])

    def scoring_rows(self, epoch: Epoch) -> Rows:
        path, rows = epoch.path, 0
        grid = path.grid(self.sigmas)
        for step in self.completed(path):
            starts = len(epoch.rows) * path.width(step, epoch.members)
            visited = completion_points(step, len(path.transitions), self.count)[1:-1]  # the first velocity is there
            rows += starts * sum(self.model.calls(self.policy.guidance_scale, grid[at]) for at in visited)
        return Rows(rows)

    def media(self, epoch: Epoch) -> int:
        widths = [epoch.path.width(step, epoch.members) for step in self.completed(epoch.path)]
        return super().media(epoch) + len(epoch.rows) * sum(widths)


def with_completed(scores: Scores, judged: Scores, numbers: Sequence[int], rows: Sequence[int]) -> Scores:
    """The samples' scores with those of their completions as parts; a start that is shared has one for all.

    Args:
        numbers: of the completed steps. rows: completions of each, one step's after another's.
    """
    own = {f"/{name}": value for name, value in judged.parts.items() if name.startswith(TERM)}
    parts = {
        f"{PREFIX}{number:03d}{name}": value.repeat_interleave(len(scores) // len(value))
        for name, column in ({"": judged.total} | own).items()
        for number, value in zip(numbers, column.split([*rows]), strict=True)
    }
    valid = [known.repeat_interleave(len(scores) // len(known)) for known in judged.valid.split([*rows])]
    return replace(scores, parts=scores.parts | parts, valid=scores.valid & torch.stack(valid).all(0))


def completed_rewards_of(scores: Scores, term: str | None = None) -> Float[Tensor, "b t"]:
    """The rewards of the completions in the order of their steps, and then those of the samples themselves.

    Args:
        term: the part of one of the reward's terms (`rewards.terms`), where it is meant and not their sum.
    """
    after = "" if term is None else term
    names = sorted(name for name in scores.parts if name.startswith(PREFIX) and name.partition("/")[2] == after)
    return torch.stack(
        [*(scores.parts[name] for name in names), scores.total if term is None else scores.parts[term]], 1
    )

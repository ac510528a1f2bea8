"""Rollouts that fan out at several steps of one ODE path, and rewards of what their members come to.

A group has one anchor, the ODE from its start noise. At each step of the plan its members part from the anchor by that
step's noise, and go on by ODE, along the grid and along thinner ones. So one network row serves a group at a step, and
a member's pictures of one step have nothing to do with those of another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.completions import Route, calls_of, follow, thinned_points
from flowalign.models.base import Model
from flowalign.records import PromptSet, Scores, Trajectory
from flowalign.rollout import Policy, fan_out
from flowalign.schedules import ChosenSteps, FanOut, Path
from rewards.base import Reward
from trainers.batch import Sampling
from trainers.collection import Collection, Draw, Epoch
from trainers.overlap import Ask, Later


def name_of(step: int, granularity: int, part: str | None = None) -> str:
    """Of the part of scores that holds the rewards of a step's members, or a part of these."""
    return f"fan_{step:03d}_x{granularity}" + ("" if part is None else f"/{part}")


class FannedCollection(Collection):
    """Scores have a part `fan_003_x2` for each step and granularity: the rewards of its pictures.

    The samples themselves, their total and their other parts are those of the first step and granularity. A sample of
    which any picture has no valid score is not valid.

    Args:
        sampling: its plan is a `FanOut`, all of whose steps are taken in every epoch.
        granularities: of the ODE from a step's noise on: every so many points of the grid are visited.
        parts: of the reward, to be kept of each step's pictures too.
        judge: scores the pictures of all but the first step and granularity, as the reward does those.
    """

    def __init__(
        self,
        model: Model,
        reward: Reward,
        prompts: PromptSet,
        sampling: Sampling,
        policy: Policy,
        seed: int,
        granularities: Sequence[int],
        parts: Sequence[str],
        judge: Reward,
    ) -> None:
        super().__init__(model, reward, prompts, sampling, policy, seed)
        self.granularities, self.parts, self.judge = tuple(granularities), tuple(parts), judge

    def path(self, number: int, prompt: int = 0) -> Path:
        """All steps of the plan, of which none follows another; a group shares all latents that they start from."""
        plan = self.sampling.plan
        assert isinstance(plan, FanOut)
        path = ChosenSteps(plan.transition, plan.steps, True).resolve(self.sampling.steps, number, self.seed)
        return replace(path, branch=path.stochastic[-1])

    def routes(self, step: int) -> tuple[Route, ...]:
        """The points that the members of a step visit after it, of each granularity."""
        return tuple(thinned_points(step + 1, self.sampling.steps, stride) for stride in self.granularities)

    def roll(self, epoch: Epoch, index: int, path: Path, draw: Draw, sigmas: list[float]) -> Trajectory:
        """The steps from the anchors alone."""
        steps = fan_out(
            self.model,
            draw.condition,
            draw.start,
            sigmas,
            path,
            self.policy,
            lambda step: self.noise(epoch, draw.samples, "step", step),
            epoch.members,
            self.sampling.rows_per_call,
        )
        return Trajectory(steps[0].latents_next, steps)

    def score(self, epoch: Epoch, index: int, draw: Draw, made: Trajectory, kept: int, ask: Ask) -> Later:
        first, *others = self._ends(epoch, draw, made, kept)
        told = draw.told.rows(range(kept))
        own = super().score(epoch, index, draw, replace(made, latents=first), kept, ask)
        # whole groups at once, as the samples are, for rewards that compare their members
        beside = [
            self.judged(self.judge, end, told, ask, "fan_reward", epoch.number, index, at)
            for at, end in enumerate(others, 1)
        ]
        fans = [(step.interval.index, stride) for step in made.steps for stride in self.granularities]
        return lambda: self._with_fans(fans, [own(), *(judged() for judged in beside)])

    def _with_fans(self, fans: Sequence[tuple[int, int]], judged: Sequence[Scores]) -> Scores:
        """The first fan's scores, with all fans' as parts. fans: step and granularity of each."""
        parts = dict(judged[0].parts)
        for fan, scores in zip(fans, judged, strict=True):
            parts[name_of(*fan)] = scores.total
            parts |= {name_of(*fan, part): scores.parts[part] for part in self.parts}
        valid = torch.stack([scores.valid for scores in judged]).all(0)
        return replace(judged[0], parts=parts, valid=valid)

    def _ends(self, epoch: Epoch, draw: Draw, made: Trajectory, kept: int) -> tuple[Tensor, ...]:
        """x_0 of each step's members, without padding, of each granularity in turn."""
        starts = [step.latents_next[:kept] for step in made.steps]
        routes = [(at, route) for at, step in enumerate(made.steps) for route in self.routes(step.interval.index)]
        told = torch.arange(kept // epoch.members).repeat_interleave(epoch.members)
        with self.model.meter.phase("completion"):
            return follow(
                self.model, draw.condition, starts, [told] * len(starts), routes,
                self.model.sigmas(self.sampling.steps), self.policy.guidance_scale, self.sampling.rows_per_call,
            )  # fmt: skip

    def needed(self, epoch: Epoch, trained: Callable[[Path], Sequence[int]], reference: bool) -> Rows:
        """Of the anchors, which end at the last step that a group parts at."""
        assert epoch.path.branch is not None
        path = replace(epoch.path, cut=epoch.path.branch + 1)
        buckets = tuple(replace(bucket, path=None) for bucket in epoch.buckets)
        return super().needed(replace(epoch, path=path, buckets=buckets), trained, reference)

    def scoring_rows(self, epoch: Epoch) -> Rows:
        """Of what follows on the steps: calls that granularities share are made once."""
        points = [point for step in epoch.path.stochastic for point in calls_of(self.routes(step))]
        calls = sum(self.model.calls(self.policy.guidance_scale, self.sigmas[point]) for point in points)
        return Rows(calls * len(epoch.rows) * epoch.members)

    def media(self, epoch: Epoch) -> int:
        return super().media(epoch) * len(epoch.path.stochastic) * len(self.granularities)


def fanned_rewards_of(
    scores: Scores, steps: Sequence[int], granularities: Sequence[int], parts: Sequence[str]
) -> Float[Tensor, "b t m"]:
    """The rewards of each step's pictures, for each granularity and each part, or the total where no part is named."""
    named = parts or (None,)
    columns = [[scores.parts[name_of(k, g, part)] for g in granularities for part in named] for k in steps]
    return torch.stack([torch.stack(one, 1) for one in columns], 1)

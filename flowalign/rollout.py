"""The one sampling loop. Trainers, evaluation and search all sample through `rollout`; nothing else steps latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.guidance import Guide, Push
from flowalign.models.base import Model
from flowalign.records import Condition, Interval, Step, Trajectory, intervals
from flowalign.schedules import Path
from flowalign.transitions import ODE, Reduce, Transition, gaussian_log_prob, mean_of_elements

Latents = Float[Tensor, "b *d"]
Noise = Float[Tensor, "n *d"]  # one row per sample, where latents may have one per group
LogProb = Callable[[Tensor, Tensor, float, Reduce], Tensor]


@dataclass(frozen=True)
class Policy:
    """How a step's density is taken; a rollout and its replay must share it.

    guidance_scale: classifier-free guidance, 1 for none.
    log_prob, reduce: see `flowalign.transitions`.
    unconditional_grad: whether a replay's gradient also runs through the unconditional half.
    """

    guidance_scale: float = 1.0
    log_prob: LogProb = gaussian_log_prob
    reduce: Reduce = mean_of_elements
    unconditional_grad: bool = False


@torch.no_grad()
def rollout(
    model: Model,
    condition: Condition,
    start_noise: Latents,
    sigmas: list[float],
    path: Path,
    policy: Policy = Policy(),
    step_noise: Callable[[int], Latents] | None = None,
    members: int = 1,
    rows_per_call: int | None = None,
    keep_path: bool = False,
    keep_velocities: bool = False,
    guide: Guide | None = None,
) -> Trajectory:
    """Samples from start noise, step by step along a path, and keeps what a replay of its stochastic steps needs.

    Rows are contiguous by parent: where a path parts each into n, row r becomes rows r * n ... (r + 1) * n - 1.

    Args:
        condition: one row for each row of `start_noise`.
        start_noise: float32, of unit variance; one row per sample, or one for all that share it.
        step_noise: the noise of step i, one row for each that the step leads to; needed where some are stochastic.
        members: samples per row of the start; 1 where the path does not branch.
        rows_per_call: the most rows in a network call of a deterministic step, which no one replays; None for all.
        keep_path: keep the latents after every step too.
        keep_velocities: keep the velocity at every stochastic step too.
        guide: moves the mean of some stochastic steps, whose log-probs stay those of the unmoved one.

    Raises: ValueError where the path's length is not the grid's, or stochastic steps have no noise.
    """
    latents = model.start(start_noise.float(), sigmas[0], condition)
    walked = _walk(
        model, condition, latents, sigmas, path, policy, step_noise, members, rows_per_call, keep_path, guide
    )
    return walked if keep_velocities else replace(walked, velocities=())


def _walk(
    model: Model,
    condition: Condition,
    latents: Latents,
    sigmas: list[float],
    path: Path,
    policy: Policy,
    step_noise: Callable[[int], Latents] | None,
    members: int,
    rows_per_call: int | None,
    keep_path: bool,
    guide: Guide | None = None,
) -> Trajectory:
    """The steps of `rollout`, from latents at sigmas[0]."""
    grid = intervals(sigmas)
    if len(path.transitions) != len(grid):
        raise ValueError(f"the path has {len(path.transitions)} steps and the sigma grid {len(grid)}")
    if path.stochastic and step_noise is None:
        raise ValueError(f"steps {list(path.stochastic)} are stochastic and need step_noise")
    if (width := path.width(len(grid), members)) != members:
        raise ValueError(f"on this path {width} samples come of each row, not {members}")
    steps, velocities, values, visited = list[Step](), list[Tensor](), list[Tensor](), [latents]
    for interval, transition in zip(grid, path.transitions, strict=True):
        if isinstance(transition, ODE):
            velocity = _in_calls(model, latents, interval.sigma, condition, policy.guidance_scale, rows_per_call)
            latents, _ = transition(latents, velocity, interval)
        else:
            assert step_noise is not None
            parted = path.children(interval.index, members)
            noise = step_noise(interval.index)
            pushed = _pushed(guide, model, latents, interval, condition, policy)
            values += [pushed.values] if pushed else []
            step, velocity = _stochastic_step(
                model, latents, interval, transition, condition, policy, noise, parted, pushed
            )
            steps.append(step)
            velocities.append(velocity)
            if parted > 1:
                condition = condition.rows(torch.arange(len(latents)).repeat_interleave(parted))
            latents = step.latents_next
        visited.append(latents)
    last = model.finish(latents, sigmas[-1])
    return Trajectory(last, tuple(steps), tuple(visited) if keep_path else (), tuple(velocities), tuple(values))


@torch.no_grad()
def fan_out(
    model: Model,
    condition: Condition,
    start_noise: Latents,
    sigmas: list[float],
    path: Path,
    policy: Policy,
    step_noise: Callable[[int], Noise],
    members: int,
    rows_per_call: int | None = None,
) -> tuple[Step, ...]:
    """The stochastic steps of a path, each made `members` times over from the anchor: the ODE from the start noise.

    The anchor goes on from the same network call by an ODE step, up to the last of these steps.

    Args:
        condition, start_noise: one row for each anchor.
        step_noise: the noise of step i, `members` rows for each anchor, one after another.
        rows_per_call: the most rows in a network call that no one replays; None for all.
    """
    latents, steps = model.start(start_noise.float(), sigmas[0], condition), list[Step]()
    for interval in intervals(sigmas)[: path.stochastic[-1] + 1]:
        if interval.index in path.stochastic:
            transition, noise = path.transitions[interval.index], step_noise(interval.index)
            step, velocity = _stochastic_step(
                model, latents, interval, transition, condition, policy, noise, members, None
            )
            steps.append(step)
        else:
            velocity = _in_calls(model, latents, interval.sigma, condition, policy.guidance_scale, rows_per_call)
        latents, _ = ODE()(latents, velocity, interval)
    return tuple(steps)


@torch.no_grad()
def resume(
    model: Model,
    condition: Condition,
    latents: Latents,
    sigma: float,
    sigmas: list[float],
    policy: Policy = Policy(),
    rows_per_call: int | None = None,
) -> Latents:
    """The ODE from latents at `sigma` to the end, along the points of the grid that lie below it; returns x_0."""
    grid = [sigma] + [point for point in sigmas if point < sigma]
    path = Path((ODE(),) * (len(grid) - 1))
    return _walk(model, condition, latents, grid, path, policy, None, 1, rows_per_call, False).latents


@dataclass(frozen=True)
class Replay:
    """A stored step under the present policy: one row per sample, with gradient; `std` is the step's own.

    old_mean: under the policy that drew the step, without gradient, where a trainer asks for it.
    """

    log_probs: Float[Tensor, " b"]
    mean: Latents
    velocity: Latents
    std: float
    old_mean: Latents | None = None

    def repeated(self, times: int) -> Replay:
        """Each row so many times, next to one another: a step that several samples share, for each of them."""
        if times == 1:
            return self
        log_probs, mean, velocity = (
            value.repeat_interleave(times, 0) for value in (self.log_probs, self.mean, self.velocity)
        )
        return Replay(log_probs, mean, velocity, self.std)


def replay(model: Model, step: Step, transition: Transition, condition: Condition, policy: Policy) -> Replay:
    """Log-probabilities of a stored step under the present policy, by the rollout's own calls.

    On the policy that made the rollout, and in batches of its shape, they equal the stored ones bit for bit.

    Args:
        condition: one row for each row of `step.latents`.
    """
    velocity = model.velocity_split(
        step.latents, step.interval.sigma, condition, policy.guidance_scale, policy.unconditional_grad
    )
    mean, std = transition(step.latents, velocity, step.interval)
    mean, velocity = (value.repeat_interleave(step.members, 0) for value in (mean, velocity))
    return Replay(policy.log_prob(step.latents_next, mean, std, policy.reduce), mean, velocity, std)


def _pushed(
    guide: Guide | None, model: Model, latents: Latents, interval: Interval, condition: Condition, policy: Policy
) -> Push | None:
    if guide is None or interval.index not in guide.settings.steps:
        return None
    return guide.push(model, latents, interval, condition, policy.guidance_scale)


def _stochastic_step(
    model: Model,
    latents: Latents,
    interval: Interval,
    transition: Transition,
    condition: Condition,
    policy: Policy,
    noise: Noise,
    members: int,
    pushed: Push | None,
) -> tuple[Step, Latents]:
    if pushed is None:
        velocity = model.velocity_split(latents, interval.sigma, condition, policy.guidance_scale)
    else:
        velocity = pushed.velocity
    mean, std = transition(latents, velocity, interval)
    centre = mean if pushed is None or pushed.push is None else mean + pushed.push
    mean, centre = mean.repeat_interleave(members, 0), centre.repeat_interleave(members, 0)
    latents_next = centre + std * noise.to(mean.device)
    log_probs = policy.log_prob(latents_next, mean, std, policy.reduce)
    return Step(interval, latents, latents_next, log_probs), velocity


def _in_calls(
    model: Model, latents: Latents, sigma: float, condition: Condition, guidance_scale: float, rows: int | None
) -> Latents:
    if rows is None or len(latents) <= rows:
        return model.velocity(latents, sigma, condition, guidance_scale)
    index: Int[Tensor, " b"] = torch.arange(len(latents))
    parts = [model.velocity(latents[at], sigma, condition.rows(at), guidance_scale) for at in index.split(rows)]
    return torch.cat(parts)

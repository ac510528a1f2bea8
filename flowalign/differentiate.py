"""Rollouts that gradients flow through: to the policy in the last steps of a path, or all the way to the start noise.

With activation checkpointing a step keeps its latents alone and is made anew in the backward pass, so that memory does
not grow with the steps before the first with gradient, and by one latent for each step after it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowalign.models.base import Model, Sigmas
from flowalign.records import Condition, Interval, intervals
from flowalign.rollout import Policy
from flowalign.schedules import Path
from flowalign.transitions import Transition

Latents = Float[Tensor, "b *d"]


@dataclass(frozen=True)
class Visit:
    """A step with gradient: latents at `interval.sigma`, the guided velocity there, and the rule it was made by."""

    interval: Interval
    transition: Transition
    latents: Latents
    velocity: Latents


@dataclass(frozen=True)
class Drawn:
    """What is decoded, and the steps with gradient on the way to it."""

    latents: Latents
    visits: tuple[Visit, ...]


def differentiable_rollout(
    model: Model,
    condition: Condition,
    start: Latents,
    sigmas: list[float],
    path: Path,
    policy: Policy = Policy(),
    step_noise: Callable[[int], Latents] | None = None,
    recompute: bool = True,
    first: int = 0,
) -> Drawn:
    """Samples along a path, with gradient from its step `gradient_from` on; the first steps keep nothing.

    Args:
        condition: one row for each row of `start`.
        start: latents at sigmas[first], `model.start` of unit noise; float32. Where the path has gradient from that
            step on, gradients flow into them.
        sigmas: the path's grid. Its last value may be 0 where the path is cut short: that Euler step gives x0hat.
        policy: guidance, and whether its unconditional half has gradient (then both halves are one doubled call).
        step_noise: the noise of step i, one row per sample; needed where the path has stochastic steps.
        recompute: activation checkpointing of each step with gradient; the numbers are the same to the last bit.
        first: the step that is made first, those before it being left out; steps keep their numbers.

    Raises: ValueError where the path's length is not the grid's, it branches, or stochastic steps have no noise.
    """
    grid = intervals(sigmas)
    if len(path.transitions) != len(grid) or path.branches:
        raise ValueError(f"a grid of {len(grid)} steps needs a path of as many that does not branch, not {path}")
    if path.stochastic and step_noise is None:
        raise ValueError(f"steps {list(path.stochastic)} are stochastic and need step_noise")
    latents, visits = start, list[Visit]()
    for interval, transition in zip(grid[first:], path.transitions[first:], strict=True):
        learnt = torch.is_grad_enabled() and interval.index >= path.gradient_from
        with torch.set_grad_enabled(learnt):
            velocity = velocity_at(model, latents, interval.sigma, condition, policy, learnt and recompute)
            mean, std = transition(latents, velocity, interval)
        if learnt:
            visits.append(Visit(interval, transition, latents, velocity))
        latents = mean
        if step_noise is not None and std > 0:
            latents = mean + std * step_noise(interval.index).to(mean.device)
    return Drawn(model.finish(latents, sigmas[-1]), tuple(visits))


def reference_velocity(
    model: Model, visit: Visit, condition: Condition, policy: Policy = Policy(), recompute: bool = True
) -> Latents:
    """The reference's guided velocity at a step's latents, with their gradient where they have one.

    Both velocities of a KL depend on where the policy has come to: without this gradient the KL's own would be wrong.

    Args:
        condition: one row for each row of the step's latents.
    """
    learnt = visit.latents.requires_grad and torch.is_grad_enabled()
    with torch.set_grad_enabled(learnt):
        return velocity_at(model, visit.latents, visit.interval.sigma, condition, policy, learnt and recompute, True)


def velocity_at(
    model: Model,
    latents: Latents,
    sigma: float | Sigmas,
    condition: Condition,
    policy: Policy,
    recompute: bool,
    reference: bool = False,
) -> Latents:
    """The guided velocity, in the calls of a differentiable rollout.

    Args:
        sigma: of all rows, or one for each in double precision.
        recompute: keep the latents alone, and make the call anew in the backward pass.
        reference: whether it is the reference's, which has gradient in its latents only. Its calls are those of the
            policy's velocity that it is compared with, so that rounding alone makes no difference between the two.
    """

    check_recompute(model, recompute)

    def call(given: Tensor) -> Tensor:
        scale, both = policy.guidance_scale, policy.unconditional_grad
        with model.reference() if reference else nullcontext():
            if isinstance(sigma, Tensor):
                return model.velocity_rows(given, sigma, condition, scale, both)
            if both or not (reference or torch.is_grad_enabled()):
                return model.velocity(given, sigma, condition, scale)
            return model.velocity_split(given, sigma, condition, scale)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return model.meter.forgotten(), model.as_now()  # what is made first keeps nothing; what is made anew does

    if not recompute:
        return call(latents)
    # a network draws nothing at random, else no rollout could be replayed
    made: Tensor = checkpoint(call, latents, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)
    return made


def check_recompute(model: Model, recompute: bool) -> None:
    """Raises: ValueError for a network in shards, all of which a step that is made anew as one would gather at once."""
    if recompute and model.sharded:
        raise ValueError(
            "recompute makes a whole step anew in the backward pass, which would gather all of a network that "
            "memory.shard has in parts; set recompute: false, and model.gradient_checkpointing: true instead"
        )

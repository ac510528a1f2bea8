"""Completions: the clean samples that the ODE makes of a rollout's noisy latents, all steps' in one walk of the grid.

From noisy latents the ODE goes on along points of the rollout's own grid. Latents that started at different steps meet
at its points, so that one network call serves them all. What is known is not made again: the first velocity of a
stochastic step's own latents is the rollout's, and routes from one start are one as far as they visit the same points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.models.base import Model
from flowalign.records import Condition, Step
from flowalign.transitions import ode

Latents = Float[Tensor, "_ *d"]
Rows = Int[Tensor, " _"]
Route = tuple[int, ...]  # points of a grid by number, from a start to the grid's end


def completion_points(step: int, steps: int, count: int | None = None) -> Route:
    """The points of a grid of `steps` steps that an ODE from point `step` visits on its way to the last one.

    All that are left, or `count` steps' worth spread evenly by number, if as many are left.
    """
    left = steps - step
    made = left if count is None else min(count, left)
    return tuple(step + i * left // made for i in range(made + 1))


def thinned_points(first: int, steps: int, stride: int) -> Route:
    """The points that an ODE visits from point `first` on: the next one, and every stride-th after that, to the end.

    G2RPO's sigmas[:k + 2] + sigmas[k + 2 :: stride] behind step k = first - 1 (arXiv:2510.01982). Where that leaves out
    the grid's end, its authors' code takes x_0 of the last call: the point before goes to the end at once, as here.
    """
    points = [first, *range(first + 1, steps + 1, stride)]
    return (*points[:-1], steps)


def calls_of(routes: Sequence[Route]) -> tuple[int, ...]:
    """The points of the network calls that routes from one start take, each call made once for all that share it."""
    return tuple(way[-1] for way in dict.fromkeys(route[:i] for route in routes for i in range(1, len(route))))


@torch.no_grad()
def complete(
    model: Model,
    condition: Condition,
    steps: Sequence[Step],
    velocities: Sequence[Tensor],
    sigmas: list[float],
    guidance_scale: float = 1.0,
    count: int | None = None,
    rows_per_call: int | None = None,
) -> tuple[Tensor, ...]:
    """x_0 of the ODE from the latents of each step, in `count` steps; what a rollout would end at without more noise.

    With all steps left (count None) they are the steps that `flowalign.rollout` makes: completions of two points on
    one ODE path are equal, to the last bit where the network's numbers do not depend on the rows beside them.

    Args:
        condition: one row for each row of the first step's latents; a later step may have several times as many.
        steps: of a rollout, each with one row of latents per row of its velocity.
        velocities: guided, at the latents [r, ...] of each step.
        sigmas: the rollout's grid.
        rows_per_call: the most rows in a network call; None for all.
    """
    routes = [completion_points(step.interval.index, len(sigmas) - 1, count) for step in steps]
    told = [torch.arange(len(condition)).repeat_interleave(len(v) // len(condition)) for v in velocities]
    held = [
        ode(step.latents, velocity, sigmas[route[0]], sigmas[route[1]])[0]
        for step, velocity, route in zip(steps, velocities, routes, strict=True)
    ]
    onward = [(i, route[1:]) for i, route in enumerate(routes)]
    return follow(model, condition, held, told, onward, sigmas, guidance_scale, rows_per_call)


@torch.no_grad()
def follow(
    model: Model,
    condition: Condition,
    starts: Sequence[Latents],
    told: Sequence[Rows],
    routes: Sequence[tuple[int, Route]],
    sigmas: list[float],
    guidance_scale: float = 1.0,
    rows_per_call: int | None = None,
) -> tuple[Tensor, ...]:
    """x_0 at the end of each route: (number of its start, points of the grid from there to the grid's end).

    Args:
        starts: latents. told: for each row of a start that of the condition.
        rows_per_call: the most rows in a network call; None for all.
    """
    held = {(start, route[:1]): starts[start] for start, route in routes}
    for at in range(len(sigmas) - 1):
        ways = [(start, route[: route.index(at) + 1]) for start, route in routes if at in route[:-1]]
        here = [*dict.fromkeys(ways)]
        if not here:
            continue
        latents, rows = torch.cat([held[way] for way in here]), torch.cat([told[start] for start, _ in here])
        most = rows_per_call or len(rows)
        made = [
            model.velocity(some, sigmas[at], condition.rows(whose), guidance_scale)
            for some, whose in zip(latents.split(most), rows.split(most), strict=True)
        ]
        for (start, way), velocity in zip(here, torch.cat(made).split([len(held[one]) for one in here]), strict=True):
            before = held.pop((start, way))
            for point in _onward(way, [route for number, route in routes if number == start]):
                held[start, (*way, point)], _ = ode(before, velocity, sigmas[at], sigmas[point])
    return tuple(model.finish(held[route], sigmas[-1]) for route in routes)


def _onward(way: Route, routes: Sequence[Route]) -> set[int]:
    """The points that routes with this beginning visit next."""
    return {route[len(way)] for route in routes if route[: len(way)] == way and len(route) > len(way)}

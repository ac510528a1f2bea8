"""Completions: the clean samples that the ODE makes of a rollout's noisy latents, all steps' in one walk of the grid.

From the latents of a stochastic step the ODE goes on along points of the rollout's own grid. Latents that started at
different steps meet at its points, so that one network call serves them all, and the first velocity of each is the one
that the rollout has made already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowalign.models.base import Model
from flowalign.records import Condition, Step
from flowalign.transitions import ode


def completion_points(step: int, steps: int, count: int | None = None) -> tuple[int, ...]:
    """The points of a grid of `steps` steps that an ODE from point `step` visits on its way to the last one.

    All that are left, or `count` steps' worth spread evenly by number, if as many are left.
    """
    left = steps - step
    made = left if count is None else min(count, left)
    return tuple(step + i * left // made for i in range(made + 1))


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
    for at in range(len(sigmas) - 1):
        here = [i for i, route in enumerate(routes) if at in route[1:]]
        if not here:
            continue
        latents, rows = torch.cat([held[i] for i in here]), torch.cat([told[i] for i in here])
        most = rows_per_call or len(rows)
        made = [
            model.velocity(some, sigmas[at], condition.rows(whose), guidance_scale)
            for some, whose in zip(latents.split(most), rows.split(most), strict=True)
        ]
        for i, velocity in zip(here, torch.cat(made).split([len(held[i]) for i in here]), strict=True):
            onward = routes[i][routes[i].index(at) + 1]
            held[i], _ = ode(held[i], velocity, sigmas[at], sigmas[onward])
    return tuple(model.finish(latents, sigmas[-1]) for latents in held)

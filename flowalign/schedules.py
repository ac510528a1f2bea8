"""Where a rollout steps and how: sigma grids, and plans that say which steps are stochastic.

A grid is n + 1 falling values from 1 (noise) to 0 (data). A plan resolves to one transition per step; steps it does not
choose are ODE steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from flowalign.randomness import key_generator
from flowalign.transitions import ODE, Transition


def linear(steps: int) -> list[float]:
    """Evenly spaced sigmas 1, 1 - 1/steps, ..., 0."""
    if steps < 1:
        raise ValueError(f"a grid needs at least 1 step, got {steps}")
    return [1 - i / steps for i in range(steps)] + [0.0]


def shifted(sigmas: list[float], shift: float) -> list[float]:
    """shift s / (1 + (shift - 1) s) for each s: shift > 1 puts more steps near the noise (arXiv:2403.03206, eq. 23)."""
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}")
    return [shift * s / (1 + (shift - 1) * s) for s in sigmas]


@dataclass(frozen=True)
class ShiftedLinear:
    """`shifted(linear(steps), shift)`, as a model's `grid`.

    The model's scheduler shifts it again, and shifts multiply: on a pipeline of shift 3, ShiftedLinear(5 / 3) is the
    linear grid at shift 5.
    """

    shift: float

    def __post_init__(self) -> None:
        shifted([], self.shift)  # raises

    def __call__(self, steps: int) -> list[float]:
        return shifted(linear(steps), self.shift)


def flow_match_euler(steps: int, shift: float, train_steps: int = 1000) -> list[float]:
    """The grid of diffusers' FlowMatchEulerDiscreteScheduler(shift=shift).set_timesteps(steps).

    diffusers shifts twice: its training grid, whose end shift(1 / train_steps) is then the last nonzero point of a
    linear grid, and that grid again. SD3 at shift 3 thus takes a last step of .0089, whatever the number of steps.

    Args:
        steps: number of steps, >= 1.
        shift: the scheduler's `shift`; 3 for SD3 and SD3.5.
        train_steps: the scheduler's `num_train_timesteps`.
    """
    first, last = shifted([1.0, 1 / train_steps], shift)
    between = max(steps - 1, 1)
    points = [(first * (between - i) + last * i) / between for i in range(len(linear(steps)) - 1)]
    return shifted(points, shift) + [0.0]


@dataclass(frozen=True)
class Path:
    """A plan for one epoch: one transition per step, and where the members of a group part.

    branch = None: every sample has start noise and a trajectory of its own. branch = k: a group shares its start noise
    and the ODE steps before k; one network call per group serves all its members at step k, and they part there.
    branchings: instead of that (step, children) of a tree, in order: at each of these steps every row parts into so
    many, and steps between them are made once for all that will part later. roots: such trees of a group, each with
    start noise of its own.
    skipped: stochastic steps that a trainer which prunes its update leaves out of it.
    gradient_from: the first step that a differentiable rollout has gradient in.
    cut: how many steps are made where that is not all; the last of them then goes to sigma 0 at once (see `grid`).
    passed: points of the grid that are passed over, all of them after its last stochastic step (`flowalign.windows`).
    """

    transitions: tuple[Transition, ...]
    branch: int | None = None
    gradient_from: int = 0
    cut: int | None = None
    branchings: tuple[tuple[int, int], ...] = ()
    roots: int = 1
    skipped: tuple[int, ...] = ()
    passed: tuple[int, ...] = ()

    @property
    def branches(self) -> bool:
        """Whether samples share steps with others."""
        return self.branch is not None or bool(self.branchings)

    def members(self, group_size: int) -> int:
        """Samples that come of one row of the start.

        Raises: ValueError for a tree that has other than `group_size` leaves.
        """
        if self.branch is not None:
            return group_size
        members = math.prod(children for _, children in self.branchings)
        if self.branchings and members * self.roots != group_size:
            told = " x ".join(map(str, [self.roots, *(children for _, children in self.branchings)]))
            raise ValueError(
                f"the plan's tree has {told} = {members * self.roots} leaves (roots, then the children at each "
                f"branching), but sampling.group_size is {group_size}: they must be equal"
            )
        return members

    def children(self, step: int, members: int) -> int:
        """Rows that each row of a step becomes, where a row of the start becomes so many samples."""
        return members if step == self.branch else dict(self.branchings).get(step, 1)

    def width(self, step: int, members: int) -> int:
        """Rows of a step's network call for each row of the start; of the last latents, `members`."""
        return math.prod(self.children(before, members) for before in range(step))

    def grid(self, sigmas: list[float]) -> list[float]:
        """The points that are visited: all, or sigmas[:cut] + [0], whose last Euler step gives x0hat; less `passed`."""
        points = sigmas if self.cut is None else [*sigmas[: self.cut], 0.0]
        return [point for i, point in enumerate(points) if i not in self.passed]

    @property
    def stochastic(self) -> tuple[int, ...]:
        """The steps that have a density."""
        return tuple(i for i, transition in enumerate(self.transitions) if not isinstance(transition, ODE))


@runtime_checkable
class Plan(Protocol):
    """What a rollout of `steps` steps does in a given epoch; the same arguments give the same path."""

    def resolve(self, steps: int, epoch: int, seed: int) -> Path: ...


def _path(transition: Transition, chosen: Iterable[int], steps: int, shared_noise: bool) -> Path:
    chosen = sorted(chosen)
    if not chosen:
        raise ValueError(f"a plan must choose at least one stochastic step, but chooses none of {steps}")
    for step in chosen:
        if not 0 <= step < steps:
            raise ValueError(f"stochastic step {step} is outside a rollout of {steps} steps (0 to {steps - 1})")
    transitions = tuple(transition if i in chosen else ODE() for i in range(steps))
    return Path(transitions, chosen[0] if shared_noise else None)


@dataclass(frozen=True)
class Deterministic:
    """No step is stochastic: the ODE's own samples, for trainers that look at nothing but where a rollout ends."""

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        return Path((ODE(),) * steps)


@dataclass(frozen=True)
class AllSteps:
    """Every step is stochastic; Flow-GRPO (arXiv:2505.05470).

    last_step False makes the last one ODE, as Flow-Factory does: needed with CPS, Renoise and DDIM on a grid that ends
    at 0, where their last step has no noise, and wise where the last step is long, as its noise stays in the image.
    shared_noise gives a group one start noise.
    """

    transition: Transition
    last_step: bool = True
    shared_noise: bool = False

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        return _path(self.transition, range(steps if self.last_step else steps - 1), steps, self.shared_noise)


@dataclass(frozen=True)
class Window:
    """The `length` steps from `start` on are stochastic; MixGRPO (arXiv:2507.21802), with the window at rest."""

    transition: Transition
    start: int
    length: int
    shared_noise: bool = False

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        return _path(self.transition, range(self.start, self.start + self.length), steps, self.shared_noise)


@dataclass(frozen=True)
class ChosenSteps:
    """The listed steps are stochastic, in every epoch."""

    transition: Transition
    steps: tuple[int, ...]
    shared_noise: bool = False

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        return _path(self.transition, self.steps, steps, self.shared_noise)


@dataclass(frozen=True)
class RandomSteps:
    """`count` distinct steps are stochastic, drawn anew for every epoch from (seed, epoch).

    last_step False keeps the last one out of the draw.
    """

    transition: Transition
    count: int
    last_step: bool = True
    shared_noise: bool = False

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        among = steps if self.last_step else steps - 1
        if not 1 <= self.count <= among:
            raise ValueError(
                f"RandomSteps.count is {self.count}, but a rollout of {steps} steps has {among} to draw from"
            )
        chosen = key_generator(seed, "stochastic_steps", epoch).choice(among, self.count, replace=False)
        return _path(self.transition, chosen.tolist(), steps, self.shared_noise)


@dataclass(frozen=True)
class FanOut:
    """One stochastic step an epoch, from an ODE anchor the group shares, then ODE to the end; G2RPO (arXiv:2510.01982).

    The members of a group differ by that step's noise alone, so their rewards tell what it was worth. `steps` are taken
    in turn over the epochs.
    """

    transition: Transition
    steps: tuple[int, ...] = (0,)

    def resolve(self, steps: int, epoch: int, seed: int) -> Path:
        paths = [_path(self.transition, [step], steps, shared_noise=True) for step in self.steps]
        if not paths:
            raise ValueError("FanOut.steps is empty: name at least one step")
        return paths[epoch % len(paths)]

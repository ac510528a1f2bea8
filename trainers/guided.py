"""Rollouts that a process reward guides, and whose noisy latents it scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.guidance import Guide, Guided
from flowalign.media import shown
from flowalign.models.base import Model
from flowalign.randomness import key_noise, keyed_globals
from flowalign.records import Prompts, PromptSet, Scores, Trajectory
from flowalign.rollout import Policy
from flowalign.schedules import Path
from rewards.base import Reward
from trainers.batch import Sampling
from trainers.collection import Collection, Draw, Epoch
from trainers.overlap import Ask, Later

PREFIX = "process_"  # of the part of scores that holds the process reward at a step


class GuidedCollection(Collection):
    """Scores have a part `process_012` for each guided step: the reward of what its latents are denoised to.

    A sample of which a process reward, or its gradient, is not valid is moved by none there and not valid itself.

    Args:
        guided: where and how far. judge: scores pictures of denoised latents, each on its own.
    """

    def __init__(
        self,
        model: Model,
        reward: Reward,
        prompts: PromptSet,
        sampling: Sampling,
        policy: Policy,
        seed: int,
        guided: Guided,
        judge: Reward,
    ) -> None:
        super().__init__(model, reward, prompts, sampling, policy, seed)
        self.guided, self.judge = guided, judge

    def guide(self, epoch: Epoch, index: int, path: Path, draw: Draw) -> Guide:
        check_guided(self.guided, path)
        every = {step: epoch.members // path.width(step, epoch.members) for step in self.guided.steps}
        shape = self.model.latent_shape

        def reward(step: int, denoised: Tensor) -> Tensor:
            with keyed_globals(self.seed, "process_reward", epoch.number, index, step):
                return self._judged(denoised, draw.told.rows(range(0, len(draw.samples), every[step])))

        def signs(step: int, number: int) -> Tensor:
            rows = draw.samples[:: every[step]]
            keys = [(epoch.number, group, member, step, number) for group, member in rows]
            noise = torch.stack([key_noise(self.seed, "spsa", *key, shape=shape) for key in keys])
            return torch.ones_like(noise).copysign(noise)

        return Guide(self.guided, reward, signs)

    def _judged(self, denoised: Float[Tensor, b * d], told: Prompts) -> Float[Tensor, " b"]:
        """nan where a score is not valid; with gradient where the latents have one."""
        clean = self.model.finish(denoised, 0.0)
        parts = clean.split(self.sampling.rows_per_call)
        pixels = torch.cat([self.model.decode(part) for part in parts])
        self.model.meter.calls["decode"] += len(parts)
        scores = self.judge(shown(pixels, told, self.model.fps), told, grad=denoised.requires_grad)
        return scores.total.where(scores.valid, torch.nan).to(denoised.device)

    def score(self, epoch: Epoch, index: int, draw: Draw, made: Trajectory, kept: int, ask: Ask) -> Later:
        own = super().score(epoch, index, draw, made, kept, ask)
        names = [f"{PREFIX}{step:03d}" for step in sorted(self.guided.steps)]
        each = [value.cpu().repeat_interleave(len(draw.samples) // len(value))[:kept] for value in made.values]
        parts = {name: value.nan_to_num() for name, value in zip(names, each, strict=True)}

        def joined() -> Scores:
            scores = own()
            valid = torch.stack([value.isfinite() for value in each]).all(0) if each else scores.valid
            return replace(scores, parts=scores.parts | parts, valid=scores.valid & valid)

        return joined

    def needed(self, epoch: Epoch, trained: Callable[[Path], Sequence[int]], reference: bool) -> Rows:
        total = super().needed(epoch, trained, reference)
        for path, rows in epoch.paths:
            for step in self.guided.steps:
                calls = self.model.calls(self.policy.guidance_scale, path.grid(self.sigmas)[step])
                total += self.guided.beside(calls * rows * path.width(step, epoch.members))
        return total


def check_guided(guided: Guided, path: Path) -> None:
    """Raises: ValueError where a guided step is none whose mean can be moved."""
    free = [step for step in guided.steps if step not in path.stochastic]
    if free:
        raise ValueError(
            f"guided.steps names step {free[0]}, but the plan's stochastic steps, whose means guidance moves, are "
            f"{list(path.stochastic)}"
        )


def process_rewards_of(scores: Scores) -> Float[Tensor, "b k"]:
    """Those of each guided step in order; none where there is none."""
    names = sorted(name for name in scores.parts if name.startswith(PREFIX))
    return torch.stack([scores.parts[name] for name in names], 1) if names else torch.zeros(len(scores), 0)

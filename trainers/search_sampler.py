"""A call of a search: start noises become scored media, if asked for with the gradient of an objective to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.differentiate import differentiable_rollout
from flowalign.media import shown
from flowalign.models.base import Model
from flowalign.randomness import key_noise, keyed_globals
from flowalign.records import Prompts, Scores
from flowalign.rollout import Policy
from flowalign.sample import start_noise
from flowalign.schedules import Path
from flowalign.sizes import Call
from rewards.base import Reward
from trainers.batch import detached
from trainers.search_cost import Prices, Spent, measured
from trainers.search_state import Made, frozen

LOSS_SCALE = 2.0**10  # of a gradient on its way through fp16; a power of two changes no digit

Objective = Callable[[Float[Tensor, " b"], Float[Tensor, "b *d"]], Float[Tensor, " b"]]  # of rewards and noises


@dataclass(frozen=True)
class Sampler:
    """Samples and scores by one path, from keyed noise; no weight gets a gradient, or changes."""

    model: Model
    reward: Reward
    prompts: Prompts
    path: Path
    policy: Policy
    recompute: bool
    seed: int

    @property
    def sigmas(self) -> list[float]:
        """The grid, of media of the present size."""
        return self.model.sigmas(len(self.path.transitions))

    def one(self, gradient: bool) -> Spent:
        """What one sample costs."""
        rows = sum(self.model.calls(self.policy.guidance_scale, sigma) for sigma in self.sigmas[:-1])
        if not gradient:
            return Spent(Rows(rows), Rows(1), Rows(1))
        return Spent(Rows(rows if self.recompute else 0, rows), Rows(0, 1), Rows(0, 1))

    def noise(self, number: int, member: int = 0) -> Float[Tensor, "*d"]:
        """Keyed start noise of a prompt, on the CPU; member 0 is what `flowalign sample` starts from."""
        keys = self.prompts.rows([number]).noise_keys([number])
        if member == 0:
            return start_noise(self.model, self.seed, "sample", keys)[0]
        return key_noise(self.seed, "sample", *keys, member, shape=self.model.latent_shape)

    def call(
        self,
        noise: Float[Tensor, b * d],
        numbers: Sequence[int],
        members: Sequence[int],
        objective: Objective | None = None,
    ) -> Made:
        """One sample from each noise, scored; with an objective, its gradient to each noise too.

        Args:
            noise: on the CPU. numbers: of the prompts. members: what their step noise is keyed by, on stochastic plans.
        """
        began, told = time.perf_counter(), self.prompts.rows(numbers)
        given = noise.to(self.model.device, copy=True).requires_grad_(objective is not None)
        self.model.meter.take()
        with torch.set_grad_enabled(objective is not None), frozen(self.model.trainable().values()):
            pixels = self._pixels(given, told, [*zip(told.noise_keys(numbers), members, strict=True)])
            with keyed_globals(self.seed, "search_reward"):
                media = shown(pixels, told, self.model.fps)
                scores = self.reward(media, told, grad=objective is not None)
            gradient = None if objective is None else self._gradient(scores, given, objective)
        known, rows = detached(scores), self.model.meter.take()[1]
        network, each = _share(rows, len(told)), Rows(1) if objective is None else Rows(0, 1)
        seconds = time.perf_counter() - began
        return Made(noise, pixels.detach(), known, gradient, Spent(network, each, each), seconds)

    def _pixels(
        self, noise: Float[Tensor, b * d], told: Prompts, keys: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "b *frames 3 h w"]:
        def step_noise(step: int) -> Float[Tensor, b * d]:
            shape = self.model.latent_shape
            return torch.stack([key_noise(self.seed, "search_step", *key, step, shape=shape) for key in keys])

        model, sigmas = self.model, self.sigmas
        condition = model.condition(told)
        start = model.start(noise, sigmas[0], condition)
        drawn = differentiable_rollout(
            model, condition, start, sigmas, self.path, self.policy, step_noise, self.recompute
        )
        return model.decode(drawn.latents)

    def _gradient(self, scores: Scores, noise: Float[Tensor, b * d], objective: Objective) -> Float[Tensor, b * d]:
        """On the CPU, 0 where the score is not valid."""
        if not scores.total.requires_grad:
            raise ValueError(f"{self.reward.name} says that it is differentiable, but its scores have no gradient")
        scale = LOSS_SCALE if self.model.scale_loss else 1.0
        values = objective(scores.total, noise.to(scores.total.device))
        gradient = self.model.slope(values.where(scores.valid.to(values.device), 0.0).sum() * scale, noise)
        return gradient.float().cpu() / scale

    @torch.no_grad()
    def remake(self, noise: Float[Tensor, "*d"], number: int, member: int = 0) -> Float[Tensor, "*frames 3 h w"]:
        """The media in [0, 1] that prompt `number` has from a noise."""
        told = self.prompts.rows([number])
        return self._pixels(noise[None].to(self.model.device), told, [(told.noise_keys([number])[0], member)])[0]

    @torch.no_grad()
    def measure(self, call: Call, samples: int) -> Prices:
        """Prices of decode and reward, by a call of the first prompts of a size."""
        rows, model, scale = call.rows[:samples], self.model, self.policy.guidance_scale
        told, sigmas = self.prompts.rows(rows), self.sigmas
        noise = torch.stack([self.noise(number) for number in rows]).to(model.device)
        condition = model.condition(told)
        latents = model.start(noise, sigmas[0], condition)
        media = shown(model.decode(latents), told, model.fps)
        with keyed_globals(self.seed, "search_reward"):
            prices = measured(
                lambda: model.velocity(latents, sigmas[0], condition, scale),
                lambda: model.decode(latents),
                lambda: self.reward(media, told),
                model.calls(scale, sigmas[0]) * len(rows),
                len(rows),
            )
        model.meter.take()
        return prices


def _share(rows: Rows, samples: int) -> Rows:
    """Of one sample in a call of equal ones."""
    return Rows(rows.forward // samples, rows.gradient // samples)

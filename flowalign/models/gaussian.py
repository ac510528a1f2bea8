"""The closed-form model of the tests: data N(m, s2) in every element, an oracle for every sampler and trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from flowalign.models.base import Model
from flowalign.records import Condition
from flowalign.schedules import flow_match_euler
from flowalign.user_errors import written_to


class GaussianModel(Model):
    """Rectified flow of N(mean, variance) data, plus a policy that may add an affine velocity of its own at each sigma.

        v(x, s) = A (x - (1 - s) m) - m + gain_k x + bias_k,   A = (s - (1 - s) s2) / ((1 - s)^2 s2 + s^2)

    gain and bias start at 0, one pair for each sigma of `grid`; between grid points the policy adds nothing. Every
    optimum of a KL-regularised linear reward lies in this family.

    Args:
        mean, variance: of the data.
        dims: elements of a sample.
        grid: sigmas at which the policy can act; the rollouts' own grid, by default ten steps of SD3's.
    """

    def __init__(
        self, mean: float = 0.0, variance: float = 1.0, dims: int = 1, grid: Sequence[float] | None = None
    ) -> None:
        self.mean, self.variance = mean, variance
        self.latent_shape = (dims,)
        self.device = torch.device("cpu")
        self.grid = list(flow_match_euler(10, 3.0) if grid is None else grid)
        self.gain = nn.Parameter(torch.zeros(len(self.grid), dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(len(self.grid), dtype=torch.float32))
        self._adapted = True

    def encode(self, prompts: Sequence[str], negatives: Sequence[str | None] | None = None) -> Condition:
        return Condition(torch.zeros(len(prompts), 1, 1))

    def sigmas(self, steps: int) -> list[float]:
        if steps != len(self.grid) - 1:
            raise ValueError(f"this model's grid has {len(self.grid) - 1} steps, not {steps}")
        return list(self.grid)

    def train_sigmas(self) -> list[float]:
        """Those at which the policy can act."""
        return self.grid[:-1]

    def network(
        self,
        latents: Float[Tensor, b * d],
        sigma: float,
        condition: Condition,
        negative: bool = False,
        guidance_scale: float = 1.0,
    ) -> Float[Tensor, b * d]:
        keep = 1 - sigma
        slope = (sigma - keep * self.variance) / (keep**2 * self.variance + sigma**2)
        velocity = slope * (latents - keep * self.mean) - self.mean
        if not self._adapted or negative or sigma not in self.grid:
            return velocity
        step = self.grid.index(sigma)
        return velocity + self.gain[step] * latents + self.bias[step]

    def network_doubled(
        self, latents: Float[Tensor, b * d], sigma: float, condition: Condition
    ) -> tuple[Float[Tensor, b * d], Float[Tensor, b * d]]:
        return self.network(latents, sigma, condition, False), self.network(latents, sigma, condition, True)

    def decode(self, latents: Float[Tensor, b * d]) -> Float[Tensor, "b 3 1 1"]:
        return latents.mean(1).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {"gain": self.gain, "bias": self.bias}

    def reference(self) -> AbstractContextManager[None]:
        return self._with(False)

    def as_now(self) -> AbstractContextManager[None]:
        return self._with(self._adapted)

    @contextmanager
    def _with(self, adapted: bool) -> Iterator[None]:
        before, self._adapted = self._adapted, adapted
        try:
            yield
        finally:
            self._adapted = before

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "policy.safetensors"
        with written_to(path):
            save_file({name: value.detach() for name, value in self.trainable().items()}, path)

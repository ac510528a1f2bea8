"""Best-of-N: the sample with the highest reward among N of each prompt.

best = argmax_{i < N} r(G(e_i), prompt),   e_i ~ N(0, I)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from flowalign.models.base import Model
from flowalign.prompts import PromptData
from flowalign.schedules import Plan
from rewards.base import Reward
from trainers.search import Search
from trainers.search_cost import Prices
from trainers.search_state import Line

MANY = 1_000_000  # samples of a prompt where a budget says when to stop


class BestOfN(Search):
    """The best of N samples of each prompt, from N keyed start noises; the first is the plain sample's.

    Takes any reward. A sample whose score is not valid is no candidate, and is counted.

    Args:
        model: an adapter, or a pipeline, its folder, hub id or embedded name.
        reward: a reward, a function of media and prompts, or a formula; it scores each sample on its own.
        prompts: texts, records or a file, with seeds and sizes of their own where they say so.
        samples: N; None for 16, or as many as the budget pays for.
        steps, guidance_scale: of the rollout.
        plan: which steps are stochastic; None for the ODE.
        seed: of all noise.
        batch_size: samples in a call.
        budget: of each prompt, in forwards of one network row (`trainers.search_cost`); None for no limit.
        prices: of decode and reward in that unit; None to measure them at the start.
        folder: what `run` writes into, and goes on in.
        save_seconds: between two saves of what is under way; 0 after every call. What has ended is saved at once.
    """

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        samples: int | None = None,
        steps: int = 1,
        guidance_scale: float = 1.0,
        plan: Plan | None = None,
        seed: int = 0,
        batch_size: int = 16,
        budget: float | None = None,
        prices: Prices | None = None,
        folder: str = "runs/best_of_n",
        save_seconds: float = 60.0,
    ) -> None:
        if samples is not None and samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        tries = samples or (16 if budget is None else MANY)
        super().__init__(
            model, reward, prompts, tries, steps, guidance_scale, plan, False, seed, batch_size, budget, prices, folder,
            save_seconds,
        )  # fmt: skip

    def begin(self, number: int) -> dict[str, Tensor]:
        return {}

    def width(self, line: Line, most: int) -> int:
        return most - line.tried

    def noise(self, line: Line, number: int) -> Float[Tensor, "*d"]:
        return self.sampler.noise(line.number, number)

    def learn(self, line: Line, valid: bool, gradient: Float[Tensor, "*d"] | None) -> None:
        """Nothing: no sample depends on another."""

"""ReNO: reward-based noise optimisation (arXiv:2406.04312, section 3), gradient ascent on a sample's start noise.

    max_e  r(G(e), prompt) - w ( ||e||^2 / 2 - (d - 1) log ||e|| )

The second term is, up to a constant, the negative log density of the norm of d normal numbers: it holds the noise on
the shell that the generator was trained on. The authors minimise sum_i w_i (c_i - r_i) with constants c_i; their w_i
are the weights in a formula of rewards. The best sample is that of the highest reward, without the regulariser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from flowalign.models.base import Model
from flowalign.prompts import PromptData
from flowalign.schedules import Plan
from rewards.base import Reward
from trainers.noise_optim import Nesterov, NoiseOptimizer, clipped
from trainers.search import Search
from trainers.search_cost import Prices
from trainers.search_state import Line

Noise = Float[Tensor, "b *d"]


def regulariser(noise: Noise) -> Float[Tensor, " b"]:
    """||e||^2 / 2 - (d - 1) log ||e|| of each noise of d numbers: least, and flat, at ||e|| = sqrt(d - 1)."""
    flat = noise.flatten(1)
    norm = flat.norm(dim=1)
    return norm.square() / 2 - (flat.shape[1] - 1) * norm.log()


def objective(rewards: Float[Tensor, " b"], noise: Noise, weight: float) -> Float[Tensor, " b"]:
    """r - w (||e||^2 / 2 - (d - 1) log ||e||) of each sample, to be made large; see the top of this module."""
    return rewards - weight * regulariser(noise)


class ReNO(Search):
    """The best of the samples on a path of gradient ascent from the plain sample's noise, prompt by prompt.

    Each iteration samples, scores, and moves the noise; the last one does not move it. Prompts share calls, and nothing
    else: each has its own momentum, its own clip and its own end. The defaults are the authors', for one-step models
    with latents of 16,384 numbers. A prompt whose score or gradient is not finite ends at its best so far.

    Args:
        model, prompts, steps, guidance_scale, plan, seed, budget, prices, folder, save_seconds: see `BestOfN`. A
            stochastic plan draws the same step noise in every iteration.
        reward: as there, but with a gradient.
        iterations: samples of each prompt, the plain one among them.
        optimizer: `Nesterov`, `Adam`, or a rule of yours.
        max_grad_norm: of a prompt's gradient; 0.1 as in the authors' code.
        regularisation: w.
        patience: iterations without a better reward after which a prompt ends; None for all iterations.
        batch_size: prompts in a call.
        recompute: activation checkpointing of each step: less memory for one more forward.
    """

    needs_gradient = True

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        iterations: int = 50,
        optimizer: Nesterov | NoiseOptimizer = Nesterov(),  # a mapping without a class is Nesterov's
        max_grad_norm: float = 0.1,
        regularisation: float = 0.01,
        patience: int | None = None,
        steps: int = 1,
        guidance_scale: float = 1.0,
        plan: Plan | None = None,
        recompute: bool = False,
        seed: int = 0,
        batch_size: int = 1,
        budget: float | None = None,
        prices: Prices | None = None,
        folder: str = "runs/reno",
        save_seconds: float = 60.0,
    ) -> None:
        if iterations < 1 or (patience is not None and patience < 1):
            raise ValueError(f"iterations and patience must be at least 1, got {iterations} and {patience}")
        if not max_grad_norm > 0 or regularisation < 0:
            raise ValueError(
                "max_grad_norm must be positive and regularisation at least 0, "
                f"got {max_grad_norm} and {regularisation}"
            )
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm
        self.regularisation, self.patience = regularisation, patience
        super().__init__(
            model, reward, prompts, iterations, steps, guidance_scale, plan, recompute, seed, batch_size, budget,
            prices, folder, save_seconds,
        )  # fmt: skip

    def settings(self) -> Mapping[str, Any]:
        return {
            "optimizer": repr(self.optimizer),
            "max_grad_norm": self.max_grad_norm,
            "regularisation": self.regularisation,
            "patience": self.patience,
        }

    def objective(self, rewards: Float[Tensor, " b"], noise: Noise) -> Float[Tensor, " b"]:
        return objective(rewards, noise, self.regularisation)

    def begin(self, number: int) -> dict[str, Tensor]:
        noise = self.sampler.noise(number)[None]
        return {"noise": noise, **self.optimizer.moments(noise)}

    def width(self, line: Line, most: int) -> int:
        return 1

    def noise(self, line: Line, number: int) -> Float[Tensor, "*d"]:
        return line.state["noise"][0]

    def step_key(self, number: int) -> int:
        return 0

    def learn(self, line: Line, valid: bool, gradient: Float[Tensor, "*d"] | None) -> None:
        """One step of the noise against the clipped gradient of the loss, -objective."""
        if not valid:
            line.stopped = f"the score of try {line.tried - 1} is not valid"
        elif gradient is not None and not bool(gradient.isfinite().all()):
            line.stopped = f"the gradient of try {line.tried - 1} is not finite"
        elif self.patience is not None and line.best is not None and line.tried > line.best.number + self.patience:
            line.stopped = f"no better score in {self.patience} tries"
        if line.stopped or gradient is None:
            return
        noise, moments = line.state["noise"], {k: v for k, v in line.state.items() if k != "noise"}
        moved, moments = self.optimizer.step(noise, clipped(-gradient[None], self.max_grad_norm), moments)
        line.state = {"noise": moved, **moments}

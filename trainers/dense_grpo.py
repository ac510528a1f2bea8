"""DenseGRPO: policy gradients that reward each step for what its own noise was worth (arXiv:2601.20218).

    V_t  = R(ODE_n(x_t, c), c)           the reward of what the ODE makes of x_t in n steps
    dR_t = V_{t-1} - V_t                 the gain of the step from x_t to x_{t-1}; they sum to R(x_0) - V_T
    A_t  = z-score of dR_t over the group, for each t on its own;   loss of Flow-GRPO with A_t in A's place

The SDE's g is a table psi(t) (eq. 11), which may be calibrated before training (algorithm 1): see
`trainers.noise_calibration`. No code has been released.

With n = all the steps left, a step of the plan that is an ODE step gains nothing, so that a stochastic step is held
against the next stochastic one, or against x_0. With fewer, the ODE steps between the two count as the first one's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.advantages import group_advantages
from flowalign.credit import TermCredit
from flowalign.models.base import Model
from flowalign.prompts import PromptData
from flowalign.records import Scores
from flowalign.rollout import LogProb
from flowalign.schedules import AllSteps, FanOut, Path
from flowalign.tracking import Run, TrackerName
from flowalign.transitions import FlowSDE, Reduce, exact_kl, gaussian_log_prob, mean_of_elements
from flowalign.windows import PromptPlan
from rewards.base import Reward
from trainers.batch import OnInvalid, Sampling
from trainers.completed import CompletedCollection, Steps, completed_rewards_of
from trainers.evaluation import Evaluation
from trainers.flow_grpo import KL, Advantages, FlowGRPO
from trainers.keeper import Checkpoints, Keeper
from trainers.noise_calibration import Calibration, calibrate, noise_table
from trainers.optim import Optimizer
from trainers.ratio_guard import RatioCheck
from trainers.regularisers import AdaptiveCoefficient, Refresh
from trainers.resampling import EverySample, Selection
from trainers.supervised import Supervised

Values = Float[Tensor, "b k"]  # V of each completed step in order, then R(x_0)
StepRewards = Callable[[Tensor], Tensor]


def gains(values: Values) -> Float[Tensor, "b t"]:
    """dR: each value less the one before it."""
    return values.double().diff(dim=1)


def values_after(values: Values) -> Float[Tensor, "b t"]:
    """V of what a step leads to, not held against where it starts: the paper's "Dense Reward (Baseline)"."""
    return values[:, 1:].double()


def gains_to_go(values: Values) -> Float[Tensor, "b t"]:
    """The sum of a step's gain and all later ones: the outcome less what was to be had before the step."""
    return values[:, -1:].double() - values[:, :-1].double()


def least_gain_to_go(values: Values) -> Float[Tensor, "b t"]:
    """The least of a step's gain and all later ones: the min-form credit of PURE (arXiv:2504.15275)."""
    return gains(values).flip(1).cummin(1).values.flip(1)


def step_advantages(
    rewards: Float[Tensor, "b t"], group_ids: Int[Tensor, " b"], eps: float = 1e-4
) -> Float[Tensor, "b t"]:
    """`flowalign.advantages.group_advantages` of each step on its own, with eps added to the std.

    Late steps hardly move the picture, and a plain z-score would blow their rounding up to the size of all others.
    """
    return group_advantages(rewards, group_ids, eps=eps).float()


class DenseGRPO(FlowGRPO):
    """DenseGRPO with a LoRA policy.

    Args:
        model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch, clip_range,
            kl_coef, kl, step_fraction, log_prob, reduce, unconditional_grad, folder, seed, on_invalid, log_with,
            selection, refresh, supervised, ratio_check: as of `trainers.FlowGRPO`.
        completion_steps: n, ODE steps of a completion; None for all that are left, the paper's default.
        step_rewards: function of the values [b, t + 1] that gives each step its reward [b, t]: `gains`,
            `values_after`, `gains_to_go`, `least_gain_to_go` or `flowalign.credit.GatedGains`.
        advantages: function of those and of the group ids [b], or credit that reads those of each term of the reward.
        calibration: of the noise, before training; None keeps the plan's.
    """

    collection: CompletedCollection

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward | Callable[..., Any] | str,
        prompts: PromptData,
        sampling: Sampling = Sampling(AllSteps(FlowSDE(0.7))),
        optimizer: Optimizer = Optimizer(),
        evaluation: Evaluation = Evaluation(),
        checkpoints: Checkpoints = Checkpoints(),
        epochs: int = 100,
        updates_per_epoch: int = 2,
        clip_range: float = 1e-4,
        kl_coef: float | AdaptiveCoefficient = 0.04,
        kl: KL = exact_kl,
        completion_steps: int | None = None,
        step_rewards: StepRewards = gains,
        advantages: Advantages | TermCredit = step_advantages,
        calibration: Calibration | None = None,
        step_fraction: float = 1.0,
        log_prob: LogProb = gaussian_log_prob,
        reduce: Reduce = mean_of_elements,
        unconditional_grad: bool = False,
        folder: str = "runs/dense_grpo",
        seed: int = 0,
        on_invalid: OnInvalid = "stop",
        log_with: tuple[TrackerName, ...] = (),
        selection: Selection = EverySample(),
        refresh: Refresh = Refresh(),
        supervised: Supervised | None = None,
        ratio_check: RatioCheck = "recompute",
    ) -> None:
        if completion_steps is not None and not 1 <= completion_steps <= sampling.steps:
            raise ValueError(
                f"completion_steps must lie in 1 ... {sampling.steps}, the rollout's steps, or be null for all that "
                f"are left; got {completion_steps}"
            )
        self.completion_steps, self.step_rewards, self.calibration = completion_steps, step_rewards, calibration
        super().__init__(
            model, reward, prompts, sampling, optimizer, evaluation, checkpoints, epochs, updates_per_epoch,
            clip_range, kl_coef, kl, advantages, step_fraction, log_prob, reduce, unconditional_grad, folder, seed,
            on_invalid, log_with, selection, refresh, supervised, ratio_check=ratio_check,
        )  # fmt: skip

    def credit(self, scores: Scores, group_ids: Int[Tensor, " b"]) -> Float[Tensor, "b t"]:
        """A_t of each sample at each completed step."""
        return self.credit_of(lambda term: self.step_rewards(completed_rewards_of(scores, term)), group_ids)

    def completed_steps(self, path: Path) -> tuple[int, ...]:
        """The trained steps, and the one that the last of them is held against."""
        return path.stochastic[: len(self.trained_steps(path)) + 1]

    def collector(self, reward: Reward) -> CompletedCollection:
        return self.collector_of(reward, self.sampling, self.seed, self.completed_steps)

    def collector_of(self, reward: Reward, sampling: Sampling, seed: int, completed: Steps) -> CompletedCollection:
        """The same with other samples, or other steps completed."""
        made = CompletedCollection(
            self.model, reward, self.prompts, sampling, self.policy, seed, completed, self.completion_steps, self.reward
        )
        made.keep_latents = self.supervised is not None
        return made

    def prepare(self, run: Run, keeper: Keeper) -> None:
        if self.calibration is not None:
            calibrate(self, self.calibration, run, keeper)

    def check_sampling(self, sampling: Sampling) -> None:
        super().check_sampling(sampling)
        if isinstance(sampling.plan, FanOut):
            raise ValueError(
                "sampling.plan is FanOut: its groups share all but one step's noise, so that a gain is the reward less "
                "the group's constant, and its completions would change nothing. Train with trainers.FlowGRPO"
            )

    def _check(self) -> None:
        super()._check()
        if isinstance(self.sampling.plan, PromptPlan) and any(one.path for one in self.collection.epoch(0).buckets):
            raise ValueError(
                "sampling.plan gives each prompt stochastic steps of its own, but a gain is held against those of the "
                "same step in all groups: take RandomWindow or Window"
            )
        path = self.collection.epoch(0).path
        if path.branches and len(path.stochastic) == 1:
            raise ValueError(
                "the plan has one stochastic step whose start the group shares: a gain is then the reward less the "
                "group's constant. Set shared_noise: false in the plan, or train with trainers.FlowGRPO"
            )
        if self.reward.card.scope != "sample":
            raise ValueError(
                f"{self.reward.name} compares samples with one another; a gain is the difference of two rewards of one "
                "sample, which must not depend on the others: take a reward that scores each sample on its own"
            )
        if self.calibration is not None:
            noise_table(path, self.sigmas)  # raises where there is no g to move

    def remarks(self) -> tuple[str, ...]:
        told, calibration = super().remarks(), self.calibration
        return told if calibration is None or self.state.epoch else (*told, calibration.remark(self.sampling))

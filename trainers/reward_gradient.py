"""Trainers by a reward's own gradient: an optimizer step draws samples, scores them, and goes back through the rollout.

A method says which steps have gradient (its plan), what the loss makes of rewards and velocities, and perhaps from
where samples start; the order of things stands in `trainers.path_steps` alone.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.differentiate import Drawn, check_recompute, differentiable_rollout
from flowalign.gradient_plans import GradientPlan
from flowalign.records import Scores
from flowalign.schedules import Path
from rewards.base import Combination, Reward
from trainers.base import Trainer, Worked
from trainers.batch import Sampling, means
from trainers.collection import Draw, Epoch
from trainers.named_files import check_images, check_media, check_references
from trainers.path_steps import PathSteps, Scored, scores_of

if TYPE_CHECKING:
    from trainers.keeper import Keeper
    from trainers.preflight.family import Family

TINY = 0.3  # of the step before: flows' grids of diffusers are below it up to 50 steps, linear ones above


class RewardGradientTrainer(Trainer):
    """A trainer whose loss is differentiated through decoder and rollout; see the subclasses.

    recompute: activation checkpointing of every step with gradient.
    views: pictures that are scored for each sample, whose mean is its reward.
    """

    recompute: bool
    views: int = 1

    @abstractmethod
    def loss(self, scored: Scored) -> Float[Tensor, " b"]:
        """The objective of each picture, not yet averaged."""

    def picture_loss(self, scores: Scores) -> Float[Tensor, " b"]:
        """What a check goes back through from each picture's score, where the loss takes more memory than the score."""
        return scores.total

    def watch(self, scored: Scored, losses: Float[Tensor, " b"]) -> dict[str, Float[Tensor, " b"]]:
        """What is `watched`, of each picture."""
        return {"loss": losses.detach()}

    def watched(self) -> tuple[str, ...]:
        return ("loss",)

    def rollout(self, epoch: Epoch, draw: Draw, sigmas: list[float]) -> Drawn:
        """Samples with gradient in the plan's steps: `views` of each row, next to one another.

        Args:
            sigmas: the grid of media of the model's present size.
        """
        grid, told = epoch.path.grid(sigmas), draw.condition
        start = self.model.start(draw.start, sigmas[0], told)
        return differentiable_rollout(
            self.model, told, start, grid, epoch.path, self.policy, draw.step_noise, self.recompute
        )

    def beside(self, epoch: Epoch, draw: Draw) -> Float[Tensor, " b"] | None:
        """A loss of each sample that does not look at the reward, within reach of the policy; none by default."""
        return None

    def first_step(self) -> int:
        """The first step of the grid that is made."""
        return 0

    def trained_steps(self, path: Path) -> tuple[int, ...]:
        """The steps with gradient."""
        return tuple(range(path.gradient_from, len(path.transitions)))

    def kept_calls(self, path: Path) -> int:
        """Guided calls of a micro-batch that its backward pass goes through, which is what it keeps in memory.

        The reference's at a step's latents is one of them, but for the first step, whose latents have no gradient.
        """
        learnt = len(self.trained_steps(path))
        return 2 * learnt - 1 if self.needs_reference() else learnt

    def needs_media(self) -> bool:
        """Whether every prompt has to name a real picture or video, as "media" in its record."""
        return False

    def remarks(self) -> tuple[str, ...]:
        sigmas, path = self.sigmas, self.collection.epoch(0).path
        last = sigmas[-2] - sigmas[-1]
        if path.cut is not None or path.gradient_from < len(sigmas) - 2 or len(sigmas) < 3:
            return ()
        if last >= TINY * (sigmas[-3] - sigmas[-2]):
            return ()
        return (
            f"only the last step has gradient, and it is tiny ({sigmas[-2]:.4f} to {sigmas[-1]:.4f}): the policy's "
            f"gradient is scaled by {last:.4f}, and K = 1 hardly trains. Take sampling.plan LastSteps with count 2 or "
            "more, a grid without that step (model.grid: flowalign.schedules.linear), or trainers.ReFL, which jumps to "
            "the end from an earlier step",
        )

    def preflight(self) -> Family:
        from trainers.preflight.reward_gradient import RewardGradientFamily

        return RewardGradientFamily(self)

    def needed(self, epoch: Epoch) -> Rows:
        total, learnt = Rows(), self.trained_steps(epoch.path)
        for step in range(self.first_step(), len(epoch.path.transitions)):
            total += self.step_rows(len(epoch.rows), step, step in learnt, step > learnt[0])
        return total

    def step_rows(self, rows: int, step: int, learnt: bool, onward: bool) -> Rows:
        """The fewest network rows of one step of so many samples.

        Args:
            learnt: whether it has gradient. onward: whether its latents have gradient too.
        """
        calls = self.model.calls(self.policy.guidance_scale, self.sigmas[step])
        if not learnt:
            return Rows(calls * rows)
        with_gradient = calls if self.policy.unconditional_grad else 1
        made = Rows((calls - with_gradient) * rows, with_gradient * rows)
        if not self.needs_reference():
            return made
        return made + (made if onward else Rows(calls * rows))

    def mine(self, epoch: Epoch) -> range:
        """No micro-batch outlives its optimizer step."""
        return range(0)

    def check_sampling(self, sampling: Sampling) -> None:
        if not isinstance(sampling.plan, GradientPlan):
            raise ValueError(
                f"sampling.plan is {type(sampling.plan).__name__}, which is for ratios of densities; "
                f"{type(self).__name__} goes back through the rollout: choose LastSteps, RandomTruncation, "
                "GaussianTruncation or LateStep (flowalign.schedules), which say where gradients flow"
            )
        if sampling.overlap:
            raise ValueError(
                f"sampling.overlap is {sampling.overlap}, but {type(self).__name__} goes back through a score before a "
                "next rollout: leave it out"
            )

    def _check(self) -> None:
        super()._check()
        check_recompute(self.model, self.recompute)
        hard = undifferentiable(self.reward)
        if hard:
            raise ValueError(
                f"{type(self).__name__} needs the reward's gradient, and {', '.join(hard)} has none: leave it out, or "
                "train with trainers.FlowGRPO, which needs scores alone"
            )
        if self.reward.card.scope != "sample":
            raise ValueError(
                f"{self.reward.name} compares samples with one another; {type(self).__name__} needs a reward that "
                "scores each sample on its own"
            )
        if self.needs_media():
            check_media(self.prompts, self.model.fps is not None)
        for prompts in (self.prompts, self.evaluator.prompts):
            if prompts is not None:
                check_references(prompts)
            if prompts is not None and self.model.takes_image:
                check_images(prompts)

    def work(self, keeper: Keeper) -> Worked:
        epoch = self.collection.epoch(self.state.epoch)
        metrics = PathSteps(self, epoch, keeper).run()
        scores = scores_of(self.state.seen)
        return Worked(means(scores) | metrics, scores)


def undifferentiable(reward: Reward) -> list[str]:
    """The names of the terms of a reward that have no gradient, where it has none."""
    if reward.differentiable:
        return []
    terms = reward.rewards if isinstance(reward, Combination) else ()
    return [name for term in terms for name in undifferentiable(term)] or [reward.name]

"""What would stop a run by policy gradient or spoil it, beside what may go wrong with any. None where all is well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowalign.report.formats import number, percent
from flowalign.transitions import mean_of_elements, sum_of_elements
from trainers.flow_grpo import FlowGRPO
from trainers.preflight.problems import Found, error, warning

if TYPE_CHECKING:
    from trainers.policy_gradient import PolicyTrainer
    from trainers.preflight.geometry import PlannedStep
    from trainers.preflight.trial import Learning, Rollouts

FEW_MEMBERS = 4  # in a group: with three, one sample's luck is a third of the mean it is held against
FAINT = 0.05  # times the other steps' median std: such noise is not seen in a picture
NEVER = 100.0  # of a latent's log-density: no sample's ratio gets that far in one epoch
HALF = 0.5  # of the groups: beyond it most of an epoch's work teaches nothing (the report says the same)


def no_noise(steps: tuple[PlannedStep, ...]) -> Found:
    bad = [step.interval.index for step in steps if step.stochastic and not step.std > 0]
    if not bad:
        return None
    return error(
        f"step {bad[0]} is meant to be stochastic, but its noise has std 0 and so no density: CPS, Renoise and DDIM "
        "have no noise in the step that ends at sigma 0. Leave that step out (last_step: false in the plan)"
    )


def last_step(steps: tuple[PlannedStep, ...]) -> Found:
    last, others = steps[-1], sorted(step.std for step in steps[:-1] if step.trained)
    if not last.trained or not others or last.std >= FAINT * others[len(others) // 2]:
        return None
    usual = others[len(others) // 2]
    return warning(
        f"the last step is trained, and its noise is next to nothing (std {last.std:.2g}; the others' median is "
        f"{usual:.2g}): no reward can tell what that noise was worth, so the step adds a pass and mostly noise to the "
        "gradient. Leave it out: a step_fraction just below 1 (Flow-GRPO's authors do so), or last_step: false in the "
        "plan"
    )


def clipping(trainer: PolicyTrainer) -> Found:
    if not isinstance(trainer, FlowGRPO) or trainer.updates_per_epoch == 1:
        return None  # one update an epoch has ratios of 1: nothing is clipped
    numbers, clip = 1, trainer.clip_range
    for length in trainer.model.latent_shape:
        numbers *= length
    if trainer.policy.reduce is mean_of_elements and clip * numbers > NEVER:
        return warning(
            f"clip_range {clip:g} will never act: reduce is the mean over a latent's {numbers:,} elements, so that "
            f"its density may change by exp({clip * numbers:,.0f}) first. Flow-GRPO's clip_range is 1e-4"
        )
    if trainer.policy.reduce is sum_of_elements and clip < 0.01:
        return warning(
            f"clip_range {clip:g} clips nearly every sample after the first update: reduce is the sum over a latent's "
            f"{numbers:,} elements, while published ranges of that size presume mean_of_elements"
        )
    return None


def small_groups(trainer: PolicyTrainer) -> Found:
    size = trainer.sampling.group_size
    if size >= FEW_MEMBERS:
        return None
    why = "of two samples an advantage tells the better one and nothing else" if size == 2 else "its mean is noisy"
    return warning(
        f"sampling.group_size {size} is small: a sample is held against its group's mean, and {why}. "
        "8 to 24 are usual; fewer groups make room"
    )


def equal_groups(rollouts: Rollouts) -> tuple[int, int]:
    """Groups whose valid samples all have the same score, and groups in all."""
    ids, known, total = rollouts.group_ids, rollouts.scores.valid, rollouts.scores.total
    spreads = [total[(ids == group) & known] for group in ids.unique()]
    return sum(len(one) == 0 or bool(one.amax() == one.amin()) for one in spreads), len(spreads)


def no_spread(rollouts: Rollouts) -> Found:
    equal, groups = equal_groups(rollouts)
    if not rollouts.scores.valid.any() or equal <= HALF * groups:
        return None
    value = number(float(rollouts.scores.total[rollouts.first & rollouts.scores.valid].mean()))
    where = f"in the first group all scores are equal ({value})" if groups == 1 else ""
    where = where or f"in {equal} of the first {groups} groups all scores are equal"
    return warning(
        f"{where}: equal scores teach nothing. The prompts are too easy or too hard for this model, the "
        "reward is too coarse, or the noise of the plan too small; look at the sheet"
    )


def no_gradient(learning: Learning) -> Found:
    if learning.grad_norm != 0:
        return None
    return error(
        "the gradient is exactly 0, though there are advantages: no gradient reaches the policy. Look at the LoRA's "
        "targets, guidance_scale and advantages"
    )


def off_policy(learning: Learning) -> Found:
    if not learning.clipped > 0:
        return None
    return warning(
        f"{percent(learning.clipped)} of ratios are clipped before anything is learned (a ratio is off 1 by "
        f"{learning.off:.2g}): rounding alone moves them, as the device does not repeat its own results. Raise "
        "clip_range, or train in higher precision"
    )

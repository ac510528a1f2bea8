"""Ctrl-U: a ControlNet learns to follow its map, where the judge of that is sure (arXiv:2410.11236, Zhang et al.).

    L = L_pretraining + k scale mean(exp(-U) E_1) + weight mean(U),   k = min(1, steps / ramp)
    x0hat_i = x_i - t_i v(x_i, t_i),   x_i = (1 - t_i) x_0 + t_i e_i,   x_0 a real picture, t <= 400 of 1000

E_1: how far a predictor's map of the picture x0hat_1 is from the one that was wanted, at each pixel; U: how far it is
from that of x0hat_2 (`rewards.consistency`). exp(-U) has its gradient: E falls also where maps move apart, which the
last term holds back. The two differ in their times by one point, as in the authors' code (`next_point`), or, as their
abstract tells, in their noise (`other_noise`). They draw one time for both losses and leave out the reward where it is
past 400; here each loss draws its own. They train all of the ControlNet, here a LoRA on it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.differentiate import Drawn, velocity_at
from flowalign.models.base import Latents, Model
from flowalign.prompts import PromptData
from flowalign.randomness import key_generator
from flowalign.records import Maps, Scores
from flowalign.rollout import Policy
from flowalign.schedules import Deterministic, Path
from flowalign.tracking import TrackerName
from rewards.base import Reward
from rewards.consistency import Consistency, Errors, mean_counted
from trainers.batch import Sampling
from trainers.collection import Draw, Epoch
from trainers.evaluation import Evaluation
from trainers.keeper import Checkpoints
from trainers.optim import Optimizer
from trainers.path_steps import Scored, in_turn, repeated
from trainers.pretraining import column_of, noised_at, pretraining_loss
from trainers.reward_gradient import RewardGradientTrainer

if TYPE_CHECKING:
    from trainers.preflight.ctrl_u import CtrlUFamily

Points = Int[Tensor, " b"]
Twin = Callable[[Points, Latents, Latents], tuple[Points, Latents]]


def rectified(
    errors: Errors, uncertainty: Errors, counted: Bool[Tensor, "b k l"], scale: float, weight: float
) -> Float[Tensor, " b"]:
    """scale mean(exp(-U) E) over the pixels that count, + weight mean(U) over all."""
    return scale * mean_counted((-uncertainty).exp() * errors, counted) + weight * uncertainty.mean((1, 2))


def next_point(points: Points, noise: Latents, other: Latents) -> tuple[Points, Latents]:
    """The same noise, one point later: U tells how the map depends on the time."""
    return points + 1, noise


def other_noise(points: Points, noise: Latents, other: Latents) -> tuple[Points, Latents]:
    """The same time with noise of its own: U tells how the map depends on the draw."""
    return points, other


class CtrlU(RewardGradientTrainer):
    """Ctrl-U with a LoRA policy on the ControlNet, or on its UNet (`flowalign.models`).

    Args:
        model, prompts, optimizer, evaluation, checkpoints, epochs, folder, seed, on_invalid, log_with: as of
            `trainers.FlowGRPO`. Each prompt names a real picture, with the key "media" in its record, and "image", its
            control picture.
        reward: a `rewards.consistency.Consistency`: of edges, depth, or segments.
        sampling: groups, group_size and batch_size are of real pictures with noise of their own; no rollout is made in
            training. Steps and guidance are the evaluation's.
        updates_per_epoch: optimizer steps in an epoch, each on samples of its own.
        scale: of the reward's loss. ramp: optimizer steps over which it rises from 0, the first one having 1 / ramp.
        uncertainty: weight of mean(U), which has no ramp.
        latest: share of the points that the network was trained at (`Model.train_sigmas`), from the clean end, at which
            a picture is scored.
        twin: the point and noise of x0hat_2, `next_point` or `other_noise`.
        pretraining: weight of L_pretraining, at any of those points; 0 leaves its calls out.
        recompute: activation checkpointing of the calls.
    """

    views = 2

    def __init__(
        self,
        model: Model | DiffusionPipeline | str,
        reward: Reward,
        prompts: PromptData,
        sampling: Sampling = Sampling(group_size=1, batch_size=4, steps=20, guidance_scale=7.5),
        optimizer: Optimizer = Optimizer(1e-5),
        evaluation: Evaluation = Evaluation(),
        checkpoints: Checkpoints = Checkpoints(),
        epochs: int = 100,
        updates_per_epoch: int = 1,
        scale: float = 1.0,
        ramp: int = 5000,
        uncertainty: float = 0.1,
        latest: float = 0.4,
        twin: Twin = next_point,
        pretraining: float = 1.0,
        recompute: bool = True,
        folder: str = "runs/ctrl_u",
        seed: int = 0,
        on_invalid: Literal["stop", "drop"] = "stop",
        log_with: tuple[TrackerName, ...] = (),
    ) -> None:
        if not scale > 0 or min(ramp, uncertainty, pretraining) < 0 or not 0 < latest <= 1:
            raise ValueError(
                "scale must be positive, ramp, uncertainty and pretraining at least 0, and latest in (0, 1], got "
                f"{scale}, {ramp}, {uncertainty}, {pretraining} and {latest}"
            )
        if not isinstance(reward, Consistency):
            raise ValueError(f"CtrlU weighs pixels: {reward!r} is no rewards.consistency.Consistency, such as of edges")
        self.consistency, self.scale, self.ramp, self.uncertainty = reward, scale, ramp, uncertainty
        self.latest, self.twin, self.pretraining, self.recompute = latest, twin, pretraining, recompute
        super().__init__(
            model, reward, prompts, sampling, Policy(), optimizer, evaluation, checkpoints, epochs, updates_per_epoch,
            folder, seed, on_invalid, log_with,
        )  # fmt: skip
        self.table = torch.tensor(self.model.train_sigmas()[::-1], dtype=torch.float64)  # from the clean end

    def loss(self, scored: Scored) -> Float[Tensor, " b"]:
        """k scale mean(exp(-U) E_1) + weight mean(U) of each sample, for both of its pictures."""
        maps, scale = scored.maps, self.rising() * self.scale
        assert maps is not None
        made = rectified(maps.errors[::2], self._apart(maps), maps.counted[::2], scale, self.uncertainty)
        return made.repeat_interleave(self.views)

    def picture_loss(self, scores: Scores) -> Float[Tensor, " b"]:
        return self.loss(Scored(scores.total, (), (), scores.maps))

    def rising(self) -> float:
        """k of the next optimizer step."""
        return min(1.0, (self.optimizer.steps + 1) / max(self.ramp, 1))

    def rewarded(self) -> int:
        """How many points a picture may be scored at: 401 of 1000 with .4, times 0 ... 400."""
        return min(round(self.latest * len(self.table)) + 1, len(self.table))

    def _apart(self, maps: Maps) -> Errors:
        return self.consistency.apart(maps.predicted[::2], maps.predicted[1::2])

    def beside(self, epoch: Epoch, draw: Draw) -> Float[Tensor, " b"] | None:
        if not self.pretraining:
            return None
        noise = self.collection.noise(epoch, draw.samples, "pretraining", 0)
        sigmas = self.table[self._points(epoch, draw, "pretraining_point", len(self.table))]
        told, recompute = draw.condition, self.recompute
        return self.pretraining * pretraining_loss(self.model, draw.clean(), noise, sigmas, told, recompute)

    def rollout(self, epoch: Epoch, draw: Draw, sigmas: list[float]) -> Drawn:
        """x0hat_1 and x0hat_2 of each sample, one after the other, from one call."""
        points = self._points(epoch, draw, "reward_point", self.rewarded())
        other = self.collection.noise(epoch, draw.samples, "twin", 0).to(draw.start.device)
        twins, noise = self.twin(points, draw.start, other)
        at = self.table[in_turn(points, twins).clamp(max=len(self.table) - 1)]
        noised = noised_at(draw.clean().repeat_interleave(self.views, 0), in_turn(draw.start, noise), at)
        told = repeated(draw.condition, self.views)
        velocity = velocity_at(self.model, noised, at, told, self.policy, self.recompute)
        return Drawn(self.model.finish(noised - column_of(at, noised) * velocity, 0.0), ())

    def _points(self, epoch: Epoch, draw: Draw, purpose: str, count: int) -> Points:
        """One of the first so many points for each sample, whichever call it is in."""
        drawn = (key_generator(self.seed, purpose, epoch.number, *sample).integers(count) for sample in draw.samples)
        return torch.tensor([int(one) for one in drawn])

    def needed(self, epoch: Epoch) -> Rows:
        return Rows(0, len(epoch.rows) * (self.views + (self.pretraining > 0)))

    def trained_steps(self, path: Path) -> tuple[int, ...]:
        return ()

    def remarks(self) -> tuple[str, ...]:
        return ()

    def needs_media(self) -> bool:
        return True

    def check_sampling(self, sampling: Sampling) -> None:
        if not isinstance(sampling.plan, Deterministic):
            raise ValueError(f"CtrlU makes no rollouts in training: leave out sampling.plan, which is {sampling.plan}")

    def watched(self) -> tuple[str, ...]:
        return (*super().watched(), "uncertainty")

    def watch(self, scored: Scored, losses: Float[Tensor, " b"]) -> dict[str, Float[Tensor, " b"]]:
        """With mean(U) of each sample."""
        assert scored.maps is not None
        mean = self._apart(scored.maps).mean((1, 2))
        return super().watch(scored, losses) | {"uncertainty": mean.repeat_interleave(self.views)}

    def preflight(self) -> CtrlUFamily:
        from trainers.preflight.ctrl_u import CtrlUFamily

        return CtrlUFamily(self)

"""A supervised branch of policy gradients: the best samples of an epoch as data, beside the ratios of all of them.

    L = L_RL + coef E ||v(x_t, t) - (e - x_0)||^2,   x_t = (1 - t) x_0 + t e,   x_0 the best of each group

LayerTuning-RL of Dynamic-TreeRPO (arXiv:2509.23352) adds such a loss towards its tree's best path; we have not seen its
formula, and imitate where that path ends. Ratios move the policy at the noisy steps of a plan; this moves it at all
sigmas. The loss is the network's own (`pretraining_loss`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from flowalign.distributed import sum_over_data
from flowalign.randomness import key_generator, key_noise
from trainers.batch import Batch, Part, parts_of
from trainers.forward_times import LogitNormalTimes, Times
from trainers.pretraining import pretraining_loss
from trainers.raft import best_unless_equal

if TYPE_CHECKING:
    from trainers.policy_gradient import PolicyTrainer


@dataclass(frozen=True)
class Supervised:
    """The branch's settings.

    coef: its weight, positive. choice: function of valid rewards and group ids that is 1 for what is imitated: the best
    of each group, nothing of a group of equals (`trainers.raft.best_unless_equal`); `trainers.raft.best_of_each`,
    `flowalign.advantages.best_in_group`. times: the law of t, and how often each is noised in an epoch.
    """

    coef: float
    choice: Callable[[Tensor, Tensor], Tensor] = best_unless_equal
    times: Times = LogitNormalTimes()

    def __post_init__(self) -> None:
        if not self.coef > 0:
            raise ValueError(f"supervised.coef must be positive, got {self.coef}; without the branch leave it out")


class Imitation:
    """What an epoch imitates: each chosen sample in one optimizer step, as many in each, however they are held.

    A sample's noise and sigmas are keyed by its number in the epoch.
    """

    def __init__(self, trainer: PolicyTrainer, batch: Batch, settings: Supervised) -> None:
        self.trainer, self.batch, self.settings = trainer, batch, settings
        known = batch.scores.valid.nonzero().flatten()
        labels = settings.choice(batch.scores.total[known], batch.group_ids[known])
        self.chosen = known[labels > 0]
        self.parts = parts_of(len(self.chosen), trainer.updates_per_epoch, trainer.seed, trainer.state.epoch)

    def add(self) -> dict[str, float]:
        """Add the gradient of the present optimizer step's samples; returns their mean loss, nan where there are none.

        Every process calls it.
        """
        state, size = self.trainer.state, self.trainer.sampling.batch_size
        chosen, losses = self.chosen[self.parts[state.part]], torch.zeros(1, dtype=torch.float64)
        total = len(chosen) * self.settings.times.draws
        rows = chosen // self.batch.members
        for number, part in enumerate(self.batch.parts):
            held = chosen[torch.isin(rows, part.rows)]
            for micro in held.split(size) if len(held) else ():
                with self.trainer.model.sized(part.size):
                    losses += self._micro_batch(part, self.batch.latents[number], micro, total)
        sum_over_data([losses])
        return {"supervised": float(losses) / total if total else float("nan")}

    def _micro_batch(self, part: Part, ends: Tensor, micro: Int[Tensor, " m"], total: int) -> float:
        """Of samples of one bucket, padded to the shape of all calls, at each of their sigmas."""
        trainer, members = self.trainer, self.batch.members
        model, seed, number = trainer.model, trainer.seed, trainer.state.epoch
        samples = torch.cat([micro, micro[-1:].expand(trainer.sampling.batch_size - len(micro))])
        clean = ends[(samples - int(part.rows[0]) * members).to(ends.device)].to(model.device)
        condition = self.batch.condition(model, (samples // members).tolist())
        table = model.train_sigmas(), trainer.collection.grids[part.size][:-1]
        times, shape = self.settings.times, model.latent_shape
        drawn = [times.draw(key_generator(seed, "supervised_times", number, s), *table) for s in samples.tolist()]
        sigmas, seen = torch.tensor(drawn, dtype=torch.float64), 0.0
        for draw in range(times.draws):
            noise = [key_noise(seed, "supervised", number, s, draw, shape=shape) for s in samples.tolist()]
            losses = pretraining_loss(model, clean, torch.stack(noise), sigmas[:, draw], condition, recompute=False)
            kept = losses[: len(micro)].sum()
            trainer.optimizer.backward(self.settings.coef * kept / total)
            model.meter.count("backward")
            seen += float(kept.detach())
        return seen

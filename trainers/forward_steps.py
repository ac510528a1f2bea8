"""The optimizer steps of trainers of the forward process: noise clean latents anew, compare velocities, go back.

A unit is what the loss has a value of: a sample, or a pair of samples that share noise and sigma. Noise and sigmas are
keyed by a unit's number in its epoch, so that they depend neither on processes nor on how units are cut into calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.distributed import data_rank, data_size, sum_over_data
from flowalign.randomness import key_generator, key_noise
from flowalign.records import Condition, Size
from trainers.batch import parts_of
from trainers.collection import Epoch
from trainers.steps import OptimizerSteps
from trainers.watch import Watch, write_bad

if TYPE_CHECKING:
    from trainers.forward_process import ForwardProcessTrainer
    from trainers.keeper import Keeper

Latents = Float[Tensor, "b *d"]
KEPT = 16  # clean latents of units that went wrong


@dataclass(frozen=True)
class Noised:
    """Samples noised anew, x_t = (1 - t) x_0 + t e, and the networks' velocities there: all that a loss is made of.

    Of pairs, all preferred samples come first, then the others in the same order; both of a pair have one t and e.

    velocity: the policy's, which alone has gradient. target: e - x_0. noised: x_t. sigma: t. credit: what the trainer
    has told of each unit (an advantage, a margin), no gradient. reference, older: of those policies, where the loss
    reads them.
    """

    velocity: Latents
    target: Latents
    noised: Latents
    sigma: Float[Tensor, " b"]
    credit: Float[Tensor, " u"]
    reference: Latents | None = None
    older: Latents | None = None

    @property
    def column(self) -> Float[Tensor, b * ones]:
        """sigma, to be multiplied with latents."""
        return self.sigma.view(-1, *(1,) * (self.noised.ndim - 1))

    @property
    def clean(self) -> Latents:
        """x_0 = x_t - t (e - x_0)."""
        return self.noised - self.column * self.target

    def denoised(self, velocity: Latents) -> Latents:
        """x_t - t v: what a velocity takes x_0 to be."""
        return self.noised - self.column * velocity


@dataclass(frozen=True)
class Units:
    """What an epoch's update takes, the same on every process; numbers of samples are the source's.

    samples: of each unit, of a pair the preferred one first. weights: 0 for what teaches nothing: no call is made for
    it. credit: what the loss is told.
    """

    samples: Int[Tensor, "n m"]
    weights: Float[Tensor, " n"]
    credit: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.samples)


class ForwardSteps(OptimizerSteps):
    """An epoch's optimizer steps; each one's loss is the mean over its units by weight, and over their `draws`."""

    trainer: ForwardProcessTrainer

    def __init__(self, trainer: ForwardProcessTrainer, epoch: Epoch, units: Units, keeper: Keeper | None) -> None:
        super().__init__(trainer, keeper)
        self.epoch, self.units = epoch, units
        self.homes = trainer.source.shares(epoch, data_size(), trainer.sampling.batch_size)
        self.fetched = fetched(trainer, epoch, units, self.homes)
        self.table = lru_cache(self._table)

    def run(self) -> dict[str, float]:
        """All steps; returns the means of what was seen."""
        trainer = self.trainer
        return self._run(parts_of(len(self.units), trainer.updates_per_epoch, trainer.seed, self.epoch.number))

    def _watch(self) -> Watch:
        return Watch(self.trainer.watched(), 1.0, self.trainer.model.device)

    def _accumulate(self, rows: Int[Tensor, " p"], watch: Watch) -> dict[str, Any]:
        counted = rows[self.units.weights[rows] > 0]
        total = float(self.units.weights[counted].sum()) * self.trainer.times.draws
        every = [self.micro_batches(counted, held) for held in self.homes]
        mine, turns = every[data_rank()], max(map(len, every))
        for turn in range(turns):
            self._stop_if_asked(turn, turns)
            if turn < len(mine):
                size, micro = mine[turn]
                with self.trainer.model.sized(size):
                    self.micro_batch(size, micro, total, watch)
        return {}

    def micro_batches(
        self, rows: Int[Tensor, " p"], held: range, batch_size: int | None = None
    ) -> list[tuple[Size, Int[Tensor, " m"]]]:
        """Those of the units whose first sample a process holds, in calls of one size each."""
        first, found = self.units.samples[rows, 0], list[tuple[Size, Tensor]]()
        per_call = self.trainer.units_per_call(batch_size)
        for bucket in self.epoch.buckets:
            start, stop = (place * self.epoch.members for place in (bucket.rows.start, bucket.rows.stop))
            inside = rows[(first >= max(start, held.start)) & (first < min(stop, held.stop))]
            found += [(bucket.size, micro) for micro in inside.split(per_call) if len(micro)]
        return found

    def micro_batch(self, size: Size, micro: Int[Tensor, " m"], total: float, watch: Watch) -> None:
        """Add the gradient of units of one size, padded to the shape of all calls, at each of their sigmas."""
        trainer = self.trainer
        padded = torch.cat([micro, micro[-1:].expand(trainer.units_per_call() - len(micro))])
        weights = self.units.weights[padded].clone()
        weights[len(micro) :] = 0
        clean, condition = self.clean(padded), self.condition(padded)
        sigmas = torch.tensor([self.sigmas(unit, size) for unit in padded.tolist()], dtype=torch.float64)
        members, credit = trainer.members, self.units.credit[padded].to(clean.device)
        for draw in range(trainer.times.draws):
            noise = self.noise(padded, draw).to(clean.device).repeat(members, *(1,) * (clean.ndim - 1))
            noised = trainer.see(clean, noise, sigmas[:, draw].repeat(members), condition, credit)
            losses = trainer.loss(noised)
            trainer.optimizer.backward((losses * weights.to(losses.device)).sum() / total)
            trainer.model.meter.count("backward")
            with torch.no_grad():
                watch.add(trainer.watch(noised, losses), losses, weights, padded, draw)

    def clean(self, units: Int[Tensor, " u"]) -> Latents:
        """x_0 of units: the first samples of all of them, then the second ones."""
        wanted = self.units.samples[units].T.flatten().tolist()
        here = [sample for sample in dict.fromkeys(wanted) if sample not in self.fetched]
        held = dict(zip(here, self.trainer.source.latents(self.epoch, here), strict=True)) if here else {}
        return torch.stack([held[one] if one in held else self.fetched[one] for one in wanted])

    def condition(self, units: Int[Tensor, " u"]) -> Condition:
        """What the network is told of units' samples, in the order of `clean`."""
        trainer = self.trainer
        rows = (self.units.samples[units, 0] // self.epoch.members).tolist()
        told = trainer.model.condition(trainer.collection.told_rows(self.epoch, rows))
        return told.rows(torch.arange(len(rows)).repeat(trainer.members)) if trainer.members > 1 else told

    def noise(self, units: Int[Tensor, " u"], draw: int) -> Float[Tensor, u * d]:
        """e of units."""
        seed, number, shape = self.trainer.seed, self.epoch.number, self.trainer.model.latent_shape
        return torch.stack([key_noise(seed, "forward", number, unit, draw, shape=shape) for unit in units.tolist()])

    def sigmas(self, unit: int, size: Size) -> list[float]:
        """All of a unit's."""
        generator = key_generator(self.trainer.seed, "forward_times", self.epoch.number, unit)
        return self.trainer.times.draw(generator, *self.table(size))

    def _table(self, size: Size) -> tuple[list[float], list[float]]:
        """What sigmas are drawn from, for media of the model's present size."""
        return self.trainer.model.train_sigmas(), self.trainer.collection.grids[size][:-1]

    def _save_bad(self, folder: Path, name: str, watch: Watch) -> None:
        """The units' prompts, and the clean latents of some."""
        worst = sorted(watch.worst())
        told = self.trainer.collection.told_rows(self.epoch, range(len(self.epoch.rows))).text
        held = {str(unit): self.clean(torch.tensor([unit])).cpu() for unit in worst[:KEPT]}
        texts = [told[int(first) // self.epoch.members] for first in self.units.samples[:, 0]]
        write_bad(folder, name, watch, lambda unit: {"prompt": texts[unit]}, held)


def fetched(trainer: ForwardProcessTrainer, epoch: Epoch, units: Units, homes: list[range]) -> dict[int, Tensor]:
    """The latents of units' other samples, of which another process holds the first, by number: on every process.

    Of units of single samples there are none, and of pairs a few, as processes hold most groups whole.
    """
    if data_size() == 1 or trainer.members == 1:
        return {}

    def home(sample: int) -> int:
        return next(process for process, held in enumerate(homes) if sample in held)

    counted = units.samples[units.weights > 0].tolist()
    apart = dict.fromkeys(other for first, *others in counted for other in others if home(other) != home(first))
    found: dict[int, Tensor] = {}
    for bucket in epoch.buckets:
        inside = range(bucket.rows.start * epoch.members, bucket.rows.stop * epoch.members)
        alike = [sample for sample in apart if sample in inside]
        found |= _shared(trainer, epoch, bucket.size, alike, homes[data_rank()])
    return found


def _shared(
    trainer: ForwardProcessTrainer, epoch: Epoch, size: Size, samples: list[int], held: range
) -> dict[int, Tensor]:
    """Latents of samples of one size on every process."""
    with trainer.model.sized(size):
        whole = torch.zeros(len(samples), *trainer.model.latent_shape, device=trainer.model.device)
    mine = [place for place, sample in enumerate(samples) if sample in held]
    if mine:
        whole[mine] = trainer.source.latents(epoch, [samples[place] for place in mine])
    sum_over_data([whole])
    return dict(zip(samples, whole, strict=True))

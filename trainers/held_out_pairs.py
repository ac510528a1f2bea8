"""How many held-out preferences the policy gets right, as a reward that its own velocities imply."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.distributed import data_rank, data_size, share, sum_over_data
from flowalign.preferences.latents import PairLatents
from flowalign.randomness import key_noise
from flowalign.records import Size
from trainers.evaluation import Asked
from trainers.forward_steps import Noised

if TYPE_CHECKING:
    from trainers.forward_process import ForwardProcessTrainer

POINTS = 4  # sigmas at which every pair is looked at, evenly spread over the table of training


def right(lead: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """1 where the preferred sample leads, 0 where the other does, a half where neither."""
    return (lead.sign() + 1) / 2


def held_out_samples(trainer: ForwardProcessTrainer, pairs: PairLatents, groups: int) -> int:
    """Samples that one of so many groups of processes noises to judge the decided pairs, padding included."""
    size = _per_call(trainer)
    calls = -(-len(pairs.signs.nonzero()[0]) // size)
    return -(-calls // groups) * POINTS * 2 * size


def _per_call(trainer: ForwardProcessTrainer) -> int:
    """Pairs of a call."""
    return max(trainer.sampling.rows_per_call // 2, 1)


@torch.no_grad()
def held_out_leads(
    trainer: ForwardProcessTrainer, pairs: PairLatents, lead: Callable[[Noised], Tensor], asked: Asked
) -> Float[Tensor, " n"] | None:
    """By how much the preferred one of each decided pair leads, on average over `POINTS` sigmas, on every process.

    Noise and sigmas are the same each time. None where a stop is asked for.
    """
    index = [int(number) for number in pairs.signs.nonzero()[0]]
    size = _per_call(trainer)
    calls = [index[start : start + size] for start in range(0, len(index), size)]
    mine = share(len(calls), data_rank(), data_size())
    whole = torch.zeros(len(index))
    turns = -(-len(calls) // data_size())
    for turn in range(turns):
        if asked(turn, turns):
            return None
        if turn < len(mine):
            call, start = calls[mine[turn]], mine[turn] * size
            with trainer.model.sized(Size()):
                made = _leads(trainer, pairs, call + call[-1:] * (size - len(call)), lead)
            whole[start : start + len(call)] = made[: len(call)].cpu()
    sum_over_data([whole])
    return whole


def _leads(
    trainer: ForwardProcessTrainer, pairs: PairLatents, index: list[int], lead: Callable[[Noised], Tensor]
) -> Float[Tensor, " u"]:
    """Of pairs in one call."""
    model, batch = trainer.model, pairs.rows(index)
    clean = torch.cat(batch.ordered()).to(model.device)
    condition = model.condition(batch.prompts).rows(torch.arange(len(index)).repeat(2))
    table, credit, found = model.train_sigmas(), torch.zeros(len(index), device=clean.device), list[Tensor]()
    for point in range(POINTS):
        sigma = table[int((point + 0.5) / POINTS * len(table))]
        each = [key_noise(trainer.seed, "held_out_pairs", i, point, shape=model.latent_shape) for i in index]
        noise = torch.stack(each).to(clean.device).repeat(2, *(1,) * (clean.ndim - 1))
        sigmas = torch.full((len(clean),), sigma, dtype=torch.float64)
        found.append(lead(trainer.see(clean, noise, sigmas, condition, credit)))
    return torch.stack(found).mean(0)


def accuracy(leads: Float[Tensor, " n"]) -> dict[str, float]:
    """What to log: the share of pairs that are got right, and the mean lead."""
    return {"held-out/pair_accuracy": right(leads).mean().item(), "held-out/pair_lead": leads.mean().item()}


def decisive(leads: Float[Tensor, " n"]) -> dict[str, float]:
    """The same share as the number that decides which policy is best, with its 95 % interval."""
    known = right(leads)
    reach = 1.96 * known.std().item() / len(known) ** 0.5 if len(known) > 1 else 0.0
    middle = known.mean().item()
    return {"held-out": middle, "held-out/low": middle - reach, "held-out/high": middle + reach}

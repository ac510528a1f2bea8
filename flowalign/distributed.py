"""A few functions over torch.distributed; on one process each is the identity."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def share(total: int, rank: int, world: int) -> range:
    """The contiguous part of `total` units that a rank does; shares differ by one at most and leave nothing out."""
    return range(rank * total // world, (rank + 1) * total // world)


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Sum tensors over all processes in place, as one flat all-reduce: the same order of addition at every start."""
    if world_size() == 1:
        return
    listed = list(tensors)
    flat = torch.cat([tensor.detach().flatten() for tensor in listed])
    dist.all_reduce(flat)
    for tensor, part in zip(listed, flat.split([tensor.numel() for tensor in listed]), strict=True):
        tensor.copy_(part.view_as(tensor))

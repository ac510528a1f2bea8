"""Tensors in shards: which rows a process holds, and their way into a checkpoint and out again.

    step-00000123/shards-0.safetensors, shards-0.json   the rows that process 0 held, and the first row of each tensor

A checkpoint can be read by any number of processes, in shards or not: each reads the rows that it needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from flowalign.distributed import sum_over_ranks

MARK = "$rows"  # in the place of a tensor whose rows are in the files of shards


def is_sharded(value: Any) -> bool:
    """Whether a tensor is one of which each process holds some rows."""
    return isinstance(value, DTensor)


def whole_tensor(value: Tensor) -> Tensor:
    """All of a tensor; of one in shards all processes have to ask together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def rows_of(value: DTensor) -> range:
    """The rows that this process holds: consecutive ones, the last process perhaps with fewer or none."""
    mesh, total = value.device_mesh, len(value)
    last = mesh.ndim - 1  # of a mesh of copies and shards, the shards
    per, number = -(-total // mesh.size(last)), mesh.get_local_rank(last)
    held = range(min(number * per, total), min((number + 1) * per, total))
    assert len(held) == len(value.to_local()), "shards are cut otherwise than in equal runs of rows"
    return held


def own_rows(value: Tensor) -> Tensor:
    """The rows that this process holds, in the same memory, without gradient; of a tensor that is whole all of them."""
    bare = value.detach()
    return bare.to_local() if isinstance(bare, DTensor) else bare


def in_shards(rows: Tensor, other: Tensor) -> Tensor:
    """A tensor in shards as another one is, of which these are this process's rows."""
    assert isinstance(other, DTensor)
    mesh, placed = other.device_mesh, other.placements
    return DTensor.from_local(rows, mesh, placed, run_check=False, shape=other.shape, stride=other.stride())


def cloned(value: Tensor) -> Tensor:
    """A copy, in shards where the tensor is."""
    return in_shards(own_rows(value).clone(), value) if is_sharded(value) else value.detach().clone()


def clip_shards(gradients: Sequence[Tensor], other: Tensor, sums: Sequence[Tensor], limit: float) -> float:
    """Scale gradients, of each this process's rows, to a norm over all processes of `limit` at most; returns the norm.

    Args:
        other: a tensor in shards as they are. sums: tensors to be summed over processes in the same exchange.
    """
    assert isinstance(other, DTensor)
    mesh = other.device_mesh
    squares = torch.stack([one.double().square().sum() for one in gradients]).sum()
    sum_over_ranks([*sums, squares])
    norm = (squares * mesh.size(mesh.ndim - 1) / mesh.size()).sqrt()  # each of several copies has been counted
    scale = float((limit / (norm + 1e-6)).clamp(max=1.0))  # as torch's clip_grad_norm_
    for one in gradients:
        one.mul_(scale)
    return float(norm)


@dataclass(frozen=True)
class Stored:
    """A tensor whose rows are in several files.

    parts: of each file that has some of them, the first row and their number.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Path, int, int], ...]

    def read(self, rows: range) -> Tensor:
        """Some rows, consecutive ones."""
        found = list[Tensor]()
        for path, first, count in sorted(self.parts, key=lambda part: part[1]):
            start, stop = max(rows.start, first), min(rows.stop, first + count)
            if start < stop or not found:
                with safe_open(path, "pt") as file:
                    found.append(file.get_slice(self.name)[max(start - first, 0) : max(stop - first, 0)])
        return torch.cat(found)


def like(value: Tensor | Stored, other: Tensor) -> Tensor:
    """A value, held in the way that another tensor of its shape is."""
    if isinstance(other, DTensor):
        held = rows_of(other)
        part = value.read(held) if isinstance(value, Stored) else whole_tensor(value)[held.start : held.stop]
        return in_shards(part.to(own_rows(other).device), other)
    return value.read(range(len(other))) if isinstance(value, Stored) else value


def taken_out(tree: Any) -> tuple[Any, dict[str, tuple[Tensor, int]]]:
    """A tree with marks in the place of tensors in shards; this process's rows of each, and the number of the first.

    Of several copies the first one's processes alone have any.
    """
    held = dict[str, tuple[Tensor, int]]()

    def walk(value: Any, at: str) -> Any:
        if isinstance(value, DTensor):
            copies = value.device_mesh.ndim - 1
            if not any(value.device_mesh.get_local_rank(axis) for axis in range(copies)):
                held[at] = value.to_local().detach().cpu().contiguous(), rows_of(value).start
            return {MARK: at, "shape": [*value.shape]}
        if isinstance(value, Mapping):
            return {name: walk(element, f"{at}/{name}") for name, element in value.items()}
        return value

    return walk(tree, ""), held


def index_of(held: Mapping[str, tuple[Tensor, int]]) -> str:
    """What the file beside this process's rows says."""
    return json.dumps({name: [first, len(rows)] for name, (rows, first) in held.items()})


def put_back(tree: Any, folder: Path) -> Any:
    """A tree with tensors in the place of marks, which read their rows from a checkpoint's folder when asked to."""
    files = [(path.with_suffix(".safetensors"), json.loads(path.read_bytes())) for path in folder.glob("shards-*.json")]

    def walk(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if MARK not in value:
            return {name: walk(element) for name, element in value.items()}
        name = value[MARK]
        parts = tuple((path, *index[name]) for path, index in files if name in index)
        return Stored(name, tuple(value["shape"]), parts)

    return walk(tree)

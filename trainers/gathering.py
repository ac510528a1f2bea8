"""What processes hold in parts, whole on every one of them: scores, files, rows of pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flowalign.distributed import gather_text, largest, sum_over_data, world_size
from flowalign.records import Scores
from rewards.joined import join_scores


def gather_scores(parts: Sequence[Scores], at: Sequence[int], total: int) -> Scores:
    """The scores of all samples on every process, their parts by name, in the order of the first process that has some.

    Args:
        parts: this process's, which are those of the samples `at` out of `total`.

    Raises: ValueError on every process where they have parts of different names.
    """
    if world_size() == 1:
        return join_scores(parts)
    held = join_scores(parts) if parts else None
    names = _agreed(gather_text(json.dumps([*held.parts]) if held else ""))
    rows = torch.zeros(len(names) + 2, total)
    if held is not None:
        rows[:, [*at]] = torch.stack([held.total, held.valid.float(), *(held.parts[name] for name in names)])
    sum_over_data([rows])
    return Scores(rows[0], dict(zip(names, rows[2:], strict=True)), rows[1] > 0)


def _agreed(told: Sequence[str]) -> list[str]:
    """The names that all processes tell which have some. Raises: ValueError where these are not the same."""
    named: dict[int, list[str]] = {rank: json.loads(text) for rank, text in enumerate(told) if text}
    first = min(named)
    for rank, names in named.items():
        if {*names} != {*named[first]}:
            one, other = (", ".join(sorted(given)) or "none" for given in (named[first], names))
            raise ValueError(f"the reward's parts differ: on process {first} {one}, on process {rank} {other}")
    return named[first]


def gather_numbers(parts: Sequence[Tensor], at: Sequence[int], total: int) -> Tensor:
    """Rows of numbers of all samples on every process; of this process those `at` out of `total`."""
    if world_size() == 1:
        return torch.cat(tuple(parts))
    width = int(largest([parts[0].shape[1] if parts else 0])[0])
    rows = torch.zeros(total, width)
    if parts:
        rows[[*at]] = torch.cat(tuple(parts))
    sum_over_data([rows])
    return rows


def gather_files(mine: Mapping[int, bytes]) -> dict[int, bytes]:
    """The files of all processes on every one, by number; no two processes have the same."""
    if world_size() == 1:
        return dict(mine)
    told = gather_text(json.dumps({number: len(content) for number, content in mine.items()}))
    sizes = {int(number): size for text in told for number, size in json.loads(text).items()}
    held = {number: torch.zeros(size, dtype=torch.uint8) for number, size in sorted(sizes.items())}
    for number, content in mine.items():
        held[number] = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
    for whole in held.values():
        sum_over_data([whole])
    return {number: whole.numpy().tobytes() for number, whole in held.items()}


def gather_rows(mine: Tensor | None, at: range, total: int) -> Tensor:
    """The rows of all processes on every one, 8-bit; mine are those of `at` out of `total`."""
    if world_size() == 1:
        assert mine is not None
        return mine
    shape = next(
        json.loads(text) for text in gather_text(json.dumps(mine.shape[1:]) if mine is not None else "") if text
    )
    rows = torch.zeros(total, *shape, dtype=torch.uint8)
    if mine is not None:
        rows[at.start : at.stop] = mine
    for part in rows.split(64):
        sum_over_data([part])
    return rows

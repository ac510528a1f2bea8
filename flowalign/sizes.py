"""Media of several sizes: what goes through the network together has one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flowalign.models.base import Model
from flowalign.records import Prompts, Size


@dataclass(frozen=True)
class Call:
    """Rows of prompts that are sampled together."""

    size: Size
    rows: tuple[int, ...]


def calls_of(model: Model, prompts: Prompts, rows_per_call: int) -> list[Call]:
    """All prompts, at most so many of one size together, in order: first the size of the first one.

    Raises: ValueError for a size that the model cannot make, and where a prompt lacks the picture that it starts from.
    """
    model.check_prompts(prompts)
    sizes = [model.media_size(Size.of(row)) for row in prompts.metadata]
    found = []
    for size in dict.fromkeys(sizes):
        rows = [i for i, one in enumerate(sizes) if one == size]
        starts = range(0, len(rows), rows_per_call)
        found += [Call(size, tuple(rows[start : start + rows_per_call])) for start in starts]
    return found


def in_order(calls: Sequence[Call]) -> list[int]:
    """At which place of the calls' rows, one after another, row 0 stands, row 1 and so on."""
    rows = [row for call in calls for row in call.rows]
    return sorted(range(len(rows)), key=rows.__getitem__)

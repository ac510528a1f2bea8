"""Scores of parts of a batch as those of the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowalign.records import Scores


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Scores of several batches as one; their maps, which may differ in size, are left out."""
    names = parts[0].parts
    return Scores(
        torch.cat([part.total for part in parts]),
        {name: torch.cat([part.parts[name] for part in parts]) for name in names},
        torch.cat([part.valid for part in parts]),
        parts[0].maps if len(parts) == 1 else None,
    )


def spread(scores: Scores, rows: Sequence[int], count: int) -> Scores:
    """Scores of some rows among `count`: nan and not valid elsewhere, without maps."""

    def among(values: Tensor, rest: float) -> Tensor:
        return values.new_full((count,), rest).index_copy(0, torch.tensor(rows, device=values.device), values)

    parts = {name: among(value, math.nan) for name, value in scores.parts.items()}
    return Scores(among(scores.total, math.nan), parts, among(scores.valid, False))

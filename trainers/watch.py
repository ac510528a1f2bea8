"""What is seen of one optimizer step: means over its samples, the largest ratio, and samples that went wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.checkpoint import write_tensors
from flowalign.distributed import largest
from flowalign.records import expand_rows
from flowalign.tracking import json_lines, write_atomically
from trainers.batch import Batch

BINS = 40


def histogram(values: Float[Tensor, " n"], limit: float) -> Float[Tensor, " bins"]:
    """Counts in `BINS` equal bins of [-limit, limit]; what lies outside counts in the bins at the ends."""
    known = values.detach().float().flatten()
    return torch.histc(known[~known.isnan()].clamp(-limit, limit), BINS, -limit, limit)


@dataclass(frozen=True)
class Loss:
    """The losses of one step of a micro-batch: of which samples of the epoch, and at which step."""

    samples: Int[Tensor, " b"]
    step: int
    values: Float[Tensor, " b"]


class Watch:
    """Sums over the micro-batches of one optimizer step, on this process until `sums` has been added up over all.

    Args:
        names: of the numbers that `add` gets. limit: of the log-ratio's histogram.
    """

    def __init__(self, names: Sequence[str], limit: float, device: torch.device) -> None:
        self.names, self.limit, self._device = tuple(names), limit, device
        self.clear()

    def clear(self) -> None:
        """Forget what has been seen."""
        self.losses, device = list[Loss](), self._device
        self._sums = torch.zeros(len(self.names) + 1, device=device)  # the last one is the weights'
        self._counts = torch.zeros(BINS, device=device)
        self._bad = torch.zeros(1, device=device)
        self._furthest = torch.zeros((), device=device)

    def furthest(self) -> float:
        """How far from 1 a ratio on this process is at most; 0 where ratios are not watched."""
        return float(self._furthest)

    def add(
        self,
        numbers: dict[str, Float[Tensor, " b"]],
        losses: Float[Tensor, " b"],
        weights: Float[Tensor, " b"],
        samples: Int[Tensor, " b"],
        step: int,
    ) -> None:
        """One step of one micro-batch; what has weight 0 is padding or left out."""
        real = weights > 0
        weights = weights.to(self._sums.device)
        for i, name in enumerate(self.names):
            self._sums[i] += (numbers[name] * weights).sum()
        self._sums[-1] += weights.sum()
        kept = losses.detach()[real.to(losses.device)]
        self.losses.append(Loss(samples[real], step, kept))
        self._bad += (~kept.isfinite()).sum()
        if "log_ratio" in self.names:
            ratios = numbers["log_ratio"][real.to(numbers["log_ratio"].device)]
            self._counts += histogram(ratios, self.limit)
            self._furthest = torch.maximum(self._furthest, ratios.expm1().abs().max())

    def sums(self) -> list[Tensor]:
        """What is to be added up over processes, in place."""
        return [self._sums, self._counts, self._bad]

    def any_bad(self) -> bool:
        """Whether any sample of any process has a loss that is not finite."""
        return bool(self._bad)

    def means(self) -> dict[str, float]:
        """The numbers' means over the samples of all processes; nan where there were none."""
        total = float(self._sums[-1])
        found = {name: float(self._sums[i]) / total if total else math.nan for i, name in enumerate(self.names)}
        if "log_ratio" in found:
            del found["log_ratio"]
            found = {"ratio_max": largest([self.furthest()])[0]} | found
        return found

    def counts(self) -> list[int]:
        """The log-ratio's histogram over the samples of all processes."""
        return [int(count) for count in self._counts]

    def bad(self) -> list[tuple[int, int, float]]:
        """Sample, step and loss wherever the loss of this process is not finite."""
        return [row for row in self.every() if not math.isfinite(row[2])]

    def worst(self) -> set[int]:
        """The samples of this process whose loss is not finite, or all where none is so."""
        return {sample for sample, _, _ in self.bad() or self.every()}

    def every(self) -> list[tuple[int, int, float]]:
        """Sample, step and loss of all that this process has seen."""
        return [
            (int(sample), loss.step, float(value))
            for loss in self.losses
            for sample, value in zip(loss.samples, loss.values, strict=True)
        ]


def save_bad(folder: Path, name: str, watch: Watch, batch: Batch, most: int = 16) -> None:
    """`write_bad` of a batch, with the steps of the first `most` of the samples' rows."""

    def told(sample: int) -> dict[str, Any]:
        return {"prompt": batch.texts[sample // batch.members], "reward": str(float(batch.scores.total[sample]))}

    rows = torch.tensor(sorted({sample // batch.members for sample in watch.worst()})[:most], dtype=torch.int64)
    held = {"rows": rows}
    for part in batch.parts:
        inside = rows[torch.isin(rows, part.rows)]
        name_of = "" if len(batch.parts) == 1 else f"{part.size.height}x{part.size.width}/"
        for step in part.steps if len(inside) else ():
            apart = len(step.latents) // len(part.rows)  # rows of this call for each of the batch's
            taken = step.rows(expand_rows(inside - part.rows[0], apart).to(step.latents.device))
            held[f"{name_of}{step.interval.index}/latents"] = taken.latents.cpu().contiguous()
            held[f"{name_of}{step.interval.index}/latents_next"] = taken.latents_next.cpu().contiguous()
    write_bad(folder, name, watch, told, held)


def write_bad(
    folder: Path, name: str, watch: Watch, told: Callable[[int], dict[str, Any]], tensors: dict[str, Tensor]
) -> None:
    """Write down the samples whose loss is not finite, or all where the gradient alone is not.

    `name`.jsonl names them, with what is `told` of each; `name`.safetensors holds the tensors.
    """
    bad = watch.bad() or watch.every()
    lines = [{"sample": sample, **told(sample), "step": step, "loss": str(loss)} for sample, step, loss in bad]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.jsonl", json_lines(lines))
    write_tensors(folder / f"{name}.safetensors", tensors)

"""Evaluation while training: held-out prompts, ODE sampling, always from the same noise; pictures and weights kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.models.base import Model
from flowalign.prompts import as_prompts
from flowalign.records import Media, Prompts, Scores
from flowalign.sample import pictures
from flowalign.tracking import Run, write_atomically
from rewards.base import Reward
from trainers.batch import Sampling, detached, join_scores, valid_rows


@dataclass(frozen=True)
class Evaluation:
    """What to look at while training.

    prompts: held-out prompts; None for no evaluation (the last policy is then the one kept).
    every: epochs between two evaluations. steps, guidance_scale: of the ODE; None for those of training.
    metric: the part of the reward that decides which policy is best, by default the total.
    pictures: how many to save at each evaluation. keep: how many evaluated policies to keep besides the best.
    """

    prompts: Prompts | Sequence[str] | str | None = None
    every: int = 10
    steps: int | None = None
    guidance_scale: float | None = None
    metric: str | None = None
    pictures: int = 16
    keep: int = 2
    reward: Reward | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1 or self.pictures < 0:
            raise ValueError("evaluation.every and evaluation.keep must be at least 1, evaluation.pictures at least 0")


class Evaluator:
    """Scores the present policy on the same prompts and noise each time."""

    def __init__(self, model: Model, reward: Reward, settings: Evaluation, sampling: Sampling, seed: int) -> None:
        self.model, self.settings, self.seed = model, settings, seed
        self.reward = settings.reward or reward
        self.prompts = None if settings.prompts is None else as_prompts(settings.prompts)
        self.steps = settings.steps or sampling.steps
        scale = settings.guidance_scale
        self.guidance_scale = sampling.guidance_scale if scale is None else scale
        self.rows = sampling.rows_per_call
        self.last: float | None = None
        self._before: Tensor | None = None
        self._kept: list[int] = []

    def encode(self) -> None:
        """Encode all prompts ahead."""
        if self.prompts is not None:
            self.model.encode(self.prompts.text)

    def run(self, run: Run, epoch: int) -> dict[str, float] | None:
        """Sample, score, log and save pictures; returns the metrics, "held-out" among them, or None without prompts."""
        if self.prompts is None:
            return None
        pixels, scores = self.sample()
        known = valid_rows(scores)
        metrics = {f"held-out/{name}": value.mean().item() for name, value in known.parts.items()}
        metrics["held-out/total"] = known.total.mean().item()
        metrics["held-out/invalid"] = float((~scores.valid).sum())
        name = f"held-out/{self.settings.metric or 'total'}"
        if name not in metrics:
            raise ValueError(
                f"evaluation.metric {self.settings.metric!r} is no part of the reward; it has {sorted(known.parts)}"
            )
        metrics["held-out"] = self.last = metrics[name]
        run.log(epoch, metrics)
        self._save_pictures(run, epoch, pixels, scores)
        return metrics

    def sample(self) -> tuple[Float[Tensor, "b 3 h w"], Scores]:
        """Pictures of all held-out prompts from their fixed noise, and their scores."""
        assert self.prompts is not None
        made: list[Tensor] = []
        scores: list[Scores] = []
        drawn = pictures(
            self.model, self.prompts.text, self.steps, self.guidance_scale, self.seed, "evaluation", self.rows
        )
        for pixels in drawn:
            at = len(scores) * self.rows
            part = self.prompts.rows(list(range(at, at + len(pixels))))
            scores.append(detached(self.reward.score(Media(pixels), part)))
            made.append(pixels.cpu())
        return torch.cat(made), join_scores(scores)

    def _save_pictures(self, run: Run, epoch: int, pixels: Tensor, scores: Scores) -> None:
        assert self.prompts is not None
        count = min(self.settings.pictures, len(pixels))
        if not count:
            return
        values = [f"{value:.2f}" if ok else "no score" for value, ok in zip(scores.total, scores.valid, strict=True)]
        captions = [f"{text}\n{value}" for text, value in zip(self.prompts.text, values, strict=True)][:count]
        run.save_grid(f"epoch-{epoch:06d}", pixels[:count], captions)
        if self._before is None:
            self._before = pixels[:count]
            return
        both = torch.stack([self._before, pixels[:count]], 1).flatten(0, 1)
        named = [line for text in self.prompts.text[:count] for line in (f"before: {text}", "after")]
        run.save_grid("before_after", both, named)

    def keep(self, run: Run, epoch: int, best: int) -> None:
        """Save the present policy, and drop old ones: the best and the `keep` newest stay."""
        folder = run.folder / "checkpoints"
        self.model.save(folder / f"epoch-{epoch:06d}")
        self._kept.append(epoch)
        for old in [e for e in self._kept[: -self.settings.keep] if e != best]:
            shutil.rmtree(folder / f"epoch-{old:06d}")
            self._kept.remove(old)

    def finish(self, run: Run, best: int) -> None:
        """Leave the best policy in `lora/`."""
        if self.prompts is None:
            return
        shutil.copytree(run.folder / "checkpoints" / f"epoch-{best:06d}", run.folder / "lora", dirs_exist_ok=True)
        write_atomically(run.folder / "best.json", json.dumps({"epoch": best}).encode())

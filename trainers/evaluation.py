"""Evaluation while training: held-out prompts, ODE sampling, always from the same noise; pictures and weights kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from flowalign.distributed import on_main, rank, share, world_size
from flowalign.media import shown
from flowalign.models.base import Model
from flowalign.pictures import to_bytes, unzipped, zipped
from flowalign.prompts import as_prompts
from flowalign.randomness import keyed_globals
from flowalign.records import Prompts, Scores
from flowalign.sample import pictures
from flowalign.tracking import Run, json_lines, write_atomically
from rewards.base import Reward
from trainers.batch import Sampling, detached, score_rows, valid_rows
from trainers.collection import gather_rows, gather_scores

Asked = Callable[[int, int], bool]


def never(done: int, total: int) -> bool:
    """No one asks to stop."""
    return False


@dataclass(frozen=True)
class Evaluation:
    """What to look at while training.

    prompts: held-out prompts; None for no evaluation (the newest policy is then the one kept).
    every: epochs between two evaluations. steps, guidance_scale: of the ODE; None for those of training.
    metric: the part of the reward that decides which policy is best, by default the total.
    pictures: how many a contact sheet shows; the others are kept at 256 pixels at most.
    """

    prompts: Prompts | Sequence[str] | str | None = None
    every: int = 10
    steps: int | None = None
    guidance_scale: float | None = None
    metric: str | None = None
    pictures: int = 16
    reward: Reward | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.pictures < 0:
            raise ValueError("evaluation.every must be at least 1 and evaluation.pictures at least 0")


class Evaluator:
    """Scores the present policy on the same prompts and noise each time; the prompts are shared out over processes.

    Leaves in the run folder `evaluations/prompts.jsonl`, per evaluation `epoch-000034.jsonl` with every prompt's scores
    and `epoch-000034.zip` with the pictures, and contact sheets in `samples/`.
    """

    def __init__(self, model: Model, reward: Reward, settings: Evaluation, sampling: Sampling, seed: int) -> None:
        self.model, self.settings, self.seed = model, settings, seed
        self.reward = settings.reward or reward
        self.prompts = None if settings.prompts is None else as_prompts(settings.prompts)
        self.steps = settings.steps or sampling.steps
        scale = settings.guidance_scale
        self.guidance_scale = sampling.guidance_scale if scale is None else scale
        self.rows = sampling.rows_per_call

    def encode(self) -> None:
        """Encode all prompts ahead."""
        if self.prompts is not None:
            self.model.encode(self.prompts.text)

    def run(self, run: Run, epoch: int, asked: Asked = never) -> dict[str, float] | None:
        """Sample, score, log and save pictures; returns the metrics, "held-out" among them.

        Args:
            asked: whether to stop, called with how many calls of how many are done; if so, None is returned.
        """
        started = time.monotonic()
        made = self.sample(asked)
        if made is None:
            return None
        pixels, scores = made
        known = valid_rows(scores)
        if not len(known):
            raise ValueError(f"none of the {len(scores)} held-out pictures of epoch {epoch} has a valid score")
        metrics = {f"held-out/{name}": value.nanmean().item() for name, value in known.parts.items()}
        metrics["held-out/total"] = known.total.mean().item()
        metrics["held-out/invalid"] = float((~scores.valid).sum())
        metric = self._metric(known)
        error = metric.std().item() / len(metric) ** 0.5 if len(metric) > 1 else 0.0
        metrics["held-out"] = metric.mean().item()
        metrics |= {
            "held-out/low": metrics["held-out"] - 1.96 * error,
            "held-out/high": metrics["held-out"] + 1.96 * error,
        }
        run.log(epoch, metrics | {"time/evaluation": round(time.monotonic() - started, 4)})
        on_main(lambda: self._write(run, epoch, pixels, scores))
        return metrics

    def _metric(self, known: Scores) -> Tensor:
        name = self.settings.metric
        if name is None or name == "total":
            return known.total
        if name not in known.parts:
            raise ValueError(f"evaluation.metric {name!r} is no part of the reward; it has {sorted(known.parts)}")
        column = known.parts[name]
        column = column[~column.isnan()]  # of the prompts that it applies to
        if not len(column):
            raise ValueError(f"evaluation.metric {name!r} applies to none of the held-out prompts")
        return column

    def sample(self, asked: Asked = never) -> tuple[UInt8[Tensor, "b 3 h w"], Scores] | None:
        """Pictures of all held-out prompts from their fixed noise, and their scores, on every process.

        The pictures have the 8 bits that a file keeps; the scores are of the pictures as they were made.
        """
        assert self.prompts is not None
        total, calls = len(self.prompts), -(-len(self.prompts) // self.rows)
        mine = share(calls, rank(), world_size())
        drawn = pictures(
            self.model, self.prompts.text, self.steps, self.guidance_scale, self.seed, "evaluation", self.rows, mine
        )
        made, scores = [], []
        turns = -(-calls // world_size())
        for turn in range(turns):
            if asked(turn, turns):
                return None
            if turn < len(mine):
                at = range(mine[turn] * self.rows, min((mine[turn] + 1) * self.rows, total))
                pixels = next(drawn)
                told = self.prompts.rows([*at])
                with keyed_globals(self.seed, "evaluation_reward", mine[turn]):
                    scores.append(detached(self.reward(shown(pixels, told), told)))
                made.append(to_bytes(pixels))
        at = range(mine.start * self.rows, min(mine.stop * self.rows, total))
        return gather_rows(torch.cat(made) if made else None, at, total), gather_scores(scores, at, total)

    def _write(self, run: Run, epoch: int, pixels: Tensor, scores: Scores) -> None:
        assert self.prompts is not None
        folder = run.folder / "evaluations"
        folder.mkdir(exist_ok=True)
        texts, metadata = self.prompts.text, self.prompts.metadata
        lines = [{"prompt": text} | row for text, row in zip(texts, metadata, strict=True)]
        write_atomically(folder / "prompts.jsonl", json_lines(lines))
        write_atomically(folder / f"epoch-{epoch:06d}.jsonl", json_lines(score_rows(scores)))
        write_atomically(folder / f"epoch-{epoch:06d}.zip", zipped(pixels, self.settings.pictures))
        self._save_sheets(run, epoch, pixels, scores)

    def _save_sheets(self, run: Run, epoch: int, pixels: Tensor, scores: Scores) -> None:
        assert self.prompts is not None
        count = min(self.settings.pictures, len(pixels))
        if not count:
            return
        values = [f"{value:.2f}" if ok else "no score" for value, ok in zip(scores.total, scores.valid, strict=True)]
        captions = [f"{text}\n{value}" for text, value in zip(self.prompts.text, values, strict=True)][:count]
        drawn = pixels[:count] / 255
        run.save_grid(f"epoch-{epoch:06d}", drawn, captions)
        first = run.folder / "evaluations" / "epoch-000000.zip"
        if epoch == 0 or not first.is_file():
            return
        both = torch.stack([unzipped(first, count), drawn], 1).flatten(0, 1)
        named = [line for text in self.prompts.text[:count] for line in (f"before: {text}", "after")]
        run.save_grid("before_after", both, named)

    def retire(self, run: Run, epoch: int, best: int) -> None:
        """Keep the pictures of the first, the best and the newest evaluation only."""
        kept = {f"epoch-{number:06d}.zip" for number in (0, best, epoch)}
        if run.main:
            for path in (run.folder / "evaluations").glob("epoch-*.zip"):
                if path.name not in kept:
                    path.unlink()

"""Evaluation while training: held-out prompts, ODE sampling, always from the same noise; pictures and weights kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.distributed import data_rank, data_size, on_main, share
from flowalign.looks import NAMES, looks
from flowalign.media import shown
from flowalign.models.base import Model
from flowalign.pictures import to_bytes, unzipped, zipped
from flowalign.prompts import PromptData, as_prompts
from flowalign.randomness import keyed_globals
from flowalign.records import Scores, Size
from flowalign.sample import pictures
from flowalign.sizes import Call, calls_of, in_order
from flowalign.tracking import Run, json_lines, write_atomically
from flowalign.videos import check_writable, mp4, stills
from rewards.base import Reward
from trainers.alarms import Watcher
from trainers.batch import Sampling, detached, score_rows, valid_rows
from trainers.gathering import gather_files, gather_numbers, gather_rows, gather_scores
from trainers.hacking_watch import HackingWatch
from trainers.seen import Seen

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
    pictures: how many a contact sheet shows; the others are kept at 256 pixels at most. Of videos these are kept whole,
        and of all of them a strip of frames.
    watch: when an evaluation raises an alarm for reward hacking; None for never.
    """

    prompts: PromptData | None = None
    every: int = 10
    steps: int | None = None
    guidance_scale: float | None = None
    metric: str | None = None
    pictures: int = 16
    reward: Reward | None = None
    watch: HackingWatch | None = HackingWatch()

    def __post_init__(self) -> None:
        if self.every < 1 or self.pictures < 0:
            raise ValueError("evaluation.every must be at least 1 and evaluation.pictures at least 0")


class Evaluator:
    """Scores the present policy on the same prompts and noise each time; the prompts are shared out over processes.

    Leaves in the run folder `evaluations/prompts.jsonl`, per evaluation `epoch-000034.jsonl` with every prompt's scores
    and `epoch-000034.zip` with the pictures (of videos strips of frames, and MP4s of the first), and contact sheets in
    `samples/`.
    """

    def __init__(self, model: Model, reward: Reward, settings: Evaluation, sampling: Sampling, seed: int) -> None:
        self.model, self.settings, self.seed = model, settings, seed
        self.reward, self.watcher = settings.reward or reward, None
        if settings.watch is not None:
            self.watcher = Watcher(settings.watch, reward, settings.reward is not None, settings.metric)
        self.prompts = None if settings.prompts is None else as_prompts(settings.prompts).all()
        self.steps = settings.steps or sampling.steps
        scale = settings.guidance_scale
        self.guidance_scale = sampling.guidance_scale if scale is None else scale
        self.rows = sampling.rows_per_call
        if self.prompts is not None:
            self.calls()  # raises where a prompt asks for a size that the model cannot make
        if model.fps is not None and self.prompts is not None and settings.pictures:
            check_writable()

    def encode(self) -> None:
        """Encode all prompts ahead."""
        if self.prompts is not None:
            self.model.encode(self.prompts.text, self.prompts.negatives())

    def run(
        self,
        run: Run,
        epoch: int,
        asked: Asked = never,
        beside: Mapping[str, float] | None = None,
        began: float | None = None,
    ) -> dict[str, float] | None:
        """Sample, score, log and save pictures; returns the metrics, "held-out" among them.

        Args:
            asked: whether to stop, called with how many calls of how many are done; if so, None is returned.
            beside: numbers from elsewhere that are logged with them.
            began: when the work for those began, on the monotonic clock; logged seconds count from there.
        """
        started = time.monotonic() if began is None else began
        assert self.prompts is not None
        with self.model.meter.phase("evaluation"):
            made = self.sample(asked)
        if made is None:
            return None
        scores = made.scores
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
        metrics |= beside or {}
        if self.watcher is not None:
            metrics |= self.watcher.look(run, epoch, self.prompts.text, made)
        run.log(epoch, metrics | {"time/evaluation": round(time.monotonic() - started, 4)})
        on_main(lambda: self._write(run, epoch, made))
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

    def sample(self, asked: Asked = never) -> Seen | None:
        """Pictures of all held-out prompts from their fixed noise, and their scores, on every process.

        The pictures have the 8 bits that a file keeps; the scores are of the pictures as they were made.
        """
        assert self.prompts is not None
        calls = self.calls()
        mine = share(len(calls), data_rank(), data_size())
        own = calls[mine.start : mine.stop]
        drawn = pictures(self.model, self.prompts, self.steps, self.guidance_scale, self.seed, "evaluation", calls=own)
        made, scores, films, seen = list[Tensor](), [], dict[int, bytes](), list[Tensor]()
        turns = -(-len(calls) // data_size())
        for turn in range(turns):
            if asked(turn, turns):
                return None
            if turn < len(mine):
                rows, pixels = own[turn].rows, next(drawn)
                told = self.prompts.rows(rows)
                with keyed_globals(self.seed, "evaluation_reward", mine[turn]):
                    scores.append(detached(self.reward(shown(pixels, told, self.model.fps), told)))
                made.append(to_bytes(stills(pixels)))
                films |= self._films(pixels, rows)
                seen += [looks(pixels)] if self.watcher is not None else []
        order, at = in_order(calls), _places(calls, mine)
        gathered = gather_scores(scores, at, len(self.prompts))
        parts = {name: value[order] for name, value in gathered.parts.items()}
        scored = Scores(gathered.total[order], parts, gathered.valid[order])
        whole = [one for size in _sizes(calls) for one in _gathered(made, calls, mine, size)]
        looked = gather_numbers(seen, at, len(self.prompts))[order] if self.watcher is not None else None
        named = {} if looked is None else dict(zip(NAMES, looked.T, strict=True))
        return Seen([whole[place] for place in order], gather_files(films), scored, named)

    def calls(self) -> list[Call]:
        """All prompts, in calls of one size each; every process makes some of them."""
        assert self.prompts is not None
        return calls_of(self.model, self.prompts, self.rows)

    def _films(self, pixels: Tensor, rows: Sequence[int]) -> dict[int, bytes]:
        """MP4s of those videos of a call that are kept whole; none of pictures."""
        fps = self.model.fps
        if fps is None:
            return {}
        kept = zip(rows, pixels, strict=True)
        return {i: mp4(to_bytes(one), fps) for i, one in kept if i < self.settings.pictures}

    def _write(self, run: Run, epoch: int, seen: Seen) -> None:
        assert self.prompts is not None
        folder = run.folder / "evaluations"
        folder.mkdir(exist_ok=True)
        texts, metadata = self.prompts.text, self.prompts.metadata
        lines = [{"prompt": text} | row for text, row in zip(texts, metadata, strict=True)]
        write_atomically(folder / "prompts.jsonl", json_lines(lines))
        write_atomically(folder / f"epoch-{epoch:06d}.jsonl", json_lines(score_rows(seen.scores)))
        whole = self.settings.pictures if self.model.fps is None else len(seen.stills)  # a strip is small as it is
        write_atomically(folder / f"epoch-{epoch:06d}.zip", zipped(seen.stills, whole, seen.films))
        self._save_sheets(run, epoch, seen)

    def _save_sheets(self, run: Run, epoch: int, seen: Seen) -> None:
        assert self.prompts is not None
        count, scores = min(self.settings.pictures, len(seen.stills)), seen.scores
        if not count:
            return
        values = [f"{value:.2f}" if ok else "no score" for value, ok in zip(scores.total, scores.valid, strict=True)]
        captions = [f"{text}\n{value}" for text, value in zip(self.prompts.text, values, strict=True)][:count]
        drawn = [one / 255 for one in seen.stills[:count]]
        run.save_grid(f"epoch-{epoch:06d}", drawn, captions)
        first = run.folder / "evaluations" / "epoch-000000.zip"
        if epoch == 0 or not first.is_file():
            return
        both = [one for pair in zip(unzipped(first, count), drawn, strict=True) for one in pair]
        named = [line for text in self.prompts.text[:count] for line in (f"before: {text}", "after")]
        run.save_grid("before_after", both, named)

    def retire(self, run: Run, epoch: int, best: int) -> None:
        """Keep the pictures of the first, the best and the newest evaluation only."""
        kept = {f"epoch-{number:06d}.zip" for number in (0, best, epoch)}
        if run.main:
            for path in (run.folder / "evaluations").glob("epoch-*.zip"):
                if path.name not in kept:
                    path.unlink()


def _sizes(calls: Sequence[Call]) -> list[Size]:
    return [*dict.fromkeys(call.size for call in calls)]


def _places(calls: Sequence[Call], chosen: range) -> range:
    """Where the rows of consecutive calls stand among those of all calls."""
    before = sum(len(call.rows) for call in calls[: chosen.start])
    return range(before, before + sum(len(call.rows) for call in calls[chosen.start : chosen.stop]))


def _gathered(made: Sequence[Tensor], calls: Sequence[Call], mine: range, size: Size) -> Tensor:
    """The pictures of one size, of all processes, on every one; `made` are those of this process's calls."""
    alike = [number for number, call in enumerate(calls) if call.size == size]
    own = [place for place, number in enumerate(alike) if number in mine]
    held = [made[alike[place] - mine.start] for place in own]
    same = [calls[number] for number in alike]
    at = _places(same, range(own[0], own[-1] + 1) if own else range(0))
    return gather_rows(torch.cat(held) if held else None, at, sum(len(call.rows) for call in same))

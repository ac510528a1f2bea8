"""The watch over a run's evaluations: what it compares them with is in the run folder, and so are its alarms' pictures.

The first process reads and writes; all processes get the same numbers.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.distributed import gather_text, on_main
from flowalign.looks import ALARM, NAMES, small
from flowalign.pictures import unzipped
from flowalign.tracking import Run, json_lines, write_atomically
from rewards.algebra import RunningNormalise, running_normalisers
from rewards.base import Reward, WeightedSum
from trainers.batch import score_rows
from trainers.hacking_watch import Alarm, Found, Glance, HackingWatch, Scored, compare_looks, compare_scores
from trainers.seen import Seen

FIRST = ("epoch-000000.jsonl", "looks-000000.jsonl", "epoch-000000.zip")  # scores, looks and pictures to compare with
WORST = 8  # prompts of an alarm's contact sheet
GO_ON = "--evaluation.watch.on_alarm tell goes on"
ADVICE = (
    "Look at the pictures. If the gain is not a real one: a larger kl_coef, a lower learning rate, or another reward "
    "beside this one; --evaluation.watch.on_alarm stop or roll_back ends a run at its first alarm"
)


@dataclass(frozen=True)
class Watcher:
    """Compares every evaluation with the first one.

    trained: what the policy is trained on. own: whether evaluation scores by another reward. metric: the part of it
    that decides which policy is best, None for its total.
    """

    settings: HackingWatch
    trained: Reward
    own: bool
    metric: str | None

    def look(self, run: Run, epoch: int, prompts: Sequence[str], seen: Seen) -> dict[str, float]:
        """What to log with the evaluation; new alarms are noted, told and pictured. A barrier."""
        found: list[str] = []
        on_main(lambda: found.append(json.dumps(self._look(run, epoch, prompts, seen))))
        numbers: dict[str, float] = json.loads(gather_text("".join(found))[0])
        return numbers

    def _look(self, run: Run, epoch: int, prompts: Sequence[str], seen: Seen) -> dict[str, float]:
        folder, pictures = run.folder / "evaluations", [one / 255 for one in seen.stills]
        folder.mkdir(exist_ok=True)
        columns = {name: value.tolist() for name, value in seen.looks.items()}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        write_atomically(folder / f"looks-{epoch:06d}.jsonl", json_lines(rows))
        missing = [name for name in FIRST if epoch and not (folder / name).is_file()]
        if missing:
            _tell(run, "watch", f"nothing is watched at epoch {epoch}: {folder} has no {', '.join(missing)}")
            return {}
        before = unzipped(folder / FIRST[2], len(pictures)) if epoch else pictures
        logged = _lines(run.folder / "metrics.jsonl")
        found = [
            self._scores(folder, epoch, seen, logged),
            _looked(self.settings, folder, epoch, rows, before, pictures),
        ]
        known = set[str]().union(*map(raised, logged))
        fresh = [alarm for one in found for alarm in one.alarms if alarm.kind not in known]
        for alarm in fresh:
            _raise(run, epoch, alarm, prompts, before, pictures)
        numbers = {name: value for one in found for name, value in one.numbers.items()}
        return numbers | {ALARM + alarm.kind: 1.0 for alarm in fresh}

    def _scores(self, folder: Path, epoch: int, seen: Seen, logged: Sequence[Mapping[str, Any]]) -> Found:
        """Against all evaluations before this one; what a kill has left of later ones is not theirs."""
        now = self._scored(epoch, score_rows(seen.scores))
        numbered = [(int(path.stem.removeprefix("epoch-")), path) for path in sorted(folder.glob("epoch-*.jsonl"))]
        earlier = [self._scored(number, _lines(path)) for number, path in numbered if number < epoch] or [now]
        judges = [name for name in self._judges() if all(name in one.scores for one in [*earlier, now])]
        rewards = [row["reward"] for row in logged if row.get("reward") is not None and not self._moving]
        return compare_scores(self.settings, earlier, now, judges, rewards)

    def _scored(self, epoch: int, rows: Sequence[Mapping[str, Any]]) -> Scored:
        scores = _columns(rows, [name for name in rows[0] if name != "valid"])
        return Scored(epoch, scores, trained_scores(self.trained, scores, self.own))

    def _judges(self) -> list[str]:
        """Names of the scores that the trained reward is held against."""
        names = dict.fromkeys([self.metric or "total", *(["total"] if self.own else [])])
        return [name for name in names if name != (self.trained.name if self.own else "total")]

    @property
    def _moving(self) -> bool:
        """Whether the trained reward is not the same all along: its statistics are those of the run so far."""
        return bool(running_normalisers(self.trained))


def _looked(
    settings: HackingWatch,
    folder: Path,
    epoch: int,
    rows: Sequence[Mapping[str, Any]],
    before: Sequence[Tensor],
    pictures: Sequence[Tensor],
) -> Found:
    now = Glance(_columns(rows, NAMES), small(pictures))
    first = Glance(_columns(_lines(folder / FIRST[1]), NAMES), small(before)) if epoch else now
    return compare_looks(settings, first, now)


def trained_scores(reward: Reward, scores: Mapping[str, Tensor], own: bool) -> Float[Tensor, " n"] | None:
    """The trained reward of samples that an evaluation has scored, found by its name among the parts.

    Of a weighted sum the terms are, and are added up again. Of a reward in running statistics it is the reward itself:
    these move with the run. None where the evaluation does not score by it, or several are normalised so.

    Args:
        own: whether evaluation has a reward of its own; without, its total is the trained reward.
    """
    if isinstance(reward, RunningNormalise):
        return scores.get(f"{reward.name}/raw", scores.get(reward.name))
    if running_normalisers(reward):
        return None
    if not own:
        return scores["total"]
    if not isinstance(reward, WeightedSum):
        return scores.get(reward.name)
    terms = [trained_scores(term, scores, own) for term in reward.rewards]
    known = [weight * term for weight, term in zip(reward.weights, terms, strict=True) if term is not None]
    return torch.stack(known).sum(0) + reward.constant if len(known) == len(terms) else None


def raised(row: Mapping[str, Any]) -> set[str]:
    """The kinds of alarm that an evaluation was the first to raise, from what was logged of it."""
    return {name.removeprefix(ALARM) for name in row if name.startswith(ALARM)}


def over(settings: HackingWatch | None, history: Sequence[Mapping[str, float]]) -> bool:
    """Whether a run's evaluations have raised an alarm that was to end it."""
    return settings is not None and settings.on_alarm != "tell" and any(raised(row) for row in history)


def _raise(
    run: Run, epoch: int, alarm: Alarm, prompts: Sequence[str], before: Sequence[Tensor], now: Sequence[Tensor]
) -> None:
    worst, (name, old, new) = alarm.worst[:WORST], alarm.shown
    both = [one for i in worst for one in (before[i], now[i])]
    captions = [
        line for i in worst
        for line in (f"epoch 0: {prompts[i]}\n{name} {old[i]:.2f}", f"epoch {epoch}\n{name} {new[i]:.2f}")
    ]  # fmt: skip
    path = run.save_grid(f"alarm-{epoch:06d}-{alarm.kind}", both, captions, columns=4 if len(worst) > 2 else 2)
    _tell(run, "alarm", f"alarm at epoch {epoch}: {alarm.reason}; pictures in {path.relative_to(run.folder)}", ADVICE)


def _tell(run: Run, event: str, detail: str, advice: str = "") -> None:
    run.note(event, detail)
    print(f"flowalign: {detail}" + (f". {advice}" if advice else ""), file=sys.stderr, flush=True)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Tensor]:
    """By name; nan where a row has none."""
    return {
        name: torch.tensor([math.nan if row.get(name) is None else row[name] for row in rows], dtype=torch.float64)
        for name in names
    }

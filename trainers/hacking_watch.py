"""What tells that a policy exploits its reward: the trained reward against the others, and the look of the pictures.

Every evaluation is compared with earlier ones, prompt by prompt from the same noise. An alarm is raised once for each
kind:

reward: since some earlier evaluation the trained reward has risen, and a judge has not come along
    (`trainers.changes.shortfall`), nor risen itself. Judges are `evaluation.metric` and, where evaluation has a reward
    of its own, its total.
saturation, clipped, fine_detail, grid_lines, tiling: a look (`flowalign.looks`) has moved far from the first pictures'.
variety: pictures of different prompts have become alike. distance: they are not what they were at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.looks import NAMES, variety
from trainers.changes import Change, over_epochs, paired, shortfall, slope

LEAST_RISE = 0.05  # standard deviations of the prompts: less is no gain worth a judgement, however certain
LEAST_LOOK = 0.05  # of a look in [0, 1]: where the first pictures are all alike, any change is many deviations
RECENT = 5  # epochs whose logged training rewards are averaged


@dataclass(frozen=True)
class HackingWatch:
    """When an evaluation raises an alarm, and what becomes of the run then.

    on_alarm: "tell" says so and goes on; "stop" ends the run, the best policy kept; "roll_back" puts the best
        evaluation's policy and optimizer back and then ends it.
    rise: standard errors by which the trained reward must have risen for the others to be compared with it.
    short: standard errors by which a judge must have gained less than that rise should have brought.
    look: standard deviations among the first pictures by which the mean of a look may move.
    variety: share of the first pictures' mean distance from one another that must be left.
    distance: from the first pictures of the same prompts, at most, where 1 is that of pictures of different prompts.
    """

    on_alarm: Literal["tell", "stop", "roll_back"] = "tell"
    rise: float = 4.0
    short: float = 3.0
    look: float = 1.5
    variety: float = 0.5
    distance: float = 1.0

    def __post_init__(self) -> None:
        above = all(limit > 0 for limit in (self.rise, self.short, self.look, self.distance))
        if not above or not 0 <= self.variety < 1:
            raise ValueError(
                "evaluation.watch: rise, short, look and distance must be above 0, and variety in [0, 1); got "
                f"{self.rise}, {self.short}, {self.look}, {self.distance} and {self.variety}"
            )


@dataclass(frozen=True)
class Scored:
    """An evaluation's scores in the prompts' order: by name, "total" among them, nan where there is none.

    trained: the trained reward's, None where evaluation does not score by it.
    """

    epoch: int
    scores: Mapping[str, Float[Tensor, " n"]]
    trained: Float[Tensor, " n"] | None


@dataclass(frozen=True)
class Glance:
    """What the pictures of an evaluation look like, in the prompts' order.

    looks: by name. copies: small ones, see `flowalign.looks.small`.
    """

    looks: Mapping[str, Float[Tensor, " n"]]
    copies: Float[Tensor, "n d"]


@dataclass(frozen=True)
class Alarm:
    """kind: see above. reason: in words. worst: the numbers of all prompts, the most telling first. shown: before and
    after of each prompt, as a caption names it."""

    kind: str
    reason: str
    worst: Sequence[int]
    shown: tuple[str, Float[Tensor, " n"], Float[Tensor, " n"]]


@dataclass(frozen=True)
class Found:
    """numbers: to log. alarms: all that hold now, whether they are new or not."""

    numbers: Mapping[str, float]
    alarms: Sequence[Alarm]


def compare_scores(
    settings: HackingWatch, earlier: Sequence[Scored], now: Scored, judges: Sequence[str], rewards: Sequence[float]
) -> Found:
    """The trained reward against its judges.

    Args:
        earlier: the evaluations before, from the first on. judges: names of scores that all of them have.
        rewards: the training reward of every epoch so far, which stands in where evaluation does not score by it.
    """
    first = earlier[0]
    known = [one for one in earlier if one.trained is not None] if now.trained is not None else []
    found = [_held_against(first, since, now, name, rewards) for name in judges for since in known or [first]]
    judged = [one for one in found if one is not None]
    numbers = dict[str, float]()
    if first.trained is not None and now.trained is not None:
        numbers |= _in_spreads(paired(first.trained, now.trained))
    for one in judged:
        if one.since is first:
            numbers |= {f"watch/short/{one.judge}": one.short.mean, f"watch/short_error/{one.judge}": one.short.error}
    telling = [one for one in judged if one.is_telling(settings)]
    worst = max(telling, key=lambda one: one.short.errors, default=None)
    return Found(numbers, [] if worst is None else [worst.alarm(first, now)])


def _in_spreads(risen: Change | None) -> dict[str, float]:
    """In standard deviations of the first evaluation's prompts, which any two rewards share."""
    if risen is None or not risen.spread > 0:
        return {}
    return {"watch/trained_change": risen.spreads, "watch/trained_error": risen.error / risen.spread}


@dataclass(frozen=True)
class _Judged:
    """Changes since an earlier evaluation: of the trained reward, of a judge, and what that is short of, by prompt."""

    since: Scored
    judge: str
    risen: Change
    judged: Change
    short: Change
    missing: Float[Tensor, " n"]

    def is_telling(self, settings: HackingWatch) -> bool:
        certain = self.risen.errors >= settings.rise and self.risen.spreads >= LEAST_RISE
        return certain and self.short.errors >= settings.short and self.judged.mean <= 0

    def alarm(self, first: Scored, now: Scored) -> Alarm:
        risen, judged = self.risen, self.judged
        reason = (
            f"since epoch {self.since.epoch} the trained reward rose from {risen.before:.4g} to {risen.after:.4g} "
            f"({risen.errors:.1f} standard errors), and held-out {self.judge} did not: {judged.before:.4g} to "
            f"{judged.after:.4g}, {self.short.errors:.1f} standard errors short of what that rise should have brought"
        )
        shown = self.judge, first.scores[self.judge], now.scores[self.judge]
        return Alarm("reward", reason, _order(self.missing), shown)


def _held_against(first: Scored, since: Scored, now: Scored, name: str, rewards: Sequence[float]) -> _Judged | None:
    """A judge's change since then against the trained reward's; the logged one's where held-out ones are not known.

    What a gain is worth is taken from the first evaluation, where nothing was optimised yet.
    """
    before, after = since.scores[name], now.scores[name]
    if since.trained is not None and now.trained is not None and first.trained is not None:
        risen = paired(since.trained, now.trained)
        worth = max(slope(first.trained, first.scores[name]), 0.0) * _room(first.scores[name], before, after)
        missing = shortfall(worth, now.trained - since.trained, after - before)
    else:
        risen, missing = over_epochs(rewards, RECENT), before - after
    judged, short = paired(before, after), paired(torch.zeros_like(missing), missing)
    if risen is None or judged is None or short is None:
        return None
    return _Judged(since, name, risen, judged, short, missing)


def _room(first: Float[Tensor, " n"], before: Float[Tensor, " n"], after: Float[Tensor, " n"]) -> float:
    """How much of its first spread over prompts a judge has at least kept, at most 1.

    Near its ceiling it has little, and can no longer follow, which is no exploitation.
    """
    spreads = [one[~one.isnan()].double().std().item() if len(one) > 1 else 0.0 for one in (first, before, after)]
    return min(1.0, *(one / spreads[0] for one in spreads)) if spreads[0] > 0 else 0.0


def compare_looks(settings: HackingWatch, first: Glance, now: Glance) -> Found:
    """The pictures against the first ones."""
    looked, copied = _looks(settings, first, now), _copies(settings, first, now)
    return Found({**looked.numbers, **copied.numbers}, [*looked.alarms, *copied.alarms])


def _looks(settings: HackingWatch, first: Glance, now: Glance) -> Found:
    numbers, alarms = dict[str, float](), list[Alarm]()
    for name in NAMES:
        before, after = first.looks[name], now.looks[name]
        change = paired(before, after)
        if change is None:
            continue
        numbers[f"watch/{name}"] = change.after
        far = abs(change.mean) >= LEAST_LOOK and abs(change.spreads) >= settings.look
        if far and abs(change.errors) >= settings.rise:
            verb = "rose" if change.mean > 0 else "fell"
            reason = (
                f"{name.replace('_', ' ')} of the pictures {verb} from {change.before:.3f} to {change.after:.3f}, "
                f"{abs(change.spreads):.1f} standard deviations of the first pictures"
            )
            worst = _order((after - before) * math.copysign(1, change.mean))
            alarms.append(Alarm(name, reason, worst, (name, before, after)))
    return Found(numbers, alarms)


def _copies(settings: HackingWatch, first: Glance, now: Glance) -> Found:
    """Of the small copies, in units of the first pictures' mean distance from one another."""
    if len(now.copies) < 2:
        return Found({}, [])
    apart, left = variety(first.copies), variety(now.copies)
    unit = apart.mean().item()
    if not unit > 0:  # the same picture for all prompts
        return Found({}, [])
    moved = (now.copies - first.copies).norm(dim=1)
    share, distance = left.mean().item() / unit, moved.mean().item() / unit
    alarms = []
    if share < settings.variety:
        reason = f"pictures of different prompts are {share:.2f} times as far apart as the first ones: they look alike"
        alarms.append(Alarm("variety", reason, _order(apart - left), ("variety", apart, left)))
    if distance > settings.distance:
        reason = (
            f"the pictures are {distance:.2f} times as far from the first ones of the same prompts as those of "
            "different prompts are from one another"
        )
        alarms.append(Alarm("distance", reason, _order(moved), ("distance", torch.zeros_like(moved), moved)))
    return Found({"watch/variety": share, "watch/distance": distance}, alarms)


def _order(worse: Float[Tensor, " n"]) -> list[int]:
    """The prompts' numbers, the largest first; those that are not known are last."""
    return [int(i) for i in worse.nan_to_num(nan=-math.inf).argsort(descending=True, stable=True)]

"""The first screen: did the run work?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowalign.report.comparing import Comparison, Difference, difference
from flowalign.report.costs import samples_per_second
from flowalign.report.formats import count, duration, number
from flowalign.report.reading import RunRecord

VERDICTS = {
    "better": "Better than the base model",
    "worse": "Worse than the base model",
    "unclear": "No clear change",
}


@dataclass(frozen=True)
class Headline:
    """Name, method and state of a run, what it gained, and facts as (name, value).

    change: by prompt, with its interval; None where scores per prompt are missing, and then `before` and `after` are
    those of the metrics. verdict: "better", "worse", "unclear" or "unknown".
    """

    name: str
    method: str
    reward: str
    state: str
    metric: str
    before: float
    after: float
    after_name: str
    change: Difference | None
    verdict: str
    sentence: str
    facts: tuple[tuple[str, str], ...]


def headline(run: RunRecord, comparison: Comparison | None) -> Headline:
    """What stands at the top of the page."""
    change = difference([*comparison.pairs(comparison.metric).values()]) if comparison is not None else None
    before, after, after_name = _ends(run)
    if comparison is not None and change is not None:
        before, after = change.before, change.after
        after_name = f"{'best' if comparison.best else 'newest'}, epoch {comparison.after_epoch}"
    verdict = change.verdict if change is not None else "unknown"
    return Headline(
        name=run.folder.resolve().name,
        method=_short(run.setting("trainer")) or "method unknown (no config.yaml)",
        reward=_short(run.setting("reward", "class")) or _short(run.setting("reward")),
        state=state(run),
        metric=run.metric,
        before=before,
        after=after,
        after_name=after_name,
        change=change,
        verdict=verdict,
        sentence=VERDICTS.get(verdict, _why_unknown(run)),
        facts=_facts(run, change),
    )


def state(run: RunRecord) -> str:
    """Finished, stopped or not, with epochs done; a folder cannot tell a run that goes on from one that was killed."""
    planned = run.number("epochs")
    progress = f"{run.done} of {planned} epochs" if planned is not None else f"{run.done} epochs"
    lasting = [event.name for event in run.events if event.name in ("start", "resume", "stop", "finish")]
    if lasting[-1:] == ["finish"] or (planned is not None and run.done >= planned):
        return f"finished, {progress}"
    if lasting[-1:] == ["stop"]:
        return f"stopped, {progress}"
    return f"running or killed, {progress}"


def _ends(run: RunRecord) -> tuple[float, float, str]:
    """The metric of the first and the best evaluation, from the metrics alone."""
    known = {row.step: row.get("held-out") for row in run.evaluations}
    if not known:
        return math.nan, math.nan, ""
    best = run.best if run.best in known else max(known)
    return known.get(0, math.nan), known[best], f"{'best' if best == run.best else 'newest'}, epoch {best}"


def _why_unknown(run: RunRecord) -> str:
    if not run.evaluations:
        return "No held-out evaluation: whether the policy got better is not known"
    if len(run.evaluations) == 1:
        return "One evaluation so far: nothing to compare with"
    return "No scores per prompt, so no interval"


def _short(name: object) -> str:
    """The last word of a dotted path."""
    return name.rsplit(".", 1)[-1] if isinstance(name, str) else ""


def _facts(run: RunRecord, change: Difference | None) -> tuple[tuple[str, str], ...]:
    rate = samples_per_second(run)
    processes, devices = run.environment.get("processes"), run.environment.get("devices")
    kinds = sorted({str(device) for device in devices}) if isinstance(devices, list) else []
    facts = [("Wall time", duration(run.seconds))]
    if change is not None:
        same = change.count - change.better - change.worse
        facts.append(("Prompts", f"{change.better} better, {change.worse} worse, {same} the same"))
    if math.isfinite(rate):
        facts.append(("Training samples/s", number(rate)))
    if isinstance(processes, int):
        facts.append(("Processes", " on ".join([count(processes), *(["; ".join(kinds)] if kinds else [])])))
    rewards = [row.get("reward") for row in run.epochs if math.isfinite(row.get("reward"))]
    if rewards:
        facts.append(("Training reward", f"{number(rewards[0])} to {number(rewards[-1])}"))
    return tuple(facts)

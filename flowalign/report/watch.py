"""What the watch for reward hacking saw: the trained reward against the metric, looks, and alarms with pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import stdev

from flowalign.looks import ALARM
from flowalign.report.charts import Chart, Series, line_chart
from flowalign.report.comparing import difference
from flowalign.report.formats import number
from flowalign.report.images import LARGEST_SHEET, WIDEST_SHEET, Embedded, embed
from flowalign.report.reading import Row, RunRecord

PREFIX = "watch/"
SHORT = "watch/short/"
TITLES = {
    "saturation": ("Saturation", "0 for grey, 1 for pure colours"),
    "clipped": ("Clipped values", "share that is black or full"),
    "fine_detail": ("Fine detail", "share of the spectrum above half of Nyquist"),
    "grid_lines": ("Grid lines", "of 8 pixels; 0 for none, 1 for nothing else"),
    "tiling": ("Tiling", "by 16 pixels; 0 for none, 1 for nothing else"),
    "variety": ("Variety", "distance between prompts' pictures, of the first ones'"),
    "distance": ("Distance from the first pictures", "1 is that between prompts"),
}


@dataclass(frozen=True)
class Alarm:
    """An alarm in words, with its contact sheet where that is there."""

    epoch: int
    kind: str
    text: str
    picture: Embedded | None


@dataclass(frozen=True)
class Watched:
    """gains: charts of the trained reward and what it is held against. looks: of the pictures. alarms: in order."""

    gains: tuple[Chart, ...]
    looks: tuple[Chart, ...]
    alarms: tuple[Alarm, ...]

    @property
    def told(self) -> tuple[str, ...]:
        """The alarms as warnings."""
        return tuple(f"Possible reward hacking: {alarm.text}." for alarm in self.alarms)


def watched(run: RunRecord) -> Watched | None:
    """All of it; None of a run that was not watched."""
    names = dict.fromkeys(name for row in run.evaluations for name in row.values if name.startswith(PREFIX))
    if not names:
        return None
    judges = [name.removeprefix(SHORT) for name in names if name.startswith(SHORT)]
    return Watched(
        gains=_drawn([_gains(run), *(_short(run, judge) for judge in judges)]),
        looks=_drawn(_look(run, name) for name in TITLES if PREFIX + name in names),
        alarms=tuple(
            _alarm(run, row.step, name) for row in run.evaluations for name in row.values if name.startswith(ALARM)
        ),
    )


def _gains(run: RunRecord) -> Chart | None:
    """Both in standard deviations over the prompts at the start, so that they share an axis."""
    trained = _banded(run.evaluations, "watch/trained_change", "watch/trained_error", "trained reward", "train")
    judged = _metric(run)
    note = "held-out prompts; standard deviations of the first evaluation's scores; bands: 95 %, paired"
    return line_chart("Gain since the start", note, [one for one in (trained, judged) if one is not None], 0.0)


def _banded(rows: tuple[Row, ...], name: str, error: str, label: str, role: str) -> Series | None:
    known = [row for row in rows if math.isfinite(row.get(name)) and math.isfinite(row.get(error))]
    if not known:
        return None
    middle, reach = [row.get(name) for row in known], [1.96 * row.get(error) for row in known]
    low, high = (tuple(m + sign * r for m, r in zip(middle, reach, strict=True)) for sign in (-1, 1))
    return Series(label, role, tuple(float(row.step) for row in known), tuple(middle), low, high, dots=True)


def _metric(run: RunRecord) -> Series | None:
    """The metric's gain over the prompts of the first evaluation."""
    first = run.scored.get(0)
    before = {i: scores[run.metric] for i, scores in enumerate(first or ()) if run.metric in scores}
    spread = stdev(before.values()) if len(before) > 1 else 0.0
    points = []
    for epoch in sorted(run.scored):
        pairs = [
            (before[i], one[run.metric]) for i, one in enumerate(run.scored[epoch]) if i in before and run.metric in one
        ]
        change = difference(pairs)
        if change is not None and spread > 0:
            points.append((float(epoch), change.change / spread, change.low / spread, change.high / spread))
    if not points:
        return None
    x, y, low, high = zip(*points, strict=True)
    return Series(f"held-out {run.metric}", "held-out", x, y, low, high, dots=True)


def _short(run: RunRecord, judge: str) -> Chart | None:
    series = _banded(run.evaluations, SHORT + judge, f"watch/short_error/{judge}", judge, "held-out")
    note = "its gain below what the trained reward's should have brought; band: 95 %"
    return None if series is None else line_chart(f"{judge} falls short by", note, [series], 0.0)


def _look(run: RunRecord, name: str) -> Chart | None:
    rows = [row for row in run.evaluations if math.isfinite(row.get(PREFIX + name))]
    if not rows:
        return None
    y = tuple(row.get(PREFIX + name) for row in rows)
    title, note = TITLES[name]
    series = Series(name, "held-out", tuple(float(row.step) for row in rows), y, dots=True)
    return line_chart(title, f"{note}; {number(y[0])} to {number(y[-1])}", [series], y[0])


def _alarm(run: RunRecord, epoch: int, name: str) -> Alarm:
    kind = name.removeprefix(ALARM)
    file = f"samples/alarm-{epoch:06d}-{kind}.png"
    told = [event.detail for event in run.events if event.name == "alarm" and file in event.detail]
    text = told[-1].partition("; pictures in ")[0] if told else f"alarm at epoch {epoch}: {kind}"
    try:
        picture = embed((run.folder / file).read_bytes(), WIDEST_SHEET, LARGEST_SHEET)
    except OSError:
        picture = None
    return Alarm(epoch, kind, text, picture)


def _drawn(charts: Iterable[Chart | None]) -> tuple[Chart, ...]:
    return tuple(chart for chart in charts if chart is not None)

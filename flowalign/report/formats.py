"""Numbers as a reader wants them: few digits, no exponent where none is needed."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """Three or four significant digits; "n/a" for what is no number."""
    size = abs(value)
    if not math.isfinite(value):
        return "n/a"
    if size >= 100 or value == int(value):
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.2f}"
    return f"{value:.3f}" if size >= 0.01 else f"{value:.3g}"


def signed(value: float) -> str:
    """A difference with its sign, to the thousandth where that is enough to tell it from 0; rounding of sums is 0."""
    if abs(value) < 1e-12:
        return "0"
    if 0.0005 <= abs(value) < 10:
        return f"{value:+.3f}"
    return f"+{number(value)}" if value > 0 else number(value)


def count(value: float) -> str:
    """A whole number with separators."""
    return f"{value:,.0f}" if math.isfinite(value) else "n/a"


def percent(share: float) -> str:
    """A share of 1 as a percentage; one decimal where it is small."""
    if not math.isfinite(share):
        return "n/a"
    return f"{100 * share:.1f} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"


def duration(seconds: float) -> str:
    """Seconds in the two largest units."""
    if not math.isfinite(seconds):
        return "n/a"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"

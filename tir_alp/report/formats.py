"""How a report writes numbers. Pure."""

from __future__ import annotations

import math

from tir_alp.report.intervals import Interval


def number(value: float) -> str:
    """Return a number with up to four digits, and a whole one with all of its digits."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e9 else f"{value:.4g}"


def share(value: float) -> str:
    """Return a share in per cent; "unknown" if it is not finite."""
    return f"{value:.1%}" if math.isfinite(value) else "unknown"


def with_interval(found: Interval, form: str) -> str:
    """Return a mean with its interval in brackets, if it has one.

    Args:
        found: The interval.
        form: Format of each number, as of `format`.
    """
    if not math.isfinite(found.mean):
        return "-"
    if not found.is_known:
        return format(found.mean, form)
    low, high = format(found.low, form), format(found.high, form)
    return f"{format(found.mean, form)} [{low}, {high}]"


def counted(count: int, one: str, many: str) -> str:
    """Return a number of things, e.g. "1 step" or "2 steps"."""
    return f"{count} {one if count == 1 else many}"


def duration(seconds: float) -> str:
    """Return a time in words of at most two units, e.g. "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"

"""The result of one check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One row of the doctor's table.

    Example: `CheckResult("disk", False, "needs 40 GB, 12 GB are free", "free some space, or lower
    checkpoint.keep")`.
    """

    check: str
    """Name of the check, as in `doctor.ignore`."""
    holds: bool
    figure: str
    """What was measured, for people to read."""
    fix: str = ""
    """What to do if the check does not hold."""

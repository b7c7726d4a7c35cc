"""What one check found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table.

    Example: `Finding("disk", False, "needs 40 GB, 12 GB are free", "free some, or lower
    checkpoint.keep")`.
    """

    check: str
    """Its name, by which `doctor.ignore` knows it."""
    holds: bool
    figure: str
    """What was measured."""
    fix: str = ""
    """What to do where it does not hold."""

"""What an audit has checked, and what it found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

CHECKS = (
    "files",
    "steps",
    "groups",
    "trajectories",
    "prompt tokens",
    "sampled tokens",
    "logprobs",
    "stop reasons",
    "versions",
    "observation tokens",
    "captures",
    "loss mask",
    "turns replayed",
    "texts",
    "attempts",
    "sequences in the loss",
    "tokens in the loss",
    "metrics",
)
"""In the order of the printed table. `docs/audit.md` describes what each check compares."""


_OF_AGENTS = "captures"


@dataclass(frozen=True, slots=True)
class Location:
    """Where something was found. A field is None if it is unknown or does not apply."""

    file: str
    line: int | None = None
    task: str | None = None
    turn: int | None = None
    token: int | None = None

    def at(self, *, turn: int | None = None, token: int | None = None) -> Location:
        """Return the location of a turn in this one, or of a token in a turn."""
        return replace(self, turn=self.turn if turn is None else turn, token=token)

    def __str__(self) -> str:
        named = {"task": self.task, "turn": self.turn, "token": self.token}
        inner = [f"{name} {value}" for name, value in named.items() if value is not None]
        return ", ".join([self.file + ("" if self.line is None else f":{self.line}"), *inner])


@dataclass(frozen=True, slots=True)
class Drift:
    """A disagreement between two sources."""

    check: str
    location: Location
    what: str

    def __str__(self) -> str:
        return f"{self.location}: {self.what} ({self.check})"


@dataclass(slots=True)
class Findings:
    """Collects the results of an audit while it runs."""

    drifts: list[Drift] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Remarks about the run that are not drifts."""
    _checked: Counter[str] = field(default_factory=Counter)

    def count(self, check: str, number: int = 1) -> None:
        """Count items that a check has looked at."""
        assert check in CHECKS
        self._checked[check] += number

    def drift(self, check: str, location: Location, what: str) -> None:
        """Add a drift."""
        assert check in CHECKS
        self.drifts.append(Drift(check, location, what))

    def expect(self, holds: bool, check: str, location: Location, what: str) -> bool:
        """Add a drift unless a condition holds; return whether it holds."""
        if not holds:
            self.drift(check, location, what)
        return holds

    def note_once(self, note: str) -> None:
        """Add a remark about the run, unless it is there."""
        if note not in self.notes:
            self.notes.append(note)

    def totals(self) -> dict[str, tuple[int, int]]:
        """Return, for each check, how many items it looked at and how many drifts it found.

        The check of captures is left out where there are none: the run had no agents.
        """
        drifted = Counter(drift.check for drift in self.drifts)
        found = {check: (self._checked[check], drifted[check]) for check in CHECKS}
        if not any(found[_OF_AGENTS]):
            del found[_OF_AGENTS]
        return found

"""What an audit has looked at, and what it found."""

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
    "loss mask",
    "turns replayed",
    "attempts",
    "sequences in the loss",
    "tokens in the loss",
    "metrics",
)
"""In the order of the table. `docs/audit.md` says what each of them compares."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was found; what is None is not known, or not meant."""

    file: str
    line: int | None = None
    task: str | None = None
    turn: int | None = None
    token: int | None = None

    def at(self, *, turn: int | None = None, token: int | None = None) -> Place:
        """A turn of it, or a token of that."""
        return replace(self, turn=self.turn if turn is None else turn, token=token)

    def __str__(self) -> str:
        named = {"task": self.task, "turn": self.turn, "token": self.token}
        parts = [f"{name} {value}" for name, value in named.items() if value is not None]
        return ", ".join([self.file + ("" if self.line is None else f":{self.line}"), *parts])


@dataclass(frozen=True, slots=True)
class Drift:
    """Something that two sources do not agree on."""

    check: str
    place: Place
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what} ({self.check})"


@dataclass(slots=True)
class Findings:
    """Grows while an audit goes on."""

    drifts: list[Drift] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is no drift, and should be known."""
    _checked: Counter[str] = field(default_factory=Counter)

    def count(self, check: str, number: int = 1) -> None:
        """So many were looked at."""
        assert check in CHECKS
        self._checked[check] += number

    def drift(self, check: str, place: Place, what: str) -> None:
        """One was found that is not as it should be."""
        assert check in CHECKS
        self.drifts.append(Drift(check, place, what))

    def expect(self, holds: bool, check: str, place: Place, what: str) -> bool:
        """Note a drift where something does not hold; returns whether it does."""
        if not holds:
            self.drift(check, place, what)
        return holds

    def totals(self) -> dict[str, tuple[int, int]]:
        """How many each check looked at, and how often it found a drift."""
        drifted = Counter(drift.check for drift in self.drifts)
        return {check: (self._checked[check], drifted[check]) for check in CHECKS}

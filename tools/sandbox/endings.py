"""How an interpreter is lost: what its keeper saw, and what that means to the caller."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.jail.fork_server import ABORTED

CLOSED_CHANNEL = "it closed the sandbox's own channel"
CRASHED = ""
"""The reason until the keeper has reported a better one."""


@dataclass(frozen=True, slots=True)
class Death:
    """How an interpreter ended, as its keeper saw it."""

    status: int | None
    """Status as wait(2) gives it; None if nobody could wait for the process."""
    limit: str = ""
    """The limit for which its keeper killed it; empty if it did not."""


SERVER_DIED = Death(-1)
"""The whole jail is gone."""


class Lost(Exception):
    """The interpreter is gone, with its state."""

    def __init__(
        self, outcome: Outcome, reason: str, *, status: int | None = None, signal_number: int = 0
    ) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason
        self.status = status
        """Its exit status, if it exited by itself."""
        self.signal_number = signal_number
        """The signal of which it died by itself; 0 if it did not."""

    @property
    def exit_status(self) -> int | None:
        """As a shell shows it: 128 + N after signal N. None if it was killed."""
        return 128 + self.signal_number if self.signal_number else self.status


def lost_by(death: Death, *, we_killed: bool, kills_itself: bool) -> Lost:
    """Interpret the death of a crashed interpreter.

    Args:
        death: A death of the interpreter alone, not of the whole jail.
        we_killed: Whether the host killed it because it had closed its channel and lived on.
        kills_itself: Whether a program can send a SIGKILL. If it cannot, the machine ran out of
            memory or somebody outside sent the signal.
    """
    if death.limit:
        return Lost(Outcome.RESOURCE_LIMIT, death.limit)
    if death.status is None:
        return Lost(Outcome.TOOL_ERROR, CLOSED_CHANNEL if we_killed else "it died")
    if death.status == signal.SIGKILL and we_killed:
        return Lost(Outcome.TOOL_ERROR, CLOSED_CHANNEL)
    if death.status == signal.SIGKILL and not kills_itself:
        return Lost(Outcome.INFRA_ERROR, "it was killed from outside")
    if os.WIFSIGNALED(death.status):
        return _died_of(os.WTERMSIG(death.status))
    status = os.WEXITSTATUS(death.status)
    if status == ABORTED:
        return _died_of(signal.SIGABRT)
    return Lost(Outcome.TOOL_ERROR, f"it exited with status {status}", status=status)


def _died_of(number: int) -> Lost:
    return Lost(Outcome.TOOL_ERROR, f"it died of {_name(number)}", signal_number=number)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"

"""The processes of this machine, for tests that count them or wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """One process; its start time distinguishes it from a later one with the same number."""

    pid: int
    started: str


def descendants(pid: int) -> list[Process]:
    """The descendants of a process, children first, without zombies."""
    children: dict[int, list[Process]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if (found := _look(int(folder.name))) is not None:
            process, parent = found
            children.setdefault(parent, []).append(process)
    line = list(children.get(pid, []))
    for process in line:
        line += children.get(process.pid, [])
    return line


def is_running(process: Process) -> bool:
    """Whether the process still lives."""
    found = _look(process.pid)
    return found is not None and found[0] == process


def wait_until(
    condition: Callable[[], object],
    within_s: float = 60.0,
    *,
    pause_s: float = 0.02,
    more: Callable[[], str] = str,
) -> None:
    """Wait for something that has to happen, however long a loaded machine takes for it.

    Args:
        condition: Returns whether it has happened.
        within_s: Seconds after which the test fails.
        pause_s: Seconds between two checks; longer if a check is expensive.
        more: Returns text for the message of a failure.
    """
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s\n{more()}"
        time.sleep(pause_s)


def _look(pid: int) -> tuple[Process, int] | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (Process(pid, fields[19]), int(fields[1]))

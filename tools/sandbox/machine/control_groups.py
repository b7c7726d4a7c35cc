"""The control groups around a process, of version 1 or 2: their limits, and what is used of them.

Seen from outside of any session, so that it can be trusted. A file that is not there is no limit:
the root has none, and some lie outside of the container that this process is in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_TOP = Path("/sys/fs/cgroup")
_PROCESSES = Path("/proc")
_NO_LIMIT = 1 << 60
"""Version 1 writes the largest number of pages instead of "max"."""


def control_groups(
    controller: str, pid: int | str = "self", *, top: Path = _TOP, processes: Path = _PROCESSES
) -> Iterator[Path]:
    """The groups that count this process under a controller, from the innermost outwards."""
    for line in (processes / str(pid) / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = top / controller if controllers else top
        group = mount / path.lstrip("/")
        while group.is_relative_to(mount):
            yield group
            group = group.parent


def number(folder: Path, *files: str) -> int | None:
    """What the first of these files that is there says; None if none is, or it says "no limit"."""
    for file in files:
        try:
            text = (folder / file).read_text().strip()
        except OSError:
            continue
        return None if text == "max" or int(text) >= _NO_LIMIT else int(text)
    return None


def free_memory(folder: Path) -> int | None:
    """Bytes that a group may still take; None if it has no limit.

    File pages that nobody has touched for a while are free: the kernel drops them first.
    """
    limit = number(folder, "memory.max", "memory.limit_in_bytes")
    used = number(folder, "memory.current", "memory.usage_in_bytes")
    if limit is None or used is None:
        return None
    lines = (folder / "memory.stat").read_text().splitlines()
    statistics = dict(line.split() for line in lines)
    idle = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
    return max(0, limit - used + int(idle))


def free_processes(folder: Path) -> int | None:
    """Processes and threads that a group may still start; None if it has no limit."""
    limit, used = number(folder, "pids.max"), number(folder, "pids.current")
    return None if limit is None or used is None else max(0, limit - used)

"""The control groups around a process, of version 1 or 2: what their limits leave.

They are read from outside of any session, so the values can be trusted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tir_alp.tools.sandbox.jail.limit_files import read_number

_TOP = Path("/sys/fs/cgroup")
_PROCESSES = Path("/proc")


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


def free_memory(folder: Path) -> int | None:
    """Bytes that a group may still take; None if it has no limit.

    File pages that nobody has touched for a while are free: the kernel drops them first.
    """
    limit = read_number(folder, "memory.max", "memory.limit_in_bytes")
    used = read_number(folder, "memory.current", "memory.usage_in_bytes")
    if limit is None or used is None:
        return None
    lines = (folder / "memory.stat").read_text().splitlines()
    statistics = dict(line.split() for line in lines)
    idle = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
    return max(0, limit - used + int(idle))


def free_processes(folder: Path) -> int | None:
    """Processes and threads that a group may still start; None if it has no limit."""
    limit, used = read_number(folder, "pids.max"), read_number(folder, "pids.current")
    return None if limit is None or used is None else max(0, limit - used)

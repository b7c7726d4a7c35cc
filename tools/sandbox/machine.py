"""What this machine has left to give, as the kernel tells it: the defaults of the budgets."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

_SHARE_OF_FREE = 0.75
_KERNEL_LIMITS = ("pid_max", "threads-max")


def share_of_free_memory_mb() -> int:
    """Megabytes for all sessions together."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free_kb = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return int(_SHARE_OF_FREE * free_kb / 1024)


def share_of_free_processes() -> int:
    """Processes and threads for all sessions together.

    The least that is left by the kernel's own limits, by that of the user and by those of the
    control groups around this process.
    """
    return max(1, int(_SHARE_OF_FREE * min(_free_processes())))


def _free_processes() -> Iterator[int]:
    num_tasks = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
    for name in _KERNEL_LIMITS:
        yield int(Path("/proc/sys/kernel", name).read_text()) - num_tasks
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if limit != resource.RLIM_INFINITY:
        yield limit - num_tasks  # at most so many of them are this user's
    for folder in _control_groups():
        try:
            limit_text = (folder / "pids.max").read_text().strip()
            if limit_text != "max":
                yield int(limit_text) - int((folder / "pids.current").read_text())
        except FileNotFoundError:  # the root has no limit, or it lies outside of this container
            continue


def _control_groups() -> Iterator[Path]:
    """The groups that count this process's children, from the innermost outwards."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "pids" not in controllers.split(","):
            continue
        mount = Path("/sys/fs/cgroup", "pids" if controllers else "")
        group = mount / path.lstrip("/")
        while group.is_relative_to(mount):
            yield group
            group = group.parent

"""What this machine has to give: free memory and processes for the budgets, and open files.

The defaults of the two budgets are a share of what the kernel leaves when the sandbox starts. Open
files are not shared out: the limit of this process is raised to what all sessions need.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from tir_alp.tools.sandbox.machine.control_groups import control_groups, free_memory, free_processes
from tir_alp.tools.sandbox.result import SandboxRefused

_SHARE_OF_FREE = 0.75
_KERNEL_LIMITS = ("pid_max", "threads-max")
_FILES_PER_INTERPRETER = 6
"""Control socket, stdout, stderr, pidfd, status, and the questions of its filter."""
_FILES_PER_FORK_SERVER = 5
_SPARE_FILES = 128
"""For births, before the other ends are given away, and for the rest of the program."""


def share_of_free_memory_mb() -> int:
    """Megabytes for all sessions together.

    A share of the least that the machine and the control groups around this process leave.
    """
    return max(1, int(_SHARE_OF_FREE * min(_free_memory()) / 2**20))


def share_of_free_processes() -> int:
    """Processes and threads for all sessions together.

    A share of the least that the kernel's own limits, the user's limit and the control groups
    around this process leave.
    """
    return max(1, int(_SHARE_OF_FREE * min(_free_processes())))


def provide_open_files(num_interpreters: int, num_fork_servers: int) -> None:
    """Raise this process's soft limit of open files to what so many interpreters need.

    Raises:
        SandboxRefused: The hard limit is lower; the message says how to raise it.
    """
    others = len(os.listdir("/proc/self/fd")) + _SPARE_FILES
    needed = _FILES_PER_INTERPRETER * num_interpreters
    needed += _FILES_PER_FORK_SERVER * num_fork_servers + others
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        fewer = -(-(needed - hard) // _FILES_PER_INTERPRETER)
        raise SandboxRefused(
            f"{num_interpreters} interpreters (max_sessions and ready_sessions) need {needed} open "
            f"files, and this process may have {hard}: raise the hard limit (`ulimit -Hn {needed}` "
            f"as root, LimitNOFILE={needed} in systemd, --ulimit nofile={needed} for a container), "
            f"or lower max_sessions by {fewer} or more"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _free_memory() -> Iterator[int]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    yield next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    yield from (free for free in map(free_memory, control_groups("memory")) if free is not None)


def _free_processes() -> Iterator[int]:
    num_tasks = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
    for name in _KERNEL_LIMITS:
        yield int(Path("/proc/sys/kernel", name).read_text()) - num_tasks
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if limit != resource.RLIM_INFINITY:
        yield limit - num_tasks  # at most this many of them belong to this user
    yield from (free for free in map(free_processes, control_groups("pids")) if free is not None)

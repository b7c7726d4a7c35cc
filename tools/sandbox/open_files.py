"""Sees to it that the host may open what its sessions need: a few descriptors each."""

from __future__ import annotations

import os
import resource

from tir_alp.tools.sandbox.result import SandboxRefused

_PER_INTERPRETER = 6
"""Control socket, stdout, stderr, pidfd, status; and the questions of its filter."""
_PER_FORK_SERVER = 5
_SPARE = 128
"""For a birth, before the other ends are given away, and for the rest of the program."""


def provide_open_files(num_interpreters: int, num_fork_servers: int) -> None:
    """Raise this process's soft limit of open files, to what so many interpreters need.

    Raises:
        SandboxRefused: The hard limit is lower, and says how many interpreters it allows.
    """
    others = len(os.listdir("/proc/self/fd")) + _SPARE
    needed = _PER_INTERPRETER * num_interpreters + _PER_FORK_SERVER * num_fork_servers + others
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SandboxRefused(
            f"{num_interpreters} interpreters (max_sessions and ready_sessions) need {needed} open "
            f"files, and this process may have {hard}: raise the hard limit (`ulimit -Hn {needed}` "
            f"as root, LimitNOFILE={needed} in systemd, --ulimit nofile={needed} for a container), "
            f"or lower max_sessions by {-(-(needed - hard) // _PER_INTERPRETER)} or more"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))

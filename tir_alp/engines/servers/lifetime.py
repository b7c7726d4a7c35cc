"""Ties the life of a process to that of the process that started it.

This file needs the standard library alone: servers that have an environment of their own load it by
its path.
"""

from __future__ import annotations

import ctypes
import os
import signal

PARENT_VARIABLE = "TIR_ALP_SERVER_PARENT"
"""Environment variable with the id of the process that started this one."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before the call above
        os.kill(os.getpid(), signal.SIGKILL)
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # for processes that this one starts

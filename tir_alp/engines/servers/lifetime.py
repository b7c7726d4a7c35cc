"""Ties a process to the one that started it. Needs the standard library alone, and nothing of ours:
servers in an environment of their own load this file by its path.
"""

from __future__ import annotations

import ctypes
import os
import signal

PARENT_VARIABLE = "TIR_ALP_SERVER_PARENT"
"""Process id of whoever started a process, in its environment."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it is gone."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it was gone before we asked
        os.kill(os.getpid(), signal.SIGKILL)
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # to those that this one starts

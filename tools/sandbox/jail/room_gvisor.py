"""A session in a folder, on gVisor's kernel.

gVisor does not count the threads of a user, and a branch becomes the child of the interpreter
instead of the keeper. So the keeper counts threads as well, and stays until the last branch has
ended, for which it cannot wait(2).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from tir_alp.tools.sandbox.jail.room_folder import FolderRoom


class GvisorRoom(FolderRoom):
    """See `fork_server.Room`."""

    def _reap(self, interpreter: int) -> tuple[int, int]:
        try:
            return super()._reap(interpreter)
        except ChildProcessError:
            if not any(process.is_alive for process in _group(interpreter)):
                raise
            return 0, 0

    def _exceeded(self, interpreter: int) -> str:
        limit = self._spec.max_threads
        assert limit is not None
        living = (process for process in _group(interpreter) if process.is_alive)
        if 1 + sum(process.num_threads for process in living) > limit:
            return "it had more threads than it may use"
        return super()._exceeded(interpreter)


@dataclass(frozen=True, slots=True)
class _Process:
    is_alive: bool
    num_threads: int


def _group(leader: int) -> Iterator[_Process]:
    """The processes of a process group, which none of them can leave."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
            if int(fields[2]) == leader:
                yield _Process(fields[0] != "Z", int(fields[17]))

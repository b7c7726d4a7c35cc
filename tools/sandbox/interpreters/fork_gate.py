"""Lets an interpreter fork when the host has asked it to, and at no other time.

The seccomp filter forbids every fork except one form of clone(2), about which the kernel asks the
host. So code inside a session can start threads but no processes, and the address space limit of
one process is the memory limit of a session. Where the kernel does not count the threads of each
session, it asks the host about every new thread as well.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
from pathlib import Path

from tir_alp.tools.sandbox.jail.kernel import CLONE_THREAD

_NOTIFICATION = struct.Struct("=QII16xQ40x")  # id, thread, flags, first argument of the call
_ANSWER = struct.Struct("=QqiI")  # id, value, error, flags
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1


class ForkGate:
    """Answers the kernel's questions about one session and its branches, which share a filter.

    Every user calls `retain`; the last `release` closes the gate.
    """

    def __init__(self, questions: int, max_threads: int | None) -> None:
        self._questions = questions
        self._max_threads = max_threads
        self._users = 0
        self._permits: set[int] = set()
        asyncio.get_running_loop().add_reader(questions, self._answer)

    def retain(self) -> ForkGate:
        """Count one more user."""
        self._users += 1
        return self

    def release(self) -> None:
        """Count one user less, and close the gate after the last."""
        self._users -= 1
        if self._users == 0:
            asyncio.get_running_loop().remove_reader(self._questions)
            os.close(self._questions)

    def permit(self, pid: int) -> None:
        """Let this process fork once."""
        self._permits.add(pid)

    def withdraw(self, pid: int) -> bool:
        """Take a permit back; False if it has been used."""
        unused = pid in self._permits
        self._permits.discard(pid)
        return unused

    def _answer(self) -> None:
        question = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(self._questions, _RECEIVE, question)
            number, thread, _, clone_flags = _NOTIFICATION.unpack(question)
            if clone_flags & CLONE_THREAD:
                refusal = self._refusal_of_thread(thread)
            else:
                refusal = 0 if self.withdraw(thread) else errno.EPERM
            answer = _ANSWER.pack(number, 0, -refusal, 0 if refusal else _CONTINUE)
            fcntl.ioctl(self._questions, _SEND, answer)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINTR):  # the asker was killed meanwhile
                raise

    def _refusal_of_thread(self, asker: int) -> int:
        """The error number for one more thread of this process; 0 if it may start.

        A thread counts only once it has started. When many ask at the same time, there can be
        twice as many threads as allowed for a moment, but never more.
        """
        try:
            status = Path(f"/proc/{asker}/status").read_text()
        except OSError:  # the asker was killed meanwhile
            return errno.EAGAIN
        num_threads = int(status.partition("Threads:")[2].split(None, 1)[0])
        assert self._max_threads is not None
        return errno.EAGAIN if num_threads >= self._max_threads else 0

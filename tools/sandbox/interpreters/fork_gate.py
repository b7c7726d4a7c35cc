"""Lets an interpreter fork when the host has asked for it, and at no other time.

The seccomp filter forbids every fork but one form of clone(2), about which the kernel asks the
host. So code inside a session can start threads, never processes: that is what makes the address
space limit of one process the memory limit of a session. Where the kernel does not count threads a
session, it asks the host about each of them as well.
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
    """The questions of one session and of all its branches, which share its filter.

    Whoever uses it calls `retain`; the last `release` closes it.
    """

    def __init__(self, questions: int, max_threads: int | None) -> None:
        self._questions = questions
        self._max_threads = max_threads
        self._users = 0
        self._permits: set[int] = set()
        asyncio.get_running_loop().add_reader(questions, self._answer)

    def retain(self) -> ForkGate:
        """Count one user more."""
        self._users += 1
        return self

    def release(self) -> None:
        """Count one user less."""
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
            if error.errno not in (errno.ENOENT, errno.EINTR):  # who asked was killed meanwhile
                raise

    def _refusal_of_thread(self, asker: int) -> int:
        """The error number for one more thread in this process, 0 if it may have it.

        Threads that ask at the same time count only once each has started, so that for a moment
        there can be twice as many as allowed, and never more.
        """
        try:
            status = Path(f"/proc/{asker}/status").read_text()
        except OSError:  # who asked was killed meanwhile
            return errno.EAGAIN
        num_threads = int(status.partition("Threads:")[2].split(None, 1)[0])
        assert self._max_threads is not None
        return errno.EAGAIN if num_threads >= self._max_threads else 0

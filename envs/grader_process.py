"""The process that `grader_pool` forks its workers from; it is started by path.

It imports nothing of this package but the judge and what that needs, answers no request itself, and
has one thread, so that a fork of it is as good as a fresh process and takes milliseconds instead of
a second. A
worker serves one request after the other, and may be killed at any moment. Workers are killed here,
by their parent, so that no process identifier is ever signalled after it could have been reused.

A judge is a file with a function `judge(*request)`. Its value is sent as JSON; a string means that
there is no verdict, and gives the reason. `warm_up()`, if the file has it, is called once before
any fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import resource
import runpy
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn

MEMORY_BYTES = 4 << 30
ORPHAN_GRACE_S = 1.0
NICENESS_STEP = 10  # a tenth of the processor share of others; at the second time a hundredth
_PR_SET_PDEATHSIG = 1


def _load(file: str) -> Callable[..., Any]:
    module = runpy.run_path(file)
    logging.disable(logging.CRITICAL)
    if "warm_up" in module:
        module["warm_up"]()
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError(f"{file} starts threads, so that no worker can be forked")
    gc.collect()
    gc.freeze()  # so that no collection writes to pages that all workers share
    return module["judge"]


def _fork_on_request(control: socket.socket, judge: Callable[..., Any]) -> None:
    """Serve `fork`, which comes with a pipe, and `slow ID` and `end ID` until nobody asks."""
    workers: set[int] = set()
    try:
        while True:
            message, pipes, _, _ = socket.recv_fds(control, 64, 1)
            if not message:
                return
            if pipes:
                pid = _fork(control, pipes[0], judge)
                os.close(pipes[0])
                workers.add(pid)
                control.send(str(pid).encode())
                continue
            verb, number = message.split()
            pid, answer = int(number), 0
            if verb == b"slow" and pid in workers:
                niceness = os.getpriority(os.PRIO_PROCESS, pid) + NICENESS_STEP
                os.setpriority(os.PRIO_PROCESS, pid, min(niceness, 19))
            if verb == b"end" and pid in workers:
                workers.remove(pid)
                answer = _end(pid)
            control.send(str(answer).encode())
    finally:
        for pid in workers:
            _end(pid)


def _end(pid: int) -> int:
    """Kill a worker, and return its exit status; negative, the signal that ended it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fork(control: socket.socket, pipe: int, judge: Callable[..., Any]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            control.close()
            _serve(Connection(pipe), judge)
    finally:
        os._exit(1)


def _serve(requests: Connection, judge: Callable[..., Any]) -> NoReturn:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    while True:
        try:
            request, deadline_s = requests.recv()
        except EOFError:
            os._exit(0)
        # The pool has this process killed at the deadline. If the pool is gone, the kernel does.
        signal.setitimer(signal.ITIMER_REAL, deadline_s + ORPHAN_GRACE_S)
        try:
            verdict = judge(*request)
        except MemoryError:
            raise  # this process is no longer fit for work
        except Exception as error:
            arguments = ", ".join(f"{each!r:.200}" for each in request)
            verdict = f"the judge failed on {arguments}: {type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        requests.send_bytes(json.dumps(verdict).encode())


if __name__ == "__main__":
    _control = socket.socket(fileno=int(sys.argv[1]))
    sys.path.append(sys.argv[3])  # the package may be found by the working folder alone
    _judge = _load(sys.argv[2])
    _control.send(b"ready")
    _fork_on_request(_control, _judge)

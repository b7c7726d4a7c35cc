"""The process in which `grader_pool` runs a judge; it is started by path.

It imports nothing of this package but the judge, serves one request after the other, and may be
killed at any moment. A judge is a file with a function `judge(*request)`. Its value is sent as
JSON; a string means that there is no verdict, and gives the reason.
"""

from __future__ import annotations

import json
import logging
import resource
import runpy
import signal
import sys
from multiprocessing.connection import Connection

MEMORY_BYTES = 4 << 30
ORPHAN_GRACE_S = 1.0


def _serve(requests: Connection, file: str) -> None:
    judge = runpy.run_path(file)["judge"]
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    requests.send_bytes(b'"ready"')
    while True:
        try:
            request, deadline_s = requests.recv()
        except EOFError:
            return
        # The pool kills this process at the deadline. If the pool is gone, the kernel does.
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
    _serve(Connection(int(sys.argv[1])), sys.argv[2])

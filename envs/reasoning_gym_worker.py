"""The process that runs scorers of reasoning-gym for `grader_pool`, which starts it by its path.

It imports nothing of ours, serves one request after the other and may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from reasoning_gym.factory import get_score_answer_fn

MEMORY_BYTES = 4 << 30
ORPHAN_GRACE_S = 1.0

_scorer: Callable[[str], Callable[..., float]] = functools.cache(get_score_answer_fn)


def _score(name: str, answer: str, entry: Mapping[str, Any]) -> float | str:
    """Return what the data set's own scorer says, or why it says nothing."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return float(_scorer(name)(answer=answer, entry=dict(entry)))
    except MemoryError:
        raise  # this process is no longer fit for work
    except Exception as error:
        return f"the scorer of {name!r} failed on {answer[:200]!r}: {type(error).__name__}: {error}"


def _serve(requests: Connection) -> None:
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    requests.send_bytes(b'"ready"')
    while True:
        try:
            name, answer, entry, deadline_s = requests.recv()
        except EOFError:
            return
        # The pool kills at the deadline. Should the pool itself be gone, the kernel does.
        signal.setitimer(signal.ITIMER_REAL, deadline_s + ORPHAN_GRACE_S)
        verdict = _score(name, answer, entry)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        requests.send_bytes(json.dumps(verdict).encode())


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))

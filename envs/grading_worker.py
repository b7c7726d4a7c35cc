"""The process that runs math-verify for `grader_pool`, which starts this file by its path.

It imports nothing of ours, serves one request after the other and may be killed at any moment.
Neither of math-verify's own time limits is used: they raise from a signal handler, which sympy's
`except Exception` blocks and long C calls can swallow.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
from multiprocessing.connection import Connection

from math_verify import parse, verify
from math_verify.parser import LatexExtractionConfig

MEMORY_BYTES = 4 << 30
ORPHAN_GRACE_S = 1.0


def _parse(text: str) -> list:
    # In a box of its own the whole text is the expression: nothing is searched for inside it.
    return parse(
        f"\\boxed{{{text}}}",
        extraction_config=(LatexExtractionConfig(boxed_match_priority=0),),
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]
    )


def _verdict(answer: str, truth: str) -> bool | str:
    """Return whether the answer equals the truth, or why that cannot be told."""
    expected = _parse(truth)
    if not expected:
        return f"math-verify cannot read the truth {truth!r}"
    try:
        return verify(expected, _parse(answer), timeout_seconds=None, raise_on_error=True)
    except MemoryError:
        raise  # this process is no longer fit for work
    except Exception as error:
        return f"math-verify failed on {answer[:200]!r}: {type(error).__name__}: {error}"


def _serve(requests: Connection) -> None:
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    requests.send_bytes(b'"ready"')
    while True:
        try:
            answer, truth, deadline_s = requests.recv()
        except EOFError:
            return
        # The pool kills at the deadline. Should the pool itself be gone, the kernel does.
        signal.setitimer(signal.ITIMER_REAL, deadline_s + ORPHAN_GRACE_S)
        verdict = _verdict(answer, truth)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        requests.send_bytes(json.dumps(verdict).encode())


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))

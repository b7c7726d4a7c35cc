"""A judge of `grader_process`: scores an answer with a data set's own scorer."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Mapping
from typing import Any

from reasoning_gym.factory import get_score_answer_fn

_scorer: Callable[[str], Callable[..., float]] = functools.cache(get_score_answer_fn)


def judge(name: str, answer: str, entry: Mapping[str, Any]) -> float:
    """Return the score; the scorer's own output is discarded."""
    with contextlib.redirect_stdout(io.StringIO()):
        return float(_scorer(name)(answer=answer, entry=dict(entry)))

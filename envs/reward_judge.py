"""A judge of `grader_process`: calls a user's reward function."""

from __future__ import annotations

import functools
import importlib
import math
import numbers
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@functools.cache
def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def judge(
    path: Sequence[str],
    name: str,
    task: Mapping[str, Any],
    completion: str,
    final_answer: str | None,
) -> float | str:
    """Return the reward, or what is wrong with the function.

    Args:
        path: Where modules are searched, as in the process that asks.
        name: The function, `module:function`.
        task: The task; its `question` and `answer` are the function's first arguments.
        completion: The model's last turn.
        final_answer: The answer in it; None if there is none.
    """
    sys.path[:] = path
    try:
        value = _function(name)(
            task.get("question"),
            task.get("answer"),
            completion,
            task=task,
            final_answer=final_answer,
        )
    except MemoryError:
        raise  # this process is no longer fit for work
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        last = frames[-1]
        where = f"{os.path.basename(last.filename)}, line {last.lineno}"
        return f"it raised {type(error).__name__}: {str(error)[:500]} ({where})"
    if not isinstance(value, numbers.Real):
        return f"it returned {value!r:.200}, which is not a number"
    if not math.isfinite(value):
        return f"it returned {float(value)}, which is not finite"
    return float(value)

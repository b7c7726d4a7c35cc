"""The outputs of the calls of one turn, as an environment returns them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def outputs_of(text: str, info: Mapping[str, Any]) -> str | tuple[str, ...]:
    """Return the outputs of the calls in a turn, one text per call, or the observation as a whole.

    Args:
        text: The observation.
        info: What the environment returned with it. Its `calls` has one row per call, if there are
            several.
    """
    rows = info.get("calls")
    if not isinstance(rows, list | tuple) or len(rows) < 2:
        return text
    texts = [row.get("text") if isinstance(row, Mapping) else None for row in rows]
    return tuple(map(str, texts)) if all(isinstance(each, str) for each in texts) else text

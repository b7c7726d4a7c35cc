"""Reads the JSON in which models write calls, and describes what is wrong with it. Pure."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

_CLOSING = {"[": "]", "{": "}"}
_STRING_OR_BRACKET = re.compile(
    r'"[^"\\]*(?:\\.[^"\\]*)*(?P<end>"?)|[\[\]{}]', re.DOTALL
)  # a string that is never closed matches too, so that it is read once
_SHOWN_CHARS = 20
"""Number of characters of a faulty call that the description of its fault shows."""


def load_call(content: str, frame: str = "{{") -> Any:
    """Read the JSON of a call, with the brackets that its end may lack.

    Line ends and other control characters may stand in strings; NaN and Infinity are not JSON.

    Args:
        content: The JSON.
        frame: The brackets that open the call and its arguments, the outermost first.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is nested too deeply.
    """
    try:
        return _load(content)
    except ValueError:
        if missing := _missing_end(content, frame):
            with contextlib.suppress(ValueError):
                return _load(content + missing)
        raise


def fault(error: ValueError | RecursionError) -> str:
    """Describe why a call is not JSON: what is expected, and before which text."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error) or type(error).__name__
    following = error.doc[error.pos : error.pos + _SHOWN_CHARS]
    return f"{error}, before {following!r}" if following else f"{error}, at its end"


def _load(content: str) -> Any:
    return json.loads(content, strict=False, parse_constant=_no_constant)


def _missing_end(content: str, frame: str) -> str:
    """Return the brackets that would close a call, or "" if it lacks something else as well."""
    still_open: list[str] = []
    for part in _STRING_OR_BRACKET.finditer(content):
        match part[0][0]:
            case "[" | "{":
                still_open.append(part[0])
            case '"':
                if not part["end"]:
                    return ""
            case bracket:
                if not still_open or _CLOSING[still_open.pop()] != bracket:
                    return ""
    if not frame.startswith("".join(still_open)):
        return ""
    return "".join(_CLOSING[each] for each in reversed(still_open))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")

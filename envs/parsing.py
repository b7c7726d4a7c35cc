r"""What a model's text asks for: a tool call, an answer, or nothing. Pure, and linear in the text.

One rule keeps scores honest: *an answer is `\boxed{...}` in the model's own prose*. A box inside a
code block, complete or not, is program text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tir_alp.tools.fenced import code_blocks

_BRACE = re.compile(r"(?P<box>\\boxed\s*\{)|(?P<open>\{)|(?P<close>\})|\\.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The model wants a tool to run."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """The model gives its answer."""

    text: str


def extract_boxed(text: str) -> str | None:
    r"""Return what is inside the last `\boxed{...}`, or None.

    Braces are matched; a box that is never closed is none; of nested boxes the inner one counts.

    Example:
        >>> extract_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}")
        '\\frac{1}{2}'
    """
    open_boxes: list[int | None] = []  # where each open brace's content starts; None: no box
    last: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):
        if brace["box"]:
            open_boxes.append(brace.end())
        elif brace["open"]:
            open_boxes.append(None)
        elif brace["close"] and open_boxes:
            start = open_boxes.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, brace.start())
    return None if last is None else text[last[0] : last[1]].strip()


def parse_action(text: str) -> ToolCall | Answer | None:
    r"""Read one action of a model: its first Python block, else its answer, else None (void).

    A Python block wins over every box, also over one behind it: in training the completion stops
    at the closing fence, so what follows was written without having seen the tool's output.
    """
    prose = []
    position = 0
    for block in code_blocks(text):
        if block.is_python:
            return ToolCall("python", {"code": block.code})
        prose.append(text[position : block.start])
        position = block.end
    prose.append(text[position:])
    boxed = [box for box in map(extract_boxed, prose) if box is not None]
    return Answer(boxed[-1]) if boxed else None

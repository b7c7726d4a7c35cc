r"""What a model's turn holds: a tool call, an answer, or neither. Pure, and linear in the text.

One rule keeps scores honest: *an answer is `\boxed{...}` in the model's own prose*. A box inside a
code block or a tool call, complete or not, is program text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tir_alp.tools.calls import BadCall, CallFormat, ToolCall, find_call, prose

_BRACE = re.compile(
    r"(?P<box>\\{1,2}(?:boxed|fbox)\s*\{)|(?P<open>\{)|(?P<close>\})"
    r"|\\{1,2}boxed(?:\s*(?P<bare>[+-]?\d+(?:[.,]\d+)*)|\s+(?P<letter>[A-Za-z])(?![A-Za-z]))"
    r"|\\.",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, as the model wrote it."""

    text: str


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`, or None.

    `\fbox{...}`, `\boxed 5` and `\\boxed{...}` are boxes too. Braces are matched. A box that is
    never closed does not count; of nested boxes, the inner one does.

    Example:
        >>> extract_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}")
        '\\frac{1}{2}'
    """
    open_boxes: list[int | None] = []  # start of each open brace's content; None: not a box
    last: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):
        if brace["bare"] or brace["letter"]:  # TeX reads a box without braces too
            last = (brace.start("bare" if brace["bare"] else "letter"), brace.end())
        elif brace["box"]:
            open_boxes.append(brace.end())
        elif brace["open"]:
            open_boxes.append(None)
        elif brace["close"] and open_boxes:
            start = open_boxes.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, brace.start())
    return None if last is None else text[last[0] : last[1]].strip()


def boxed_answer(text: str, call_format: CallFormat = "fenced") -> str | None:
    """Return the content of the last box in the prose of a text, or None."""
    boxed = [box for box in map(extract_boxed, prose(text, call_format)) if box is not None]
    return boxed[-1] if boxed else None


def parse_action(
    text: str,
    call_format: CallFormat = "fenced",
    answer_in: Callable[[str], str | None] | None = None,
) -> ToolCall | BadCall | Answer | None:
    """Read one turn of a model: its first call, else its answer, else None (a void turn).

    A call takes precedence over every answer, even one that follows it: in training a completion
    stops where the call ends, so whatever follows was written without seeing the tool's output.

    Args:
        text: What the model wrote.
        call_format: How calls are written.
        answer_in: Finds the answer in a text without a call; None: the last box in its prose.
    """
    call = find_call(text, call_format)
    if call is not None:
        return call
    answer = boxed_answer(text, call_format) if answer_in is None else answer_in(text)
    return None if answer is None else Answer(answer)

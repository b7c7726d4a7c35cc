r"""What a model's text asks for: a tool call, an answer, or nothing. Pure, and linear in the text.

One rule keeps scores honest: *an answer is `\boxed{...}` in the model's own prose*. A box inside a
code block or a tool call, complete or not, is program text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tir_alp.tools.calls import BadCall, CallFormat, ToolCall, find_call, prose

_BRACE = re.compile(r"(?P<box>\\boxed\s*\{)|(?P<open>\{)|(?P<close>\})|\\.", re.DOTALL)


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


def boxed_answer(text: str, call_format: CallFormat = "fenced") -> str | None:
    """Return what is in the last box of a text's prose, or None."""
    boxed = [box for box in map(extract_boxed, prose(text, call_format)) if box is not None]
    return boxed[-1] if boxed else None


def parse_action(
    text: str, call_format: CallFormat = "fenced"
) -> ToolCall | BadCall | Answer | None:
    """Read one action of a model: its first call, else its answer, else None (void).

    A call wins over every box, also over one behind it: in training the completion stops where the
    call ends, so what follows was written without having seen the tool's output.
    """
    call = find_call(text, call_format)
    if call is not None:
        return call
    answer = boxed_answer(text, call_format)
    return None if answer is None else Answer(answer)

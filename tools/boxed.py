r"""Finds `\boxed{...}` in a text. Pure, and linear in the text."""

from __future__ import annotations

import re

_BRACE = re.compile(
    r"(?P<box>\\{1,2}(?:boxed|fbox)\s*\{)|(?P<open>\{)|(?P<close>\})"
    r"|\\{1,2}boxed(?:\s*(?P<bare>[+-]?\d+(?:[.,]\d+)*)|\s+(?P<letter>[A-Za-z])(?![A-Za-z]))"
    r"|\\.",
    re.DOTALL,
)


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

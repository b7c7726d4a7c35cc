"""Fenced code blocks in a model's text: the call syntax of the Python tool. Pure functions.

Environments read calls with this module and the renderer stops generation with it, so that both
always agree on where a call ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

PYTHON_TAGS = frozenset({"", "py", "python"})

# At the start of a line any tag opens a block. Within a line, where base models like to write
# "Let me see: ```python", the tag is required: a bare ``` might end inline code.
_OPENING = re.compile(
    r"^```(?P<tag>[^`\n]*)\n|```(?P<python>[ \t]*py(?:thon)?[ \t]*\r?)\n",
    re.MULTILINE | re.IGNORECASE,
)
_CLOSING = re.compile(r"^```", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class CodeBlock:
    r"""A fenced block of a text.

    Example, in "So:\n```python\nprint(1)\n```": `tag="python", code="print(1)\n", start=4, end=26`.
    """

    tag: str
    """The word after the opening fence, in lower case; may be empty."""
    code: str
    """The text between the fences."""
    start: int
    """Index at which the opening fence begins."""
    end: int
    """Index just after the closing fence, or the end of the text if there is none."""
    is_complete: bool
    """Whether it has a closing fence."""

    @property
    def is_python(self) -> bool:
        """Whether it is complete and tagged as Python, or not tagged at all."""
        return self.is_complete and self.tag in PYTHON_TAGS


def code_blocks(text: str) -> Iterator[CodeBlock]:
    r"""Yield the fenced blocks of a text in order.

    A closing fence is ``` at the very start of a line, whatever follows. So the end of a block is
    known as soon as its third backtick is written, and ``` within a line of code is code.
    """
    position = 0
    while opening := _OPENING.search(text, position):
        tag = (opening["tag"] or opening["python"] or "").strip().lower()
        closing = _CLOSING.search(text, opening.end())
        code_end = closing.start() if closing else len(text)
        position = closing.end() if closing else len(text)
        yield CodeBlock(
            tag=tag,
            code=text[opening.end() : code_end],
            start=opening.start(),
            end=position,
            is_complete=closing is not None,
        )

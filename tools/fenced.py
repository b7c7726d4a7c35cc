"""Fenced code blocks in a model's text: the call syntax of the Python tool. Pure functions.

Environments read calls with this module and the renderer stops generation with it, so that both
always agree on where a call ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_PYTHON_TAG = re.compile(r"(?:i?python|py)(?:\d+(?:\.\d+)*)?")
_MOST_SPACES = 3  # by which a closing fence may be indented more than its opening
_MOST_MARKS = 4  # of a quotation, before a line
_MARK_CHARS = 5  # of the longest mark, with space around it
_OPENING = re.compile(
    r"(?P<indent>[ \t]*)(?P<fence>`{3,}(?=[^`]*\Z)|~{3,})(?P<info>.*)\Z", re.DOTALL
)
_LIST_ITEM = re.compile(r"[ \t]*(?:[-*+]|\d{1,9}[.)])[ \t]+")
_QUOTE = re.compile(r"[ \t]*(?:>[ \t]*)+")
_QUOTE_MARK = re.compile(r" {0,3}> ?")
_TAG = re.compile(r"[\s{.]*(?P<tag>[^\s{},:]*)")


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
        return self.is_complete and is_python_tag(self.tag)


class BlockScanner:
    r"""Finds fenced blocks in a text that is fed piece by piece, in linear time.

    At the start of a line, which may be indented, three or more backticks or tildes open a block,
    with any tag. Within a line, where base models like to write "Let me see: ```python", the tag of
    Python is required: a bare ``` might end inline code.

    A block ends at as many backticks (or tildes) at the start of a line, indented by at most three
    spaces more than its opening, whatever follows. So its end is known as soon as the last of them
    is written, and ``` within a line of code is code. One exception: a line of Python that ends
    with the fence closes the block when the line or the whole text has ended, unless the fence is
    in a string or a comment.

    The opening's indentation is no part of the code, nor are the marks of a quotation, `> `.
    """

    def __init__(self) -> None:
        self._position = 0  # in the text, of the next character
        self._line: list[str] = []
        self._line_start = 0
        self._head = ""  # first characters of the line
        self._closed_at = 0  # index in the line after a fence that closed a block
        self._fence = ""  # of the open block; empty: none is open
        self._indent = 0
        self._num_marks = 0  # of a quotation, before each line of the block
        self._tag = ""
        self._start = 0
        self._code: list[str] = []
        self._num_quotes = [0, 0]  # triple quotes in the code so far

    def feed(self, piece: str) -> list[CodeBlock]:
        """Read more text; return the blocks that are complete with it."""
        found: list[CodeBlock] = []
        for line in _lines(piece):
            self._feed_line(line, found)
        return found

    def last_block(self) -> CodeBlock | None:
        """Return the block that the end of the text closes or leaves open, or None."""
        if not self._fence:
            return None
        line = "".join(self._line)
        if is_complete := self._fence in line and self._ends_with_fence(line):
            line = self._before_fence(line)
        code = "".join([*self._code, self._dedented(line)])
        return CodeBlock(self._tag, code, self._start, self._position, is_complete)

    def _feed_line(self, part: str, found: list[CodeBlock]) -> None:
        """Read a part of a line, up to its end at most."""
        self._line.append(part)
        self._position += len(part)
        if self._fence:
            room = self._indent + _MOST_SPACES + len(self._fence) - len(self._head)
            room += _MARK_CHARS * self._num_marks
            if room > 0:
                self._read_head(part[:room], found)
        if part[-1] != "\n":
            return
        line = part if len(self._line) == 1 else "".join(self._line)
        if not self._fence:
            if "```" in line or "~~~" in line:
                self._read_opening(line)
        elif self._fence in line and self._ends_with_fence(line):
            self._code.append(self._dedented(self._before_fence(line)))
            found.append(self._close(self._position))
        else:
            self._code.append(self._dedented(line))
            self._num_quotes[0] += line.count('"""')
            self._num_quotes[1] += line.count("'''")
        self._line, self._line_start, self._head = [], self._position, ""
        self._closed_at = 0

    def _read_head(self, characters: str, found: list[CodeBlock]) -> None:
        """Read the first characters of a line in a block, which may be the closing fence."""
        self._head += characters
        inside = self._after_marks(self._head)
        body = self._head[inside:]
        margin = len(body) - len(body.lstrip(" \t"))
        more = body[self._indent : margin]
        if more.strip(" ") or len(more) > _MOST_SPACES:
            return
        if body.startswith(self._fence, margin):
            self._closed_at = inside + margin + len(self._fence)
            found.append(self._close(self._line_start + self._closed_at))

    def _close(self, end: int) -> CodeBlock:
        block = CodeBlock(self._tag, "".join(self._code), self._start, end, is_complete=True)
        self._fence, self._indent, self._num_marks, self._code = "", 0, 0, []
        return block

    def _read_opening(self, line: str) -> None:
        rest = line[:-1]
        if not self._closed_at and (opening := _OPENING.match(rest)):
            fence, info = opening["fence"], opening["info"]
            start, indent = opening.start("fence"), len(opening["indent"])
            num_marks = 0
        else:
            last = rest.rfind("```")
            start = len(rest[: last + 3].rstrip("`"))
            fence, info = rest[start : last + 3], rest[last + 3 :]
            tag = _tag(info)
            if last < 0 or start < self._closed_at or not tag or not is_python_tag(tag):
                return
            if len(_TAG.match(info)[0]) < len(info.rstrip(" \t\r}")):  # type: ignore[index]
                return
            item = _LIST_ITEM.fullmatch(rest, 0, start)
            indent = start if item and not self._closed_at else 0
            num_marks = rest.count(">", 0, start) if _QUOTE.fullmatch(rest, 0, start) else 0
            if num_marks > _MOST_MARKS:
                return
        self._num_marks = num_marks
        self._fence, self._indent, self._tag = fence, indent, _tag(info)
        self._start, self._code, self._num_quotes = self._line_start + start, [], [0, 0]

    def _ends_with_fence(self, line: str) -> bool:
        code = line.rstrip()
        if not is_python_tag(self._tag) or not code.endswith(self._fence):
            return False
        code = code[: -len(self._fence)]
        is_code = bool(code.strip()) and not code.endswith(self._fence[0]) and "#" not in code
        return is_code and all(
            (count + code.count(quote * 3)) % 2 == 0 and code.count(quote) % 2 == 0
            for count, quote in zip(self._num_quotes, "\"'", strict=True)
        )

    def _before_fence(self, line: str) -> str:
        return line.rstrip()[: -len(self._fence)].rstrip() + "\n"

    def _dedented(self, line: str) -> str:
        if not self._indent and not self._num_marks:
            return line
        line = line[self._after_marks(line) :]
        margin = len(line) - len(line.lstrip(" \t"))
        return line[min(margin, self._indent) :]

    def _after_marks(self, line: str) -> int:
        """Index after the marks of a quotation that a line of the block begins with."""
        position = 0
        for _ in range(self._num_marks):
            mark = _QUOTE_MARK.match(line, position)
            if not mark:
                break
            position = mark.end()
        return position


def is_python_tag(tag: str) -> bool:
    """Whether a tag in lower case is one of Python's, such as `python3.11`, or empty."""
    return not tag or _PYTHON_TAG.fullmatch(tag) is not None


def code_blocks(text: str) -> Iterator[CodeBlock]:
    r"""Yield the fenced blocks of a text in order; `BlockScanner` defines what they are."""
    scanner = BlockScanner()
    yield from scanner.feed(text)
    if (block := scanner.last_block()) is not None:
        yield block


def _tag(info: str) -> str:
    match = _TAG.match(info)
    return ((match and match["tag"]) or info.strip(" \t\r{}.")).lower()


def _lines(text: str) -> list[str]:
    """Split a text after each line feed, and nowhere else."""
    lines = text.split("\n")
    return [f"{line}\n" for line in lines[:-1]] + lines[-1:] * bool(lines[-1])

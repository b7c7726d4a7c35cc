"""Finds calls in a model's text, whole or piece by piece; linear in the text, whatever it is.

The stop rule and the reader are the same scanner, so that they agree on where a call ends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tir_alp.rollouts.formats.form import CallForm, ParameterTypes, ReadCall, bad
from tir_alp.tools.calls import (
    ERROR_KEY,
    OPENING,
    BadCall,
    CallBlock,
    ToolCall,
    in_marks,
)

_SPECIAL = re.compile(r"[\"'\\()\[\]{}]")


@dataclass(frozen=True, slots=True)
class FoundCalls:
    """A block of a text and the calls in it."""

    start: int
    end: int
    calls: tuple[ReadCall, ...]


class CallScanner:
    """Reads a text piece by piece and finds the blocks of a form in it.

    Args:
        form: How calls are written.
    """

    def __init__(self, form: CallForm) -> None:
        self._form = form
        self._rest = ""  # text in which an awaited mark may have begun
        self._rest_start = 0  # index of it in the whole text
        self._is_inside = False
        self._start = 0  # index of the block that is read
        self._content: list[str] = []
        self._brackets: _Brackets | None = None  # None: they are not counted (yet)
        self._has_begun = False  # any text but white space
        self.num_blocks = 0
        self.has_ended = False
        """Whether the mark after the last call of the turn was read."""

    def feed(self, piece: str) -> list[CallBlock]:
        """Read more text; return the blocks that are complete with it."""
        text, position = self._rest + piece, 0
        found: list[CallBlock] = []
        while position >= 0:
            step = self._inside if self._is_inside else self._outside
            position = step(text, position, found)
        return found

    def finish(self) -> CallBlock | None:
        """Return the block that the end of the text leaves open, or None."""
        if not self._is_inside:
            return None
        content, self._is_inside = "".join((*self._content, self._rest)), False
        end = self._rest_start + len(self._rest)
        return CallBlock(content, self._start, end, is_complete=False)

    def _keep(self, text: str, start: int) -> int:
        """Keep the text from `start` until more is read; return -1."""
        self._rest_start += start
        self._rest = text[start:]
        return -1

    def _outside(self, text: str, position: int, found: list[CallBlock]) -> int:
        """Look for the beginning of a block; return where to go on, or -1 at the text's end."""
        form = self._form
        if not form.opening:
            return self._at_start(text, position)
        marks = [form.opening]
        if form.section_end and self.num_blocks:
            marks.append(form.section_end)
        places = [(place, mark) for mark in marks if (place := text.find(mark, position)) >= 0]
        if not places:
            return self._keep(text, max(position, len(text) - max(map(len, marks)) + 1))
        place, mark = min(places)
        if mark == form.opening:
            self._open(place, place)
        else:
            self.has_ended = True
        return place + len(mark)

    def _at_start(self, text: str, position: int) -> int:
        """Without an opening mark, a block begins with the first character or not at all."""
        start = len(text) - len(text[position:].lstrip())
        if self._has_begun or start == len(text):
            return self._keep(text, len(text))
        self._has_begun = True
        if text[start] not in self._form.starts:
            return self._keep(text, len(text))
        self._open(start, start)
        return start

    def _open(self, place: int, position: int) -> None:
        self._start = self._rest_start + place
        self._is_inside, self._content = True, []
        counts = self._form.ends == "brackets" and not self._form.body_mark
        self._brackets = _Brackets() if counts else None

    def _inside(self, text: str, position: int, found: list[CallBlock]) -> int:
        """Look for the end of a block; return where to go on, or -1 at the text's end."""
        if self._brackets is not None:
            end = self._brackets.feed(text, position)
            if end < 0:
                self._content.append(text[position:])
                return self._keep(text, len(text))
            return self._close(text, position, end, end, found)
        mark = self._form.closing or self._form.body_mark
        place = text.find(mark, position)
        if place < 0:
            kept = max(position, len(text) - len(mark) + 1)
            self._content.append(text[position:kept])
            return self._keep(text, kept)
        if self._form.closing:
            return self._close(text, position, place, place + len(mark), found)
        self._content.append(text[position : place + len(mark)])
        self._brackets = _Brackets()
        return place + len(mark)

    def _close(self, text: str, position: int, stop: int, end: int, found: list[CallBlock]) -> int:
        self._content.append(text[position:stop])
        content = "".join(self._content)
        found.append(CallBlock(content, self._start, self._rest_start + end, is_complete=True))
        self._is_inside = False
        self.num_blocks += 1
        return end


class _Brackets:
    """Counts brackets outside strings."""

    def __init__(self) -> None:
        self._depth = 0
        self._quote = ""
        self._skips = False  # the next character, which a backslash precedes

    def feed(self, text: str, position: int) -> int:
        """Return the index after the bracket that closes the first one, or -1."""
        if self._skips and position < len(text):
            position, self._skips = position + 1, False
        while (match := _SPECIAL.search(text, position)) is not None:
            position, char = match.end(), match[0]
            if char == "\\":
                if self._quote:
                    self._skips = position == len(text)
                    position += 1
            elif char in "\"'":
                # An apostrophe between brackets of JSON would open a string that is none.
                if not self._quote and self._depth:
                    self._quote = char
                elif char == self._quote:
                    self._quote = ""
            elif not self._quote:
                self._depth += 1 if char in "([{" else -1
                if self._depth <= 0:
                    return position
        return -1


def find_blocks(text: str, form: CallForm, types: ParameterTypes) -> Iterator[FoundCalls]:
    """Yield the blocks of a whole turn, with their calls."""
    scanner = CallScanner(form)
    blocks = scanner.feed(text)
    if (last := scanner.finish()) is not None:
        blocks = [*blocks, last]
    for block in blocks:
        calls = form.read(block.content, types)
        if not block.is_complete and form.ends == "mark" and not form.ends_turn:
            calls = bad(f"the call is not complete: it does not end with {form.closing}")
        if calls:
            yield FoundCalls(block.start, block.end, calls)


def read_calls(text: str, form: CallForm, types: ParameterTypes) -> tuple[ReadCall, ...]:
    """Return the calls of a whole turn in order."""
    return tuple(call for block in find_blocks(text, form, types) for call in block.calls)


def watcher(form: CallForm, types: ParameterTypes, max_calls: int) -> Callable[[str], bool]:
    """Return a function to feed a turn to, piece by piece; True when generation should stop.

    It stops with the piece that completes the last call that a turn may have, or the section of
    calls. A call that only the end of the turn completes never stops it.
    """
    if form.ends_turn:
        return lambda piece: False
    scanner, num_calls = CallScanner(form), 0

    def watch(piece: str) -> bool:
        nonlocal num_calls
        found = [form.read(block.content, types) for block in scanner.feed(piece)]
        num_calls += sum(map(len, found))
        return scanner.has_ended or (any(found) and num_calls >= max_calls)

    return watch


def canonical(text: str, form: CallForm, types: ParameterTypes) -> str:
    """Rewrite the calls of a turn in the form that environments read.

    A call that cannot be read is replaced by the reason. Text outside the calls that looks like a
    call in that form is changed so that it is none.
    """
    pieces, position = [], 0
    for block in find_blocks(text, form, types):
        pieces += [_plain(text[position : block.start]), *map(_in_marks, block.calls)]
        position = block.end
    return "".join((*pieces, _plain(text[position:])))


def _plain(text: str) -> str:
    return text.replace(OPENING, f"{OPENING[:-1]} >")


def _in_marks(read: ReadCall) -> str:
    match read.call:
        case ToolCall(name, arguments):
            return in_marks({"name": name, "arguments": dict(arguments)})
        case BadCall(error):
            return in_marks({ERROR_KEY: error})

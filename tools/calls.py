r"""How a tool call looks in a model's text. Pure functions, linear in the length of the text.

Environments read calls with this module and the renderer stops generation with it, so that both
always agree on where a call ends. There are three formats:

* `fenced`: a Python block between fences (`tools.fenced`) calls the tool named `python`;
* `tool_call`: JSON between `<tool_call>` and `</tool_call>`, as Hermes and Qwen models write it:
  `<tool_call>{"name": "python", "arguments": {"code": "print(1)"}}</tool_call>`;
* `none`: nothing is a call.

An environment also reads the second one if a model writes its calls in another JSON form: the
renderer derives that form from the chat template (`tir_alp.rollouts.chat_template`), and
`canonical` translates it. A call ends at the first closing mark, whatever stands before it, so that
its end is known as soon as the mark is written.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tir_alp.tools.fenced import BlockScanner, code_blocks

CallFormat = Literal["fenced", "tool_call", "none"]
CALL_FORMATS: tuple[CallFormat, ...] = ("fenced", "tool_call", "none")


@dataclass(frozen=True, slots=True)
class CallMarks:
    """What a model writes around the JSON of a call, and the keys that it uses inside.

    Example, for Mistral models: `CallMarks("[TOOL_CALLS]", "", in_list=True)`.
    """

    opening: str = "<tool_call>"
    """The mark before the JSON; empty if a message with a call contains nothing else."""
    closing: str = "</tool_call>"
    """The mark after the JSON; empty if only the end of the turn ends a call."""
    name_key: str = "name"
    arguments_key: str = "arguments"
    in_list: bool = False
    """Whether the JSON is a list of calls, of which the first is taken."""


HERMES = CallMarks()

_CLOSING = {"[": "]", "{": "}"}
_STRING_OR_BRACKET = re.compile(
    r'"[^"\\]*(?:\\.[^"\\]*)*(?P<end>"?)|[\[\]{}]', re.DOTALL
)  # a string that is never closed matches too, so that it is read once
_SHOWN_CHARS = 20
"""Number of characters of a faulty call that the description of its fault shows."""


@dataclass(frozen=True, slots=True)
class CallBlock:
    """The text between an opening and a closing mark."""

    content: str
    start: int
    """Index at which the opening mark begins."""
    end: int
    """Index just after the closing mark, or the end of the text if there is none."""
    is_complete: bool


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model makes."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadCall:
    """The model meant to call a tool, but it is not clear which one or with which arguments."""

    error: str


def call_blocks(text: str, marks: CallMarks = HERMES) -> Iterator[CallBlock]:
    """Yield the marked blocks of a text in order."""
    if not marks.opening:
        start = len(text) - len(text.lstrip())
        if text.startswith("[" if marks.in_list else "{", start):
            yield CallBlock(text[start:], start, len(text), is_complete=True)
        return
    position = 0
    while (start := text.find(marks.opening, position)) >= 0:
        inside = start + len(marks.opening)
        closing = text.find(marks.closing, inside) if marks.closing else len(text)
        content_end = len(text) if closing < 0 else closing
        position = len(text) if closing < 0 else closing + len(marks.closing)
        yield CallBlock(text[inside:content_end], start, position, is_complete=closing >= 0)
        if position == len(text):
            return


def read_call(content: str, marks: CallMarks = HERMES) -> ToolCall | BadCall:
    """Read the JSON of a call. Never raises, whatever the content is.

    Line ends and other control characters may stand in strings, and the braces at the end of the
    call and its arguments may be missing: both can be meant in one way only.
    """
    try:
        call = _load_completed(content, "[{{" if marks.in_list else "{{")
    except (ValueError, RecursionError) as error:
        return BadCall(f"the call is not JSON: {_fault(error)}")
    if marks.in_list:
        if not isinstance(call, list) or not call:
            return BadCall("a call is written as a JSON list with one object in it")
        call = call[0]
    name, arguments = marks.name_key, marks.arguments_key
    shape = f'{{"{name}": "...", "{arguments}": {{...}}}}'
    if not isinstance(call, dict) or not isinstance(call.get(name), str):
        return BadCall(f"a call is a JSON object {shape}")
    if not isinstance(call.get(arguments, {}), dict):
        return BadCall(f"{arguments!r} must be a JSON object, as in {shape}")
    return ToolCall(call[name], call.get(arguments, {}))


def find_call(text: str, call_format: CallFormat = "fenced") -> ToolCall | BadCall | None:
    """Return the first complete call of a text, or None."""
    if call_format == "fenced":
        block = next((block for block in code_blocks(text) if block.is_python), None)
        return None if block is None else ToolCall("python", {"code": block.code})
    if call_format == "tool_call":
        found = next(call_blocks(text), None)
        return read_call(found.content) if found is not None and found.is_complete else None
    return None


def write_call(call: ToolCall, call_format: CallFormat) -> str | None:
    """Write a call so that `find_call` reads it; None if the format cannot express it.

    Example: `write_call(ToolCall("python", {"code": "1"}), "fenced")` is a Python block. Its code
    is read back with the line end that stands before the closing fence.
    """
    if call_format == "fenced" and call.name == "python" and call.arguments.keys() == {"code"}:
        code = str(call.arguments["code"]).removesuffix("\n") + "\n"
        call, text = ToolCall("python", {"code": code}), f"```python\n{code}```"
    elif call_format == "tool_call":
        text = _in_hermes(call)
    else:
        return None
    return text if find_call(text, call_format) == call else None


def call_watcher(call_format: CallFormat, marks: CallMarks = HERMES) -> Callable[[str], bool]:
    """Return a function to feed a text to, piece by piece; True for a piece that completes a call.

    Generation should stop there. A block whose closing fence stands at the end of a line of code is
    complete only when the line has ended; if the turn ends instead, `find_call` finds the call. The
    function never returns True if only the end of the turn ends a call: then the end-of-turn token
    stops it.
    """
    if call_format == "fenced":
        scanner = BlockScanner()
        return lambda piece: any(block.is_python for block in scanner.feed(piece))
    if call_format == "none" or not marks.opening or not marks.closing:
        return lambda piece: False
    awaited, rest = marks.opening, ""
    is_inside = False  # a call, whose closing mark is awaited

    def watch(piece: str) -> bool:
        nonlocal awaited, rest, is_inside
        text, position = rest + piece, 0
        is_complete = False
        while (found := text.find(awaited, position)) >= 0:
            position = found + len(awaited)
            is_complete = is_complete or is_inside
            is_inside = not is_inside
            awaited = marks.closing if is_inside else marks.opening
        # The awaited mark may have begun: keep one character less than its length.
        rest = text[max(position, len(text) - len(awaited) + 1) :]
        return is_complete

    return watch


def has_call(text: str, call_format: CallFormat, marks: CallMarks = HERMES) -> bool:
    """Whether a text contains a complete call, after which generation should stop."""
    return call_watcher(call_format, marks)(text)


def canonical(text: str, marks: CallMarks) -> str:
    """Rewrite the first complete call of a text in the form of Hermes, if it has another form.

    A call that cannot be read keeps its content, between Hermes' marks, so that reading it again
    gives the same error.
    """
    if marks == HERMES:
        return text
    block = next(call_blocks(text, marks), None)
    if block is None or not block.is_complete:
        return text
    match read_call(block.content, marks):
        case ToolCall() as read:
            call = _in_hermes(read)
        case BadCall():
            content = block.content.replace(HERMES.closing, "")
            call = f"{HERMES.opening}{content}{HERMES.closing}"
    return text[: block.start] + call + text[block.end :]


def prose(text: str, call_format: CallFormat = "fenced") -> list[str]:
    """Return the pieces of a text that are neither code nor calls, complete or not."""
    pieces = [text]
    if call_format == "tool_call":
        pieces = _between(text, ((block.start, block.end) for block in call_blocks(text)))
    return [
        rest
        for piece in pieces
        for rest in _between(piece, ((block.start, block.end) for block in code_blocks(piece)))
    ]


def _in_hermes(call: ToolCall) -> str:
    content = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
    content = content.replace("</", "<\\/")  # the same JSON, without a mark in it
    return f"{HERMES.opening}{content}{HERMES.closing}"


def _between(text: str, taken: Iterator[tuple[int, int]]) -> list[str]:
    pieces, position = [], 0
    for start, end in taken:
        pieces.append(text[position:start])
        position = end
    return [*pieces, text[position:]]


def _load(content: str) -> Any:
    """Read JSON in which a string may contain line ends, but none of NaN and Infinity."""
    return json.loads(content, strict=False, parse_constant=_no_constant)


def _load_completed(content: str, frame: str) -> Any:
    """Read the JSON of a call, with the brackets that its end may lack."""
    try:
        return _load(content)
    except ValueError:
        if missing := _missing_end(content, frame):
            with contextlib.suppress(ValueError):
                return _load(content + missing)
        raise


def _missing_end(content: str, frame: str) -> str:
    """Return the brackets that would close a call, or "" if it lacks something else as well.

    Args:
        content: The JSON of the call.
        frame: The brackets that open the call and its arguments.
    """
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


def _fault(error: ValueError | RecursionError) -> str:
    """Describe why a call is not JSON: what is expected, and before which text."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error) or type(error).__name__
    following = error.doc[error.pos : error.pos + _SHOWN_CHARS]
    return f"{error}, before {following!r}" if following else f"{error}, at its end"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")

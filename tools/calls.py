r"""How a tool call looks in the text that an environment reads. Pure, linear in the text.

There are three formats:

* `fenced`: a Python block between fences (`tools.fenced`) calls the tool named `python`;
* `tool_call`: JSON between `<tool_call>` and `</tool_call>`, as Hermes and Qwen models write it:
  `<tool_call>{"name": "python", "arguments": {"code": "print(1)"}}</tool_call>`;
* `none`: nothing is a call.

A model that writes its calls in another form is read by `tir_alp.rollouts.formats`, which rewrites
them in the second format; a call that it cannot read becomes `<tool_call>{"error": "..."}`. A call
ends at the first closing mark, whatever stands before it, so that its end is known as soon as the
mark is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tir_alp.tools.call_json import fault, load_call
from tir_alp.tools.fenced import BlockScanner, code_blocks

CallFormat = Literal["fenced", "tool_call", "none"]
CALL_FORMATS: tuple[CallFormat, ...] = ("fenced", "tool_call", "none")

OPENING, CLOSING = "<tool_call>", "</tool_call>"
ERROR_KEY = "error"
"""The only key of the JSON that stands for a call which could not be read."""


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


def call_blocks(text: str) -> Iterator[CallBlock]:
    """Yield the marked blocks of a text in order; the last one may lack its closing mark."""
    position = 0
    while (start := text.find(OPENING, position)) >= 0:
        inside = start + len(OPENING)
        closing = text.find(CLOSING, inside)
        content_end = len(text) if closing < 0 else closing
        position = len(text) if closing < 0 else closing + len(CLOSING)
        yield CallBlock(text[inside:content_end], start, position, is_complete=closing >= 0)


def named_call(
    call: Any, name_key: str = "name", arguments_key: str = "arguments"
) -> ToolCall | BadCall:
    """Return the `ToolCall` that a JSON value describes, or a `BadCall`."""
    shape = f'{{"{name_key}": "...", "{arguments_key}": {{...}}}}'
    if not isinstance(call, dict) or not isinstance(call.get(name_key), str):
        return BadCall(f"a call is a JSON object {shape}")
    if not isinstance(call.get(arguments_key, {}), dict):
        return BadCall(f"{arguments_key!r} must be a JSON object, as in {shape}")
    return ToolCall(call[name_key], call.get(arguments_key, {}))


def read_call(content: str) -> ToolCall | BadCall:
    """Read the JSON of a call. Never raises, whatever the content is.

    Line ends and other control characters may stand in strings, and the braces at the end of the
    call and its arguments may be missing: both can be meant in one way only.
    """
    try:
        call = load_call(content)
    except (ValueError, RecursionError) as error:
        return BadCall(f"the call is not JSON: {fault(error)}")
    if isinstance(call, dict) and call.keys() == {ERROR_KEY}:
        return BadCall(str(call[ERROR_KEY]))
    return named_call(call)


def find_calls(text: str, call_format: CallFormat = "fenced") -> tuple[ToolCall | BadCall, ...]:
    """Return the calls of a text in order: of fenced code, the first complete block.

    A marked call without a closing mark is a `BadCall`: the text is a whole turn.
    """
    if call_format == "fenced":
        block = next((block for block in code_blocks(text) if block.is_python), None)
        return () if block is None else (ToolCall("python", {"code": block.code}),)
    if call_format == "tool_call":
        return tuple(_read_block(block) for block in call_blocks(text))
    return ()


def find_call(text: str, call_format: CallFormat = "fenced") -> ToolCall | BadCall | None:
    """Return the first call of a text, or None."""
    return next(iter(find_calls(text, call_format)), None)


def write_call(call: ToolCall, call_format: CallFormat) -> str | None:
    """Write a call so that `find_call` reads it; None if the format cannot express it.

    Example: `write_call(ToolCall("python", {"code": "1"}), "fenced")` is a Python block. Its code
    is read back with the line end that stands before the closing fence.
    """
    if call_format == "fenced" and call.name == "python" and call.arguments.keys() == {"code"}:
        code = str(call.arguments["code"]).removesuffix("\n") + "\n"
        call, text = ToolCall("python", {"code": code}), f"```python\n{code}```"
    elif call_format == "tool_call":
        text = in_marks({"name": call.name, "arguments": call.arguments})
    else:
        return None
    return text if find_call(text, call_format) == call else None


def in_marks(value: Mapping[str, Any]) -> str:
    """Write JSON between the marks of a call, so that no closing mark is in it."""
    content = json.dumps(value, ensure_ascii=False).replace("</", "<\\/")
    return f"{OPENING}{content}{CLOSING}"


def call_watcher(call_format: CallFormat, max_calls: int = 1) -> Callable[[str], bool]:
    """Return a function to feed a text to, piece by piece; True once all calls are complete.

    Generation should stop there. A block whose closing fence stands at the end of a line of code is
    complete only when the line has ended; if the turn ends instead, `find_call` finds the call.

    Args:
        call_format: How calls are written.
        max_calls: Number of calls after which a turn ends; of fenced code, always 1.
    """
    if call_format == "fenced":
        scanner = BlockScanner()
        return lambda piece: any(block.is_python for block in scanner.feed(piece))
    if call_format == "none":
        return lambda piece: False
    awaited, rest, num_calls = OPENING, "", 0

    def watch(piece: str) -> bool:
        nonlocal awaited, rest, num_calls
        text, position, before = rest + piece, 0, num_calls
        while (found := text.find(awaited, position)) >= 0:
            position = found + len(awaited)
            num_calls += awaited == CLOSING
            awaited = OPENING if awaited == CLOSING else CLOSING
        # The awaited mark may have begun: keep one character less than its length.
        rest = text[max(position, len(text) - len(awaited) + 1) :]
        return num_calls > before and num_calls >= max_calls

    return watch


def has_call(text: str, call_format: CallFormat) -> bool:
    """Whether a text contains a complete call, after which generation should stop."""
    return call_watcher(call_format)(text)


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


def _read_block(block: CallBlock) -> ToolCall | BadCall:
    if block.is_complete:
        return read_call(block.content)
    return BadCall(f"the call is not complete: it does not end with {CLOSING}")


def _between(text: str, taken: Iterator[tuple[int, int]]) -> list[str]:
    pieces, position = [], 0
    for start, end in taken:
        pieces.append(text[position:start])
        position = end
    return [*pieces, text[position:]]

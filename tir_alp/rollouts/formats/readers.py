"""Reads what stands between the marks of a call, one reader per kind of form. Pure.

No reader raises, whatever the text is, and each is linear in it. What a reader cannot read becomes
a `BadCall`, whose error says to the model how a call is written.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from typing import Any

from tir_alp.rollouts.formats.form import ParameterTypes, ReadCall, bad
from tir_alp.tools.call_json import fault, load_call
from tir_alp.tools.calls import BadCall, ToolCall, named_call

_MAX_PYTHON_CHARS = 1_000_000
_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_NAME = re.compile(r"[\w.:/-]{1,256}")


@dataclass(frozen=True, slots=True)
class JsonReader:
    """Reads an object with a name and arguments, or a list of them."""

    name_key: str = "name"
    arguments_key: str = "arguments"
    in_list: bool = False

    def __call__(self, content: str, types: ParameterTypes) -> tuple[ReadCall, ...]:
        """Read calls."""
        try:
            value = load_call(content, "[{{" if self.in_list else "{{")
        except (ValueError, RecursionError) as error:
            return bad(f"the call is not JSON: {fault(error)}")
        if self.in_list and (not isinstance(value, list) or not value):
            return bad("calls are written as a JSON list with one object per call")
        return tuple(map(self._read, value if self.in_list else [value]))

    def _read(self, value: Any) -> ReadCall:
        call = named_call(value, self.name_key, self.arguments_key)
        if not isinstance(value, dict):
            return ReadCall(call)
        name = value.get(self.name_key)
        return ReadCall(call, name if isinstance(name, str) else "", written_id(value.get("id")))


@dataclass(frozen=True, slots=True)
class HeadedReader:
    """Reads a head with the name of the tool, a mark, and the arguments as a JSON object.

    Example, as DeepSeek V3.1 writes it: `python<mark>{"code": "1"}`.
    """

    mark: str
    shape: str
    """How a call is written, for the model."""
    kind_before_name: str = ""
    """A word that may stand in place of the name, which is then the first line of the rest, with
    the arguments in a fenced block."""
    id_mark: str = ""
    """The mark in the head before the id of the call."""
    numbered: bool = False
    """Whether the head is `functions.NAME:NUMBER`, which as a whole is the id."""

    def __call__(self, content: str, types: ParameterTypes) -> tuple[ReadCall, ...]:
        """Read one call."""
        head, mark, body = content.partition(self.mark)
        if not mark:
            return bad(f"a call is written as {self.shape}")
        head, call_id = head.strip(), ""
        if self.kind_before_name and head == self.kind_before_name:
            head, _, body = body.partition("\n")
            body = body.strip().removeprefix("```json").removesuffix("```")
        if self.id_mark:
            head, _, call_id = head.partition(self.id_mark)
        name = head.strip()
        if self.numbered:
            call_id, name = name, name.removeprefix("functions.")
            start, colon, number = name.rpartition(":")
            name = start if colon and number.isdigit() else name
        return (read_arguments(name, body, self.shape, call_id),)


@dataclass(frozen=True, slots=True)
class TaggedReader:
    """Reads a name and parameters between tags, as Qwen3-Coder and GLM write them."""

    shape: str
    name_open: str
    """Before the name; empty if the name is first."""
    name_close: str
    """After the name; empty if the first parameter or the end follows it."""
    key_open: str
    key_close: str
    value_open: str
    """Before a value, after the key; what stands before it is ignored."""
    value_close: str
    is_on_lines: bool = False
    """Whether a value is written between line ends, which are no part of it."""

    def __call__(self, content: str, types: ParameterTypes) -> tuple[ReadCall, ...]:
        """Read one call."""
        start = content.find(self.name_open)
        if start < 0:
            return bad(f"a call is written as {self.shape}")
        start += len(self.name_open)
        end = content.find(self.name_close or self.key_open, start)
        if end < 0 and self.name_close:
            return bad(f"a call is written as {self.shape}")
        end = len(content) if end < 0 else end
        name = content[start:end].strip()
        if not _NAME.fullmatch(name):
            return bad(f"{name[:40]!r} is no name of a tool; a call is written as {self.shape}")
        arguments: dict[str, Any] = {}
        position = end
        while (place := content.find(self.key_open, position)) >= 0:
            place += len(self.key_open)
            key_end = content.find(self.key_close, place)
            value = (
                content.find(self.value_open, key_end + len(self.key_close))
                if (key_end >= 0)
                else -1
            )
            value_end = content.find(self.value_close, value) if value >= 0 else -1
            if value_end < 0:
                return bad(f"a parameter is not complete; a call is written as {self.shape}", name)
            key = content[place:key_end].strip()
            if key in arguments:
                return bad(f"the parameter {key[:40]!r} is written twice", name)
            text = content[value + len(self.value_open) : value_end]
            if self.is_on_lines:
                text = text.removeprefix("\n").removesuffix("\n")
            arguments[key] = types.value(name, key, text)
            position = value_end + len(self.value_close)
        return (ReadCall(ToolCall(name, arguments), name),)


@dataclass(frozen=True, slots=True)
class HarmonyReader:
    """Reads the last message of a turn in the harmony format of gpt-oss.

    The recipient stands in the head of a message, in either of two places:
    `to=functions.python<|channel|>commentary json<|message|>{...}` and
    `<|channel|>commentary to=functions.python <|constrain|>json<|message|>{...}`.
    """

    opening: str
    message: str
    start: str
    end: str

    def __call__(self, content: str, types: ParameterTypes) -> tuple[ReadCall, ...]:
        """Read the last message, if it goes to a tool."""
        last = (
            content.rpartition(self.start)[2] if self.start in content else (self.opening + content)
        )
        head, mark, body = last.partition(self.message)
        recipient = head.rpartition(self.opening)
        if not mark or not recipient[1] or self.end in last:
            return ()  # a text about a recipient, in a message without one
        name = (recipient[2].partition("<|")[0].split() or [""])[0]
        shape = f"{self.opening}NAME<|channel|>commentary json{self.message}{{...}}"
        return (read_arguments(name, body, shape),)


def read_python(content: str, types: ParameterTypes) -> tuple[ReadCall, ...]:
    """Read calls as Llama and LFM2 write them: `[python(code="1"), search(query="x")]`.

    Values are literals. A list of something else, such as numbers, is no call.
    """
    shape = '[NAME(key="value")]'
    if not re.match(r"\s*\[\s*[A-Za-z_][\w.]*\s*\(", content):
        return ()
    if len(content) > _MAX_PYTHON_CHARS:
        return bad(f"the call has {len(content)} characters; the most is {_MAX_PYTHON_CHARS}")
    try:
        tree = ast.parse(_escaped(content.strip()), mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return bad(f"calls are written as {shape}")
        return tuple(map(_python_call, tree.elts))
    except SyntaxError as error:
        return bad(f"calls are written as {shape}: {error.msg}")
    except (ValueError, TypeError, RecursionError, MemoryError):
        # The texts of these errors may contain addresses, which differ when a run is audited.
        return bad(f"calls are written as {shape}, with values that JSON has too")


def _python_call(node: ast.expr) -> ReadCall:
    if not isinstance(node, ast.Call) or node.args:
        return bad('a call is written as NAME(key="value"), and each argument has a key')[0]
    name = ast.unparse(node.func)
    if not _NAME.fullmatch(name) or any(each.arg is None for each in node.keywords):
        return bad('a call is written as NAME(key="value"), and each argument has a key')[0]
    arguments = {str(each.arg): ast.literal_eval(each.value) for each in node.keywords}
    # Sets, bytes and the like are literals of Python that JSON does not have.
    arguments = json.loads(json.dumps(arguments, allow_nan=False))
    return ReadCall(ToolCall(name, arguments), name)


def _escaped(text: str) -> str:
    """Return Python with the line ends in its strings escaped, as templates do not do it."""
    pieces, quote, position = [], "", 0
    for match in re.finditer(r"\\.|[\"'\n\r]", text, re.DOTALL):
        char = match[0]
        if char in "\n\r" and quote:
            pieces += [text[position : match.start()], "\\n" if char == "\n" else "\\r"]
            position = match.end()
        elif char in "\"'":
            quote = char if not quote else "" if char == quote else quote
    return "".join((*pieces, text[position:]))


def read_arguments(name: str, body: str, shape: str, call_id: str = "") -> ReadCall:
    """Read a call whose arguments are a JSON object."""
    if not _NAME.fullmatch(name):
        error = f"{name[:40]!r} is no name of a tool; a call is written as {shape}"
        return ReadCall(BadCall(error))
    try:
        arguments = load_call(body or "{}", "{")
    except (ValueError, RecursionError) as error:
        message = f"the arguments are not JSON: {fault(error)}"
        return ReadCall(BadCall(message), name, written_id(call_id))
    if not isinstance(arguments, dict):
        error = f"the arguments must be a JSON object; a call is written as {shape}"
        return ReadCall(BadCall(error), name, written_id(call_id))
    return ReadCall(ToolCall(name, arguments), name, written_id(call_id))


def written_id(value: Any) -> str:
    """Return the id of a call if it is a plain word, which no mark of a conversation is."""
    return value if isinstance(value, str) and _ID.fullmatch(value) else ""

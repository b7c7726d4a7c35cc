"""Reads what an MCP server over stdio sends although it is not one JSON message per line.

Without this a call would wait for its deadline. A message over several lines is put together, half
a surrogate pair in it becomes U+FFFD, and an answer that is no JSON becomes an error. Other lines,
such as those that a server logs, are ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
from mcp.shared.message import SessionMessage
from mcp.types import (
    PARSE_ERROR,
    ErrorData,
    JSONRPCError,
    JSONRPCMessage,
    jsonrpc_message_adapter,
)
from pydantic import ValidationError

_MOST_CHARS = 16 << 20
"""Length of a message over several lines; of a longer one, nothing is kept."""
_IN_STRING = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*(?P<end>"?)', re.DOTALL)
_OUTSIDE = re.compile(r'["\[\]{}]')
_ID = re.compile(r'"id"\s*:\s*(\d{1,18}|"[^"\\]{1,100}")')


@asynccontextmanager
async def tolerant(
    transport: AbstractAsyncContextManager[tuple[Any, Any]],
) -> AsyncGenerator[tuple[Any, Any]]:
    """A transport whose faulty lines are read with `FaultyLines`."""
    async with transport as (incoming, outgoing), anyio.create_task_group() as group:
        passed_on, messages = anyio.create_memory_object_stream[Any](0)

        async def pass_on() -> None:
            lines = FaultyLines()
            async with passed_on:
                async for item in incoming:
                    for each in lines.read(item):
                        await passed_on.send(each)

        group.start_soon(pass_on)
        try:
            yield messages, outgoing
        finally:
            group.cancel_scope.cancel()
            messages.close()


class FaultyLines:
    """The lines of one server that could not be read one by one."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._num_chars = 0
        self._depth = 0
        self._in_string = False

    def read(self, item: SessionMessage | Exception) -> Iterator[SessionMessage | Exception]:
        """Yield what an item of the transport stands for: itself, or a message, or nothing yet.

        Args:
            item: A message, or the error with which the transport reports a line.
        """
        if not isinstance(item, ValidationError):
            self._forget()
            yield item
            return
        line = self._line(item)
        if line is None or (not self._lines and not line.lstrip().startswith("{")):
            return
        self._add(line)
        if self._depth > 0 and self._num_chars <= _MOST_CHARS:
            return
        text = "\n".join(self._lines)
        self._forget()
        if (message := _message(text)) is not None:
            yield SessionMessage(message)

    def _line(self, error: ValidationError) -> str | None:
        """The line in an error; None if it is JSON of something else, and belongs to no message."""
        first = error.errors(include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            return str(first["input"])
        return json.dumps(first["input"]) if self._lines else None

    def _add(self, line: str) -> None:
        self._lines.append(line)
        self._num_chars += len(line)
        position = 0
        while True:
            if self._in_string:
                string = _IN_STRING.match(line, position)
                assert string is not None
                if not string["end"]:
                    return
                self._in_string, position = False, string.end()
            found = _OUTSIDE.search(line, position)
            if found is None:
                return
            position = found.end()
            self._in_string = found[0] == '"'
            self._depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)

    def _forget(self) -> None:
        self._lines, self._num_chars, self._depth, self._in_string = [], 0, 0, False


def _message(text: str) -> JSONRPCMessage | None:
    """The message in a text, or the error that answers the call; None if it is no message."""
    try:
        parsed = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        number = _ID.search(text)
        if '"jsonrpc"' not in text or number is None:
            return None
        data = ErrorData(code=PARSE_ERROR, message=f"the server's answer is not JSON: {error}")
        return JSONRPCError(jsonrpc="2.0", id=json.loads(number[1]), error=data)
    written = json.dumps(parsed, ensure_ascii=False).encode("utf-16-le", "surrogatepass")
    try:
        return jsonrpc_message_adapter.validate_json(
            written.decode("utf-16-le", "replace"), by_name=False
        )
    except ValidationError:
        return None

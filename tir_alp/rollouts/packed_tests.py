"""Reads tests that a data set has packed: base64 of zlib of a pickled text, as LiveCodeBench does.

Nothing of a pickle is executed. Its opcodes are read one by one, only those that make plain values
are known, and nothing in it can name a class or a function. What is unpacked is bounded in size.
"""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

MAX_BYTES = 256 << 20
"""The most that a packed text may have when it is unpacked."""
_MAX_OPCODES = 1_000_000
_MARK = object()
_TEXTS = frozenset(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
_NUMBERS = frozenset(
    ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
)


def read_packed(value: Any) -> list[Any]:
    """Return the tests in a column, packed or not.

    Args:
        value: A list, its JSON text, or that text or list packed; None or an empty text: no tests.

    Raises:
        ValueError: It is none of these, or too large.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, str):
        value = _read_text(value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"must be a list of tests, not {value!r:.100}")
    return list(value)


def _read_text(text: str) -> Any:
    if text.lstrip()[:1] in ("[", "{", '"'):
        value = _json(text)
    else:
        value = unpickled(_inflated(text))
    return _json(value) if isinstance(value, str) else value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error}): {text[:60]!r}") from None


def _inflated(text: str) -> bytes:
    """Decode base64 and decompress it, as far as `MAX_BYTES`."""
    try:
        compressed = base64.b64decode("".join(text.split()), validate=True)
        inflater = zlib.decompressobj()
        data = inflater.decompress(compressed, MAX_BYTES)
    except (ValueError, binascii.Error, zlib.error) as error:
        raise ValueError(f"is neither JSON nor base64 of zlib ({error}): {text[:60]!r}") from None
    if inflater.unconsumed_tail:
        raise ValueError(f"has more than {MAX_BYTES >> 20} MB when it is decompressed")
    if not inflater.eof:
        raise ValueError("is cut off: the compressed data has no end")
    return data


def unpickled(data: bytes) -> Any:
    """Return the value of a pickle of texts, lists, dicts, numbers, booleans and None.

    Raises:
        ValueError: The pickle is broken, or would make something else.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for count, (opcode, argument, _) in enumerate(_opcodes(data)):
            if count >= _MAX_OPCODES:
                raise ValueError(f"has more than {_MAX_OPCODES} values")
            if opcode.name == "STOP":
                return _pop(stack)
            _obey(opcode.name, argument, stack, memo)
    except (IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ValueError(f"is a broken pickle ({error!r})") from None
    raise ValueError("is a broken pickle (it has no end)")


def _opcodes(data: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    try:
        yield from pickletools.genops(data)
    except ValueError as error:
        raise ValueError(f"is a broken pickle ({error})") from None


def _obey(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """Change the stack and the memo as one opcode of a pickle demands."""
    if name in ("PROTO", "FRAME"):
        return
    if name in _TEXTS or name in _NUMBERS:
        stack.append(argument)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in _EMPTY:
        stack.append(_EMPTY[name]())
    elif name == "MARK":
        stack.append(_MARK)
    elif name in ("LIST", "DICT"):
        items = _since_mark(stack)
        stack.append(items if name == "LIST" else dict(_pairs(items)))
    elif name in ("APPEND", "APPENDS"):
        items = [_pop(stack)] if name == "APPEND" else _since_mark(stack)
        _top(stack, list).extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        items = [_pop(stack), _pop(stack)][::-1] if name == "SETITEM" else _since_mark(stack)
        _top(stack, dict).update(_pairs(items))
    elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
        value = memo[argument]
        if isinstance(value, list | dict):  # a small pickle could unfold into a huge value
            raise ValueError("is a pickle in which a list or dict occurs twice")
        stack.append(value)
    else:
        raise ValueError(
            f"is a pickle of more than texts, lists, dicts and numbers (it has {name}); it is "
            "not executed"
        )


def _pop(stack: list[Any]) -> Any:
    item = stack.pop()
    if item is _MARK:
        raise TypeError("a value expected")
    return item


def _since_mark(stack: list[Any]) -> list[Any]:
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _pairs(items: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))


def _top(stack: Sequence[Any], kind: type) -> Any:
    if not isinstance(stack[-1], kind):
        raise TypeError(f"{kind.__name__} expected")
    return stack[-1]

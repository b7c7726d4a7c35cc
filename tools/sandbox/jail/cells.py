"""Executes a session's cells one after the other, and reports how each one ended.

It shares its process with the program, which can therefore forge any reply. The host checks the
form of a reply, believes it only about the program that it ran, and never uses it as a reward.
"""

from __future__ import annotations

import ast
import builtins
import errno
import linecache
import os
import sys
import traceback
from types import CodeType, ModuleType
from typing import Any

_COROUTINE = 0x80
"""The flag of compiled code that awaits something (`inspect.CO_COROUTINE`)."""
_LIMIT_ERRNOS = (errno.ENOSPC, errno.EFBIG, errno.EMFILE, errno.ENOMEM, errno.EAGAIN)


class CellRunner:
    """The state that cells share: a `__main__` module and a count of cells."""

    def __init__(self) -> None:
        module = ModuleType("__main__")
        module.__dict__.update(__builtins__=builtins, display=_display)
        sys.modules["__main__"] = module
        self._globals: dict[str, Any] = module.__dict__
        self._cells = 0

    def execute(self, code: str, value_chars: int) -> dict[str, Any]:
        """Execute one cell.

        Output goes straight to descriptors 1 and 2, so what was printed survives any crash.

        Returns:
            `ok`: whether no exception was raised. `value`: the repr of the last expression, or
            None. `limit`: the limit of the session that an uncaught exception stands for, or "".
        """
        self._cells += 1
        name = f"<cell {self._cells}>"
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        try:
            value = self._evaluate(code, name)
            shown = None if value is None else repr(value)
            return {"ok": True, "value": _cut(shown, value_chars), "limit": ""}
        except BaseException as error:
            limit = limit_of(error)
            _print_traceback(error)
            return {"ok": False, "value": None, "limit": limit}

    def _evaluate(self, code: str, name: str) -> Any:
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        pieces = [_compile(tree, name, "exec")]
        if isinstance(last, ast.Expr):
            pieces.append(_compile(ast.Expression(last.value), name, "eval"))
        if any(piece.co_flags & _COROUTINE for piece in pieces):
            import asyncio  # most cells do without, and it takes long to import

            value = asyncio.run(self._await(pieces))
        else:
            value = None
            for piece in pieces:
                value = eval(piece, self._globals)
        is_shown = isinstance(last, ast.Expr) and not _ends_with_semicolon(code, last)
        return value if is_shown else None

    async def _await(self, pieces: list[CodeType]) -> Any:
        """Execute a cell with an `await` outside of any function, in one event loop."""
        value = None
        for piece in pieces:
            value = eval(piece, self._globals)
            if piece.co_flags & _COROUTINE:
                value = await value
        return value


def _compile(tree: ast.Module | ast.Expression, name: str, mode: str) -> CodeType:
    return compile(tree, name, mode, ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


def _display(*objects: object) -> None:
    """What a notebook calls `display`: shows objects before the end of a cell."""
    for each in objects:
        print(repr(each))


def _ends_with_semicolon(code: str, last: ast.Expr) -> bool:
    """Whether a semicolon follows the last expression, as a notebook's user hides its value."""
    assert last.end_lineno is not None
    lines = code.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    rest = lines[last.end_lineno - 1].encode("utf-8", "surrogatepass")[last.end_col_offset :]
    return rest.lstrip(b" \t\f)").startswith(b";")


def _cut(text: str | None, limit: int) -> str | None:
    # With one character too many, the host sees and reports that the text was cut.
    return text if text is None else text[: limit + 1]


def limit_of(error: BaseException) -> str:
    """The limit of the session that an exception stands for; empty if none."""
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "processes"
    if isinstance(error, OSError) and error.errno in _LIMIT_ERRNOS:
        return "system"
    return ""


def _print_traceback(error: BaseException, write: Any = os.write) -> None:
    """Print an error as Python does, reduced to the program's own frames and the innermost one."""
    try:
        report = traceback.TracebackException.from_exception(error, compact=True)
        _trim(report)
        text = "".join(report.format())
    except BaseException as failure:  # a hostile __str__, or no memory left to format with
        text = f"{type(error).__name__} (its traceback cannot be shown: {type(failure).__name__})\n"
    data = text.encode("utf-8", "backslashreplace")
    while data:
        data = data[write(2, data) :]


def _trim(report: traceback.TracebackException | None) -> None:
    while report is not None:
        own = [frame.filename.startswith("<cell ") for frame in report.stack]
        if any(own):
            own[-1] = True
        report.stack[:] = [frame for frame, keep in zip(report.stack, own, strict=True) if keep]
        _trim(report.__cause__)
        report = report.__context__

"""Runs a whole program in the interpreter as `python -u FILE` would, from its stdin to its end.

The process itself lives on, so that the host can fetch the files that the program has left. So what
Python does at its end is done here: threads are joined, exit handlers are called, and the program's
objects are deleted.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import gc
import io
import itertools
import os
import signal
import sys
import threading
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any

from tir_alp.tools.sandbox.jail.cells import limit_of

_INTERRUPTED = 128 + signal.SIGINT
_NOT_FLUSHED = 120
"""Python's exit status if the program's last output could not be written."""
_HIDDEN_STDIN = ".stdin"


def run_script(code: bytes, stdin: bytes, stdin_file: str | None) -> dict[str, Any]:
    """Run a program in an interpreter that has run nothing of it yet.

    Args:
        code: Its source, as in a file.
        stdin: What it reads from descriptor 0.
        stdin_file: The file to which `/dev/stdin` leads; None if it leads to the descriptor.

    Returns:
        A reply as that of `CellRunner.execute`, and `status`: the exit status.
    """
    modules, main = set(sys.modules), sys.modules["__main__"]
    try:
        path = _write_program(code)
        _provide_stdin(stdin, stdin_file)
        _open_streams()
    except OSError as error:
        sys.__excepthook__(type(error), error, None)
        return _reply(1, limit_of(error))
    folder = os.path.dirname(path)
    sys.argv[:] = [path]
    sys.path[:] = [folder, *(each for each in sys.path if each)]
    # The frames below those of the program must not count.
    sys.setrecursionlimit(sys.getrecursionlimit() + _depth())
    status, limit = _execute(code, path)
    if not _end():
        status = _NOT_FLUSHED
    sys.modules["__main__"] = main
    _forget(modules, folder)
    return _reply(status, limit)


def _reply(status: int, limit: str) -> dict[str, Any]:
    return {"ok": status == 0, "value": None, "limit": limit, "status": status}


def _write_program(code: bytes) -> str:
    folder = os.getcwd()
    for number in itertools.count():
        path = os.path.join(folder, f"main{number or ''}.py")
        with contextlib.suppress(FileExistsError), open(path, "xb") as file:
            file.write(code)
            return path
    raise AssertionError


def _provide_stdin(data: bytes, path: str | None) -> None:
    hidden = path or _HIDDEN_STDIN
    with open(hidden, "wb") as file:
        file.write(data)
    reader = os.open(hidden, os.O_RDONLY)
    os.dup2(reader, 0)
    os.close(reader)
    if path is None:
        os.unlink(hidden)


def _open_streams() -> None:
    """Make stdin and stdout as in the locale C.UTF-8. Those of the fork server cannot be changed:
    they believe that they could seek.
    """
    files = io.FileIO(0, closefd=False), io.FileIO(1, "w", closefd=False)
    for file, name in zip(files, ("<stdin>", "<stdout>"), strict=True):
        file.name = name  # pyright: ignore[reportAttributeAccessIssue]
    streams = {
        "stdin": io.TextIOWrapper(io.BufferedReader(files[0]), "utf-8", "surrogateescape"),
        "stdout": io.TextIOWrapper(files[1], "utf-8", "surrogateescape", write_through=True),
    }
    for name, stream in streams.items():
        stream.mode = "r" if name == "stdin" else "w"  # pyright: ignore[reportAttributeAccessIssue]
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _depth() -> int:
    frame, depth = sys._getframe(), 0
    while frame.f_back is not None:
        frame, depth = frame.f_back, depth + 1
    return depth


def _execute(code: bytes, path: str) -> tuple[int, str]:
    """Returns the exit status, and the limit that an uncaught exception stands for."""
    module = ModuleType("__main__")
    module.__dict__.update(
        __builtins__=builtins,
        __file__=path,
        __cached__=None,
        __annotations__={},
        __loader__=SourceFileLoader("__main__", path),
    )
    sys.modules["__main__"] = module
    try:
        exec(compile(code, path, "exec", dont_inherit=True), module.__dict__)
    except SystemExit as error:
        return _exit_status(error), ""
    except BaseException as error:
        return _report(error), limit_of(error)
    return 0, ""


def _exit_status(error: SystemExit) -> int:
    status = error.code
    if status is None:
        return 0
    if isinstance(status, int):
        return status & 0xFF if -(1 << 63) <= status < 1 << 63 else 0xFF
    with contextlib.suppress(Exception):  # a hostile __str__, or a closed stderr
        print(status, file=sys.stderr)
    return 1


def _report(error: BaseException) -> int:
    """Show an exception as Python does, without our own frame."""
    trace = error.__traceback__ and error.__traceback__.tb_next
    error = error.with_traceback(trace)
    try:
        sys.excepthook(type(error), error, trace)
    except SystemExit as exit_:
        return _exit_status(exit_)
    except BaseException as failure:
        with contextlib.suppress(Exception):
            print("Error in sys.excepthook:", file=sys.stderr)
        sys.__excepthook__(type(failure), failure, failure.__traceback__)
        with contextlib.suppress(Exception):
            print("\nOriginal exception was:", file=sys.stderr)
        sys.__excepthook__(type(error), error, trace)
    return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def _end() -> bool:
    """Do what Python does first at its end; returns whether all output could be written."""
    for step in (threading._shutdown, atexit._run_exitfuncs):  # pyright: ignore[reportAttributeAccessIssue]
        try:
            step()
        except BaseException as error:
            sys.__excepthook__(type(error), error, error.__traceback__)
    signal.setitimer(signal.ITIMER_REAL, 0)
    is_flushed = all([_flush(stream) for stream in (sys.stdout, sys.stderr)])
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
    sys.excepthook = sys.__excepthook__
    return is_flushed


def _flush(stream: Any) -> bool:
    try:
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()
    except BaseException as error:
        with contextlib.suppress(Exception):
            sys.__excepthook__(type(error), error, None)
        return False
    return True


def _forget(modules: set[str], folder: str) -> None:
    """Delete the program's objects, whose `__del__` may print or write."""
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if isinstance(file, str) and file.startswith(folder + "/"):
            del sys.modules[name]
    gc.collect()

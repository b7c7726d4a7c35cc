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
_LOCALE = ("utf-8", "surrogateescape", "\n")
"""Encoding, errors and line end of the standard streams: Python translates no line ends there."""


def run_script(code: bytes, stdin: bytes, stdin_file: str | None) -> dict[str, Any]:
    """Run a program in an interpreter that has run nothing of it yet.

    Args:
        code: Its source, as in a file.
        stdin: What it reads from descriptor 0.
        stdin_file: The file to which `/dev/stdin` leads; None if it leads to the descriptor.

    Returns:
        A reply as that of `CellRunner.execute`, and `status`: the exit status.
    """
    before, main = _Modules(), sys.modules["__main__"]
    try:
        path = _write_program(code)
        _provide_stdin(stdin, stdin_file)
        _open_streams()
    except OSError as error:
        sys.__excepthook__(type(error), error, None)
        return _reply(1, limit_of(error))
    folder = os.path.dirname(path)
    sys.argv[:] = [path]
    sys.orig_argv[:] = [sys.executable, "-u", path]
    sys.path[:] = [folder, *(each for each in sys.path if each)]
    # The frames below those of the program must not count.
    sys.setrecursionlimit(sys.getrecursionlimit() + _depth())
    status, limit = _execute(code, path)
    tracers = sys.gettrace(), sys.getprofile()  # Python keeps what they refer to until the very end
    sys.settrace(None)
    sys.setprofile(None)
    _forget_tracers()
    if not _end():
        status = _NOT_FLUSHED
    sys.modules["__main__"] = main
    with contextlib.suppress(Exception):  # the program may have broken the modules it takes
        before.restore(folder)
        gc.collect()
    del tracers
    return _reply(status, limit)


def _reply(status: int, limit: str) -> dict[str, Any]:
    return {"ok": status == 0, "value": None, "limit": limit, "status": status}


def _forget_tracers() -> None:
    """Take the trace functions from our own frames, to which a debugger adds its own."""
    frame = sys._getframe()
    while frame is not None:
        frame.f_trace = None
        frame = frame.f_back


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
    reader = open(0, "rb", closefd=False)  # noqa: SIM115
    writer = io.FileIO(1, "w", closefd=False)
    for file, name in ((reader.raw, "<stdin>"), (writer, "<stdout>")):
        file.name = name  # pyright: ignore[reportAttributeAccessIssue]
    streams = {
        "stdin": io.TextIOWrapper(reader, *_LOCALE),
        "stdout": io.TextIOWrapper(writer, *_LOCALE, write_through=True),
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
        __annotations__={},
        __builtins__=builtins,
        __file__=path,
        __cached__=None,
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
        _tell(f"{status}\n")
    return 1


def _tell(text: str) -> None:
    """Write to stderr as Python itself does: to the descriptor if `sys.stderr` is None."""
    stderr = getattr(sys, "stderr", None)
    if stderr is None:
        os.write(2, text.encode("utf-8", "backslashreplace"))
    else:
        stderr.write(text)


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
            _tell("Error in sys.excepthook:\n")
        sys.__excepthook__(type(failure), failure, failure.__traceback__)
        with contextlib.suppress(Exception):
            _tell("\nOriginal exception was:\n")
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
    streams = getattr(sys, "stdout", None), getattr(sys, "stderr", None)
    is_flushed = all([_flush(stream) for stream in streams])
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
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


class _Modules:
    """The modules before a program runs.

    Python clears all modules at its end, and this deletes what the program has put into them. Here
    they are needed further, so only what the program has added is taken out.
    """

    def __init__(self) -> None:
        # Not copies: to count the references to all values would touch much memory after a fork.
        self._num_names = {name: len(vars(module)) for name, module in _modules()}
        self._builtins = vars(builtins).copy()

    def restore(self, folder: str) -> None:
        """Delete the program's objects, whose `__del__` may print or write.

        Args:
            folder: The folder of the program, whose own modules are deleted as a whole.
        """
        builtins.__dict__.update(self._builtins)  # first: what follows needs them
        for number in signal.valid_signals():
            if callable(handler := signal.getsignal(number)) and not _is_pythons(handler):
                signal.signal(number, signal.SIG_DFL)
        for name, module in list(sys.modules.items()):
            if name not in self._num_names and _is_own(module, folder):
                del sys.modules[name]
        for name, module in _modules():
            for added in list(vars(module))[self._num_names.get(name, len(vars(module))) :]:
                vars(module).pop(added, None)


def _modules() -> list[tuple[str, ModuleType]]:
    """All but `sys`, which Python clears when nothing can be printed any more."""
    modules = list(sys.modules.items())
    return [(name, each) for name, each in modules if name != "sys" and type(each) is ModuleType]


def _is_own(module: object, folder: str) -> bool:
    """Whether a program has written a module, or put it into `sys.modules` without an import."""
    file = getattr(module, "__file__", None)
    in_folder = isinstance(file, str) and file.startswith(folder + "/")
    return in_folder or getattr(module, "__spec__", None) is None


def _is_pythons(handler: object) -> bool:
    return type(handler) in (int, signal.Handlers, type(signal.default_int_handler))

"""How the process of a command begins and ends, where the command itself cannot say it.

Ctrl-C while it is still importing: exit code 130. A KeyboardInterrupt in the middle of an import is
a traceback of somebody else's code at best; at worst it is taken for a failed import, or lost.
Nothing needs to be cleaned up that early, so the process ends at once.

An optional library that is missing: exit code 2, and the command that installs it.

A reader of the output that has gone, as in `tir-alp train --help | head`: nothing is printed, and
the exit code is the one that a shell gives to a process that ends so, 141.

Threads that compute: how long they wait for work awake, which OpenMP reads when torch is imported.

A command that has done its work: its process ends as soon as all threads and exit handlers have.
The interpreter would free half a million objects of torch and transformers one at a time, which
takes a second or two; the kernel frees them at once.

Nothing here takes time to import.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

EXIT_CODE = 130
_NO_READER = 141
_LINE = "tir_alp: interrupted\n"
_COMMAND = re.compile(r"tir_alp(\.\w+|\.studies\.\w+|\.envs\.interop|\.models\.tiny\.make)?")


EXTRAS = {
    "aiohttp": "service",
    "anthropic": "agents",
    "datasets": "data",
    "docker": "docker",
    "httpx2": "mcp",
    "mcp": "mcp",
    "openai": "agents",
    "peft": "lora",
    "prometheus_client": "service",
    "pyarrow": "data",
    "ray": "ray",
    "simpy": "simulate",
}
"""Optional libraries -> the extra of this package that installs them."""

OPENMP = {"GOMP_SPINCOUNT": "2000"}
"""How long, in loops of about 50 ns, a thread of GNU's OpenMP waits for work before it sleeps. By
default that is for 15 ms, in which it takes a processor from tools and other programs; the pause
between two operations of a decode step is a hundredth of that."""

_is_command = False  # whether this process is one of our commands; see `begin_command`
_code: int | None = None  # exit code of the command, once it has done its work


def begin_command_of(words: Sequence[str]) -> None:
    """Call `begin_command` in a process that is one of our commands, and not a part of a run.

    Args:
        words: What the process was started with, from the interpreter on.
    """
    after = [*words][words.index("-m") + 1 :] if "-m" in words else []
    if after and _COMMAND.fullmatch(after[0]):
        begin_command()


def begin_command() -> None:
    """Prepare the ends that this module describes; Ctrl-C ends it until `raise_on_interrupt`.

    It is called before the imports. A process that ignores the signal, as one in the background of
    a shell does, goes on ignoring it.
    """
    global _is_command
    _is_command = True
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)
    for name, value in OPENMP.items():  # read when torch is imported
        os.environ.setdefault(name, value)
    sys.excepthook = _end_in_one_line
    atexit.register(_end)  # the first to be registered is the last to be called


def raise_on_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again; called after the imports."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run_command(main: Callable[[Sequence[str]], int], *, imports: bool = False) -> int:
    """Call the main function of a command with the command line; returns its exit code.

    Args:
        main: The function.
        imports: Whether it has imports of its own, after which it calls `raise_on_interrupt`.
    """
    global _code
    if not imports:
        raise_on_interrupt()
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.stderr.write(_LINE)
        code = EXIT_CODE
    _code = code if _is_command else None
    return code


@contextmanager
def torch_imports() -> Iterator[None]:
    """Say that torch is imported, and import without a search for garbage meanwhile.

    The collector would read all objects that are there seven times, a fifth of the time that the
    imports take, and what they leave is not garbage. In a command it is not read later either.
    """
    print("importing torch and transformers", flush=True)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if _is_command:
            gc.freeze()
        if was_enabled:
            gc.enable()


def missing_extra(module: str) -> str:
    """Say which optional library is missing, and how it is installed; empty if it is none."""
    name = module.partition(".")[0]
    extra = EXTRAS.get(name)
    return f"{name} is not installed: pip install 'tir_alp[{extra}]'" if extra else ""


def _end_in_one_line(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if isinstance(error, BrokenPipeError) and _has_no_reader(1):
        os._exit(_NO_READER)
    name = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    if not (sentence := missing_extra(name)):
        sys.__excepthook__(kind, error, trace)
        return
    sys.stdout.flush()
    os.write(2, f"tir_alp: {sentence}\n".encode())
    os._exit(2)


def _has_no_reader(descriptor: int) -> bool:
    """Whether a descriptor is a pipe or socket whose other end is closed."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _end() -> None:
    """Write out what is buffered, and end the process of a command that has done its work.

    The interpreter would complain of output that nobody reads any more.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(_NO_READER)
    is_watched = sys.gettrace() or sys.getprofile()  # by what reports at the end of the interpreter
    if _code is not None and not is_watched:
        sys.stderr.flush()
        os._exit(_code)
    gc.unfreeze()  # extension modules complain of objects that are never freed


def _exit(number: int, frame: Any) -> None:
    os.write(2, _LINE.encode())
    os._exit(EXIT_CODE)

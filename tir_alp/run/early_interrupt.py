"""Ctrl-C while a command is still importing: one line and exit code 130, no traceback.

A KeyboardInterrupt in the middle of an import is a traceback of somebody else's code at best; at
worst it is taken for a failed import, or lost. Nothing needs to be cleaned up that early, so the
process ends at once. Nothing here takes time to import.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

EXIT_CODE = 130
_LINE = "tir_alp: interrupted\n"
_COMMAND = re.compile(r"tir_alp(\.\w+|\.studies\.\w+)?")


def exit_on_interrupt_of_command(words: Sequence[str]) -> None:
    """Call `exit_on_interrupt` in a process that is one of our commands, and not a part of a run.

    Args:
        words: What the process was started with, from the interpreter on.
    """
    after = [*words][words.index("-m") + 1 :] if "-m" in words else []
    if after and _COMMAND.fullmatch(after[0]):
        exit_on_interrupt()


def exit_on_interrupt() -> None:
    """End the process at Ctrl-C, until `raise_on_interrupt`; called before the imports.

    A process that ignores the signal, as one in the background of a shell does, goes on ignoring
    it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


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
    if not imports:
        raise_on_interrupt()
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.stderr.write(_LINE)
        return EXIT_CODE


def _exit(number: int, frame: Any) -> None:
    os.write(2, _LINE.encode())
    os._exit(EXIT_CODE)

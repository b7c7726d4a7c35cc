"""Reading what is typed to `tir_alp.chat`: lines, the end of the input, and Ctrl-C."""

import contextlib
import os
import pty
import select
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """\
import asyncio, sys
from tir_alp.chat import next_line

async def main():
    while (line := await next_line()) is not None:
        print(repr(line))
    print("ended")

asyncio.run(main())
"""


def begin() -> tuple[int, int]:
    """Start the program in a terminal of its own; returns its process id and the terminal."""
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        os.execve(sys.executable, [sys.executable, "-c", PROGRAM], environment)
    return child, terminal


def shown_until(terminal: int, text: str) -> str:
    """Read what the program shows until a text appears in it."""
    shown, deadline = "", time.monotonic() + 30
    while text not in shown:
        assert select.select([terminal], [], [], deadline - time.monotonic())[0], shown
        shown += os.read(terminal, 4096).decode()
    return shown


def test_lines_are_read_in_a_terminal_up_to_its_end():
    child, terminal = begin()
    shown_until(terminal, "> ")
    os.write(terminal, "What is 6*7?\nund 8·9?\n".encode())
    shown = shown_until(terminal, "8·9?\\n'")
    assert "'What is 6*7?\\n'" in shown
    os.write(terminal, b"\x04")  # Ctrl-D
    shown_until(terminal, "ended")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_ctrl_c_ends_it_while_it_waits_for_a_line():
    child, terminal = begin()
    shown_until(terminal, "> ")
    os.write(terminal, b"\x03")
    shown_until(terminal, "KeyboardInterrupt")
    ended, deadline = 0, time.monotonic() + 30
    while not ended and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.05)[0]:
            with contextlib.suppress(OSError):  # it has gone
                os.read(terminal, 4096)
        ended, _ = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
    assert ended == child

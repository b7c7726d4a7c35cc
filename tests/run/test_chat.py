"""Reading what is typed to `tir_alp.chat`: lines, the end of the input, and Ctrl-C."""

import asyncio
import contextlib
import os
import pty
import select
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.rollouts.forked import WORDS, Speaker, Talk, renderer, tokenizer
from tir_alp.chat import Conversation
from tir_alp.config import Config

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


# ------------------------------------------------------------------- what the model is shown


def conversation(speaker: Speaker, answers, max_context_tokens=500) -> Conversation:
    limits = {"max_turn_tokens": 200, "max_context_tokens": max_context_tokens}
    config = Config.model_validate({"rollout": limits})
    engine: Any = SimpleNamespace(generate=speaker)
    return Conversation(Talk(answers), renderer(), engine, config)


def ask(chat: Conversation, text: str) -> None:
    async def main() -> None:
        async for _ in chat.ask(text, lambda: nullcontext(lambda shown: None)):
            pass

    asyncio.run(main())


def test_thoughts_are_dropped_after_a_message_of_the_user_and_not_before():
    speaker = Speaker(WORDS[1], WORDS[0], WORDS[1], WORDS[0])
    chat = conversation(speaker, [("41", 0.0, {"tool_calls": 1}), ("", 0.0, {})])
    ask(chat, "6*7?")
    ask(chat, "Sure?")
    first, second, third, _ = (tokenizer().decode(list(each)) for each in speaker.read)
    assert first == "<|user|>6*7?<|end|><|assistant|>"
    assert second == f"{first}{WORDS[1]}<|end|><|tool|>41<|end|><|assistant|>"
    said = [each.partition("</think>\n\n")[2] for each in WORDS[:2]]
    assert third == (
        f"{first}{said[1]}<|end|><|tool|>41<|end|><|assistant|>{said[0]}<|end|>"
        "<|user|>Sure?<|end|><|assistant|>"
    )
    roles = ["user", "assistant", "tool", "assistant"]
    assert [each["role"] for each in chat.messages] == roles * 2


def test_a_message_that_was_not_answered_is_forgotten():
    chat = conversation(Speaker(WORDS[0]), [("", 0.0, {})], max_context_tokens=250)
    ask(chat, "6*7?")
    before = chat.token_ids, chat.told, [*chat.messages]
    with pytest.raises(ValueError, match="max_context_tokens"):
        ask(chat, "x" * 300)
    assert (chat.token_ids, chat.told, chat.messages) == before

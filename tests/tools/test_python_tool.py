"""What the model reads, to the letter."""

import os
from collections.abc import Iterator

import pytest

from tir_alp.tools.base import Tool
from tir_alp.tools.outcome import Outcome
from tir_alp.tools.python_tool import NO_OUTPUT, PythonTool, PythonToolSession
from tir_alp.tools.sandbox import SandboxConfig

pytestmark = pytest.mark.sandbox

# As in conftest.py, so that the sandbox is shared with the other tests.
BARE = SandboxConfig(preload=(), memory_mb=512, tmp_mb=8, tmp_files=64, max_processes=16)
TOOL = PythonTool(BARE, limits={"wall_s": 2.0}, max_output_chars=400)


@pytest.fixture
def session() -> Iterator[PythonToolSession]:
    session = TOOL.open_session()
    yield session
    session.close()


def read(code: str, session: PythonToolSession, tool: Tool = TOOL) -> str:
    return tool.run({"code": code}, session).text


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("print(6 * 7)", "42"),
        ("6 * 7", "42"),
        ("print('a')\nprint('b')\n'c'", "a\nb\n'c'"),
        ("x = 1", NO_OUTPUT),
        ("", NO_OUTPUT),
        ("print()", NO_OUTPUT),
        ("print('a', end='')\n1", "a\n1"),
        ("import sys; print('warned', file=sys.stderr)", "warned"),
        ("(", "  File \"<cell 1>\", line 1\n    (\n    ^\nSyntaxError: '(' was never closed"),
    ],
)
def test_text(session: PythonToolSession, code: str, text: str):
    assert read(code, session) == text


def test_text_of_an_error_has_the_output_before_it(session: PythonToolSession):
    result = TOOL.run({"code": "print('before')\nint('x')"}, session)
    assert result.outcome is Outcome.TOOL_ERROR
    assert result.text == (
        "before\n"
        "Traceback (most recent call last):\n"
        '  File "<cell 1>", line 2, in <module>\n'
        "    int('x')\n"
        "ValueError: invalid literal for int() with base 10: 'x'"
    )
    assert result.error.endswith("'x'\n")


def test_text_of_a_timeout_has_the_output_before_it(session: PythonToolSession):
    tool = PythonTool(BARE, limits={"wall_s": 0.3})
    result = tool.run({"code": "print('before')\nwhile True: pass"}, session)
    assert result.outcome is Outcome.TOOL_TIMEOUT
    assert result.text == ("before\n[the interpreter was killed: it hit the time limit of 0.3 s]")


def test_loss_of_variables_is_said_once(session: PythonToolSession):
    read("x = 1\nimport os; os._exit(1)", session)
    assert read("1", session) == "[The interpreter was restarted: earlier variables are lost.]\n1"
    assert read("1", session) == "1"


def test_variables_live_as_long_as_the_session(session: PythonToolSession):
    read("x = 1", session)
    assert read("x", session) == "1"
    other = TOOL.open_session()
    assert "NameError" in read("x", other)
    other.close()


def test_long_text_keeps_head_tail_and_error(session: PythonToolSession):
    text = read("print('HEAD' + 'x' * 100_000)\n1 / 0", session)
    assert len(text) == 400
    assert text.startswith("HEADx") and "cut here" in text
    assert text.endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize("arguments", [{}, {"code": 1}, {"code": None}, {"source": "1"}])
def test_wrong_arguments_are_a_tool_error(session: PythonToolSession, arguments: dict):
    result = TOOL.run(arguments, session)
    assert result.outcome is Outcome.TOOL_ERROR and "`code`" in result.text
    assert session.interpreter is None


def test_nothing_starts_before_the_first_call():
    session = PythonTool({"preload": ("never_imported",)}).open_session()
    assert session.interpreter is None
    session.close()
    session.close()


def test_dead_sandbox_is_an_infrastructure_error(session: PythonToolSession, monkeypatch):
    tool = PythonTool(BARE.model_copy(update={"ready_sessions": 0}))  # what is ready needs no more
    assert tool.run({"code": "1"}, session).outcome is Outcome.OK
    session.close()
    monkeypatch.setattr(os, "pipe", lambda: (_ for _ in ()).throw(OSError(24, "no descriptors")))
    result = tool.run({"code": "1"}, session)
    assert result.outcome is Outcome.INFRA_ERROR and "no descriptors" in result.error


def test_the_duration_of_a_call_that_gets_no_session_is_its_wait():
    tool = PythonTool(BARE.model_copy(update={"max_sessions": 6, "max_wait_s": 2.0}))
    holders, waiting = [tool.open_session() for _ in range(6)], tool.open_session()
    try:
        for holder in holders:
            assert tool.run({"code": "1"}, holder).outcome is Outcome.OK
        result = tool.run({"code": "1"}, waiting)
    finally:
        for holder in holders:
            holder.close()
    assert result.outcome is Outcome.INFRA_ERROR and "max_sessions" in result.error
    assert 1.9 < result.duration_s < 30

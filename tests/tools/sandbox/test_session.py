"""What a session does for harmless programs."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from tir_alp.tools.sandbox import (
    BlockingSandbox,
    BlockingSession,
    Limits,
    Outcome,
    SandboxConfig,
    create_sandbox,
)

pytestmark = pytest.mark.sandbox


def test_variables_live_across_calls(python: BlockingSession):
    python.run("x = 6")
    assert python.run("print(x * 7)").stdout == "42\n"


def test_value_is_that_of_the_last_expression(python: BlockingSession):
    assert python.run("x = 'a'\nx").value == "'a'"


@pytest.mark.parametrize("code", ["x = 1", "None", "print(1)", "1\nx = 2", "", "# nothing"])
def test_no_value_where_a_notebook_shows_none(python: BlockingSession, code: str):
    result = python.run(code)
    assert (result.outcome, result.value) == (Outcome.OK, None)


@pytest.mark.parametrize("code", ["6 * 7;", "(6 * 7);", "'é;'; # ;", "1; 2 ;", "x = 1\r\nx;\r\n"])
def test_a_semicolon_hides_the_value(python: BlockingSession, code: str):
    result = python.run(code)
    assert (result.outcome, result.value, result.stderr) == (Outcome.OK, None, "")


@pytest.mark.parametrize(
    ("code", "value"), [("6; 7", "7"), ("';'", "';'"), ("7 # ;", "7"), ("(\n7\n)", "7")]
)
def test_other_semicolons_hide_nothing(python: BlockingSession, code: str, value: str):
    assert python.run(code).value == value


def test_await_outside_of_a_function(python: BlockingSession):
    python.run("import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x")
    assert python.run("await f(6)").value == "6"
    assert python.run("task = asyncio.create_task(f(7))\nawait task").value == "7"
    assert python.run("x = await f(8)\nprint(x)").stdout == "8\n"
    assert python.run("async with asyncio.timeout(9): x = 9\nx").value == "9"
    assert python.run("[await f(n) for n in range(3)]").value == "[0, 1, 2]"
    assert python.run("asyncio.run(f(x))").value == "9"
    stderr = python.run("async def g(): 1 / 0\nawait g()").stderr
    assert stderr.endswith("ZeroDivisionError: division by zero\n") and "asyncio" not in stderr
    assert python.run("await asyncio.sleep(9)", Limits(wall_s=0.2)).outcome is Outcome.TOOL_TIMEOUT


def test_display_shows_objects_at_once(python: BlockingSession):
    result = python.run("display('a', 1)\nprint(2)\n3")
    assert (result.stdout, result.value) == ("'a'\n1\n2\n", "3")


def test_cells_do_not_inherit_our_own_future_imports(python: BlockingSession):
    assert python.run("def f(x: int): pass\nf.__annotations__").value == "{'x': <class 'int'>}"
    own = "from __future__ import annotations\ndef f(x: int): pass\nf.__annotations__"
    assert python.run(own).value == "{'x': 'int'}"


def test_stdout_and_stderr_are_apart(python: BlockingSession):
    result = python.run("import sys; print('out'); print('err', file=sys.stderr)")
    assert (result.stdout, result.stderr) == ("out\n", "err\n")


def test_stdout_survives_an_error(python: BlockingSession):
    result = python.run("print('before', end='')\n1 / 0")
    assert (result.outcome, result.stdout) == (Outcome.TOOL_ERROR, "before")


def test_state_survives_an_error(python: BlockingSession):
    python.run("x = 1\n1 / 0")
    assert python.run("x").value == "1"


def test_traceback_shows_only_the_program(python: BlockingSession):
    python.run("def f():\n    return 1 / 0")
    stderr = python.run("f()").stderr
    assert "return 1 / 0" in stderr and stderr.endswith("ZeroDivisionError: division by zero\n")
    assert [line.split(",")[0] for line in stderr.splitlines() if "File" in line] == [
        '  File "<cell 2>"',
        '  File "<cell 1>"',
    ]


def test_syntax_error_points_at_the_place(python: BlockingSession):
    result = python.run("x = (1,\ny")
    assert result.outcome is Outcome.TOOL_ERROR
    assert result.stderr.startswith('  File "<cell 1>", line 1\n')


def test_any_bytes_survive(python: BlockingSession):
    result = python.run("import sys; n = sys.stdout.buffer.write(b'\\xff\\x00\\xc3\\xa4\\n')")
    assert result.stdout == "\\xff\x00ä\n"


def test_lone_surrogates_are_escaped(python: BlockingSession):
    assert python.run("print('\\ud800')").stdout == "\\ud800\n"
    assert python.run("print('\ud800')").outcome is Outcome.TOOL_ERROR


def test_exit_ends_the_cell_and_not_the_session(python: BlockingSession):
    python.run("x = 1")
    assert python.run("exit()").outcome is Outcome.TOOL_ERROR
    assert python.run("import sys; sys.exit(0)").outcome is Outcome.TOOL_ERROR
    assert python.run("x").value == "1"


def test_input_is_at_its_end(python: BlockingSession):
    assert "EOFError" in python.run("input()").stderr


def test_class_of_the_program_can_be_pickled(python: BlockingSession):
    code = "import pickle\nclass A: pass\ntype(pickle.loads(pickle.dumps(A()))) is A"
    assert python.run(code).value == "True"


def test_installed_packages_can_be_imported(python: BlockingSession):
    assert python.run("import sympy; sympy.factor('x**2 - 1')").value == "(x - 1)*(x + 1)"


def test_threads_and_asyncio_work(python: BlockingSession):
    code = """
import asyncio, threading
threads = [threading.Thread(target=print, args=(i,)) for i in range(3)]
[t.start() for t in threads], [t.join() for t in threads]
async def main(): await asyncio.sleep(0.001); return 'slept'
asyncio.run(main())
"""
    assert python.run(code).value == "'slept'"


def test_files_can_be_written_in_tmp(python: BlockingSession):
    python.run("open('notes.txt', 'w').write('kept')")
    assert python.run("open('/tmp/notes.txt').read()").value == "'kept'"


def test_random_numbers_differ_between_sessions(
    python: BlockingSession, neighbour: BlockingSession
):
    code = "import random; random.random()"
    assert python.run(code).value != neighbour.run(code).value


def test_preloaded_modules_are_there_and_seeded_apart():
    async def values() -> list[str | None]:
        config = SandboxConfig(preload=("numpy.random",))
        async with (
            create_sandbox(config) as sandbox,
            sandbox.session() as one,
            sandbox.session() as two,
        ):
            loaded = await one.run("import sys; 'numpy' in sys.modules")
            code = "import numpy; float(numpy.random.rand())"
            return [loaded.value, *[(await s.run(code)).value for s in (one, two)]]

    loaded, one, two = asyncio.run(values())
    assert loaded == "True" and one != two


def test_processor_time_is_counted(python: BlockingSession):
    result = python.run("for i in range(3_000_000): pass")
    assert 0.01 < result.cpu_s <= result.duration_s + 0.05


def test_sessions_run_at_the_same_time():
    async def outcomes() -> list[str]:
        async with create_sandbox(SandboxConfig(preload=())) as sandbox:

            async def count(number: int) -> str:
                async with sandbox.session() as python:
                    await python.run(f"x = {number}; import time; time.sleep(0.2)")
                    return (await python.run("print(x)")).stdout

            async with asyncio.timeout(5):
                return list(await asyncio.gather(*map(count, range(40))))

    assert asyncio.run(outcomes()) == [f"{number}\n" for number in range(40)]


def test_more_sessions_than_allowed_wait_for_a_slot():
    async def opened_early() -> bool:
        config = SandboxConfig(preload=(), max_sessions=6)
        async with create_sandbox(config) as sandbox:
            sessions = [await sandbox.open_session() for _ in range(6)]
            late = asyncio.create_task(sandbox.open_session())
            await asyncio.sleep(0.1)
            early = late.done()
            await sessions[0].close()
            await asyncio.wait_for(late, 5)
            return early

    assert asyncio.run(opened_early()) is False


def test_facade_serves_many_threads(sandbox: BlockingSandbox):
    def count(number: int) -> str:
        session = sandbox.session()
        for _ in range(10):
            session.run(f"x = globals().get('x', 0) + {number}")
        value = session.run("x").value
        session.close()
        return value or ""

    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(count, range(32))) == [str(10 * n) for n in range(32)]


def test_calls_of_one_session_are_serialised(python: BlockingSession):
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda n: python.run(f"print({n})"), range(64)))
    assert [r.stdout for r in results] == [f"{n}\n" for n in range(64)]


def test_limits_of_a_call_replace_those_of_the_config(python: BlockingSession):
    result = python.run("print('a' * 1000)", Limits(output_chars=100))
    assert len(result.stdout) == 100 and result.truncated

"""What a program may use up, and what its call is called when it does."""

import time

import pytest

from tir_alp.tools.sandbox import BlockingSession, Limits, Outcome

pytestmark = pytest.mark.sandbox


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import re; re.match('(a+)+$', 'a' * 40 + 'b')",
        "sum(range(10 ** 12))",
        "import signal; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]\nwhile True: pass",
        "class A:\n  def __repr__(self):\n    while True: pass\nA()",
        "import threading; threading.Event().wait()",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    ],
)
def test_endless_program_is_stopped(python: BlockingSession, code: str):
    started = time.perf_counter()
    result = python.run(f"print('partial', end='')\n{code}", Limits(wall_s=0.3))
    assert result.outcome is Outcome.TOOL_TIMEOUT
    assert result.stdout == "partial"
    assert "time limit of 0.3 s" in result.stderr
    assert time.perf_counter() - started < 2


def test_processor_time_is_bounded_apart_from_wall_time(python: BlockingSession):
    limits = Limits(wall_s=20, cpu_s=0.2)
    assert python.run("import time; time.sleep(0.5)", limits).outcome is Outcome.OK
    result = python.run("while True: pass", limits)
    assert result.outcome is Outcome.TOOL_TIMEOUT
    assert "processor time" in result.stderr and result.duration_s < 5


def test_after_a_timeout_the_interpreter_is_fresh_and_says_so(python: BlockingSession):
    python.run("x = 1\nwhile True: pass", Limits(wall_s=0.2))
    result = python.run("'x' in globals()")
    assert (result.value, result.note != "") == ("False", True)
    assert python.run("1").note == ""


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(1 << 30)",
        "x = []\nwhile True: x.append(bytearray(1 << 22))",
        "x = 'a'\nwhile True: x += x",
        "import mmap; mmap.mmap(-1, 1 << 40)",
    ],
)
def test_memory_is_bounded(python: BlockingSession, code: str):
    assert python.run(code).outcome is Outcome.RESOURCE_LIMIT


def test_session_survives_running_out_of_memory(python: BlockingSession):
    python.run("x = 1")
    python.run("bytearray(1 << 30)")
    assert python.run("x").value == "1"


def test_threads_are_bounded(python: BlockingSession):
    code = """
import threading
wait = threading.Event()
for i in range(64): threading.Thread(target=wait.wait, daemon=True).start()
"""
    result = python.run(code)
    assert result.outcome is Outcome.RESOURCE_LIMIT
    assert int(python.run("i").value or "64") < 16


def test_threads_of_one_session_leave_the_other_its_own(
    python: BlockingSession, neighbour: BlockingSession
):
    swarm = """
import threading
wait = threading.Event()
for i in range(8): threading.Thread(target=wait.wait, daemon=True).start()
"""
    assert python.run(swarm).outcome is Outcome.OK
    assert neighbour.run(swarm).outcome is Outcome.OK


def test_disk_is_bounded(python: BlockingSession):
    code = """
for i in range(32):
    with open(f'/tmp/{i}', 'wb') as file: n = file.write(bytes(1 << 20))
"""
    assert python.run(code).outcome is Outcome.RESOURCE_LIMIT
    assert int(python.run("i").value or "32") <= 8


def test_one_file_is_bounded_and_the_session_survives(python: BlockingSession):
    python.run("x = 1")
    result = python.run("open('/tmp/big', 'wb').truncate(1 << 50)")
    assert result.outcome is Outcome.RESOURCE_LIMIT
    assert python.run("x").value == "1"


def test_number_of_files_is_bounded(python: BlockingSession):
    code = "for i in range(1000): open(f'/tmp/{i}', 'w').close()"
    assert python.run(code).outcome is Outcome.RESOURCE_LIMIT
    assert int(python.run("i").value or "1000") < 64


def test_open_files_are_bounded(python: BlockingSession):
    result = python.run("files = [open('/dev/null') for _ in range(1000)]")
    assert result.outcome is Outcome.RESOURCE_LIMIT


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_flood_is_stopped(python: BlockingSession, stream: str):
    code = f"import sys\nwhile True: sys.{stream}.write('flood' * 1000)"
    result = python.run(code, Limits(output_bytes=1 << 20, output_chars=1000))
    assert result.outcome is Outcome.RESOURCE_LIMIT
    assert len(getattr(result, stream)) < 1200 and "flood" in getattr(result, stream)


def test_long_output_keeps_head_and_tail(python: BlockingSession):
    code = "print('HEAD' + 'x' * 300_000 + 'TAIL', end='')"
    result = python.run(code, Limits(output_chars=200))
    assert result.outcome is Outcome.OK and result.truncated
    assert result.stdout.startswith("HEADx") and result.stdout.endswith("xTAIL")
    assert len(result.stdout) == 200 and "cut here" in result.stdout


def test_long_value_is_cut(python: BlockingSession):
    result = python.run("'a' * 10_000_000", Limits(output_chars=100))
    assert result.value is not None and len(result.value) == 100 and result.truncated


def test_calls_are_accounted_for(python: BlockingSession):
    result = python.run("x = bytearray(100 << 20); print('a' * 50_000)", Limits(output_chars=100))
    assert result.output_bytes == 50_001 and result.truncated
    assert 100 < result.peak_memory_mb < 250
    assert 0 <= result.queue_s <= result.duration_s


def test_killed_calls_are_accounted_for(python: BlockingSession):
    result = python.run("x = bytearray(100 << 20)\nwhile True: pass", Limits(wall_s=0.5))
    assert result.outcome is Outcome.TOOL_TIMEOUT
    assert result.peak_memory_mb > 100 and 0.01 < result.cpu_s < 2

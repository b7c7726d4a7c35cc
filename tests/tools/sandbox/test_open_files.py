"""The host's limit of open files is raised to what the sessions need, or the sandbox refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.sandbox

PROGRAM = """
import asyncio, resource, sys
soft, hard, max_sessions = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from tir_alp.tools.sandbox import SandboxConfig, create_sandbox

async def main():
    config = SandboxConfig(backend="namespaces", preload=(), max_sessions=max_sessions)
    async with create_sandbox(config) as sandbox:
        sessions = [await sandbox.open_session() for _ in range(max_sessions)]
        await sessions[0].run("import os; os.abort()")  # noticed by `poll`, above 1023 as well
        print([(await s.run("6 * 7")).value for s in sessions].count("42"))

asyncio.run(main())
"""


def run(soft: int, hard: int, max_sessions: int) -> subprocess.CompletedProcess[str]:
    numbers = map(str, (soft, hard, max_sessions))
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *numbers],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_soft_limit_is_raised_to_what_the_sessions_need():
    result = run(64, 4096, 40)
    assert (result.stdout, result.returncode) == ("40\n", 0), result.stderr


def test_hard_limit_that_is_too_low_is_refused_with_the_fix():
    result = run(64, 1024, 200)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert "202 interpreters" in message and "may have 1024" in message
    assert "ulimit -Hn" in message and "lower max_sessions by" in message

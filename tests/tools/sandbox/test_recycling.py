"""Worn interpreters and fork servers are replaced, and fresh interpreters are kept ready."""

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.tools.sandbox.processes import Process, descendants, is_running
from tests.tools.sandbox.unprobed import unprobed_sandbox
from tir_alp.tools.sandbox import Outcome, SandboxConfig, SandboxError
from tir_alp.tools.sandbox.sessions.local_sandbox import LocalSandbox

pytestmark = pytest.mark.sandbox

ON_EACH_BACKEND = pytest.mark.parametrize("backend", ["namespaces", "landlock"])


def config_of(backend: str = "namespaces", **settings: Any) -> SandboxConfig:
    fields = {"backend": backend, "preload": (), "ready_sessions": 0, **settings}
    return SandboxConfig.model_validate(fields)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def fork_servers(others: list[Process]) -> list[Process]:
    """What this process has started since it had only these children."""
    return [child for child in children() if child not in others]


def children() -> list[Process]:
    found = descendants(os.getpid())
    grandchildren = {each for child in found for each in descendants(child.pid)}
    return [each for each in found if each not in grandchildren]


# ---------------------------------------------------------------------- interpreters


@pytest.mark.parametrize(
    ("lifetime", "code", "reason"),
    [
        ({"max_uses": 1}, "x = 1", "it has served 1 calls"),
        ({"max_age_s": 0.01}, "x = 1; import time; time.sleep(0.1)", "it is older than 0.01 s"),
        ({"max_grown_mb": 50}, "x = bytearray(100 << 20)", "it has grown by more than 50 MB"),
    ],
)
def test_worn_interpreter_ends_after_its_call_and_says_so(lifetime: dict, code: str, reason: str):
    async def scenario():
        config = config_of(interpreter_lifetime=lifetime)
        async with unprobed_sandbox(config) as sandbox, sandbox.session() as python:
            last = await python.run(f"{code}\nprint('done')")
            with pytest.raises(SandboxError, match=f"nothing left to fork: {reason}"):
                await python.fork()
            return last, await python.run("'x' in globals()")

    last, after = asyncio.run(scenario())
    assert (last.outcome, last.stdout) == (Outcome.OK, "done\n")
    assert reason in last.note and "variables are lost" in last.note
    assert (after.outcome, after.value) == (Outcome.OK, "False")
    assert "restarted" in after.note


def test_interpreter_within_its_bounds_keeps_its_variables():
    async def scenario():
        lifetime = {"max_uses": 4, "max_age_s": 600, "max_grown_mb": 200}
        config = config_of(interpreter_lifetime=lifetime)
        async with unprobed_sandbox(config) as sandbox, sandbox.session() as python:
            await python.run("x = [0]")
            return [await python.run("x.append(1); len(x)") for _ in range(3)]

    results = asyncio.run(scenario())
    assert [(result.value, result.note != "") for result in results] == [
        ("2", False),
        ("3", False),
        ("4", True),
    ]


def test_memory_of_a_worn_interpreter_is_free_at_once():
    async def scenario():
        config = config_of(interpreter_lifetime={"max_grown_mb": 50})
        async with unprobed_sandbox(config) as sandbox, sandbox.session() as python:
            pid = python.pid
            await python.run("x = bytearray(100 << 20)")
            await until(lambda: not any(process.pid == pid for process in descendants(os.getpid())))
            return sandbox.budget.reserved.memory_mb

    assert asyncio.run(scenario()) == 0


# ---------------------------------------------------------------------- the fork server


@ON_EACH_BACKEND
def test_worn_fork_server_is_replaced_and_its_sessions_live_on(backend: str):
    async def scenario() -> None:
        config = config_of(backend, fork_server_lifetime={"max_uses": 1})
        async with unprobed_sandbox(config) as sandbox:
            (worn,) = fork_servers(others)
            old = await sandbox.open_session()
            await old.run("x = 1")
            await until(lambda: len(fork_servers(others)) == 2)
            branch = await old.fork()  # of a session on a fork server that takes no new ones
            await _serves_until_it_has_moved(sandbox, worn)
            assert (await old.run("x")).value == (await branch.run("x")).value == "1"
            await old.close()
            assert (await branch.run("x + 1")).value == "2"
            assert is_running(worn)
            await branch.close()
            await until(lambda: not is_running(worn))

    others = children()
    asyncio.run(scenario())
    assert children() == others


async def _serves_until_it_has_moved(sandbox: LocalSandbox, worn: Process) -> None:
    """Open sessions until one comes from another fork server; each of them has to work."""
    async with asyncio.timeout(60):
        while True:
            async with sandbox.session() as python:
                assert (await python.run("6 * 7")).value == "42"
                if python.pid not in {process.pid for process in descendants(worn.pid)}:
                    return


def test_fork_server_wears_out_by_age():
    async def scenario() -> None:
        config = config_of(preload=("decimal",), fork_server_lifetime={"max_age_s": 0.01})
        async with unprobed_sandbox(config) as sandbox:
            (worn,) = fork_servers(others)
            async with asyncio.timeout(60):
                while is_running(worn):
                    async with sandbox.session() as python:
                        assert (await python.run("1")).outcome is Outcome.OK

    others = children()
    asyncio.run(scenario())


def test_at_most_one_retired_fork_server_waits_for_its_sessions():
    async def scenario() -> None:
        config = config_of(fork_server_lifetime={"max_uses": 1})
        async with unprobed_sandbox(config) as sandbox:
            kept = [await sandbox.open_session()]
            await until(lambda: len(fork_servers(others)) == 2)
            for _ in range(10):
                kept.append(await sandbox.open_session())
                assert len(fork_servers(others)) == 2

    others = children()
    asyncio.run(scenario())


def test_retired_fork_server_that_dies_is_an_infrastructure_error_of_its_sessions():
    async def scenario():
        config = config_of(fork_server_lifetime={"max_uses": 1})
        async with unprobed_sandbox(config) as sandbox:
            (worn,) = fork_servers(others)
            old = await sandbox.open_session()
            await old.run("x = 1")
            await until(lambda: len(fork_servers(others)) == 2)
            await _serves_until_it_has_moved(sandbox, worn)
            within = descendants(worn.pid)
            os.kill(worn.pid, signal.SIGKILL)
            await until(lambda: not any(map(is_running, within)))
            lost = await asyncio.wait_for(old.run("x"), 60)
            return lost, await old.run("'x' in globals()")

    others = children()
    lost, after = asyncio.run(scenario())
    assert lost.outcome is Outcome.INFRA_ERROR
    assert (after.outcome, after.value) == (Outcome.OK, "False")


# ---------------------------------------------------------------------- ready sessions


@ON_EACH_BACKEND
def test_session_gets_an_interpreter_that_is_ready_and_another_takes_its_place(backend: str):
    async def scenario() -> None:
        async with unprobed_sandbox(config_of(backend, ready_sessions=3)) as sandbox:
            values = set()
            for _ in range(5):
                await until(lambda: sandbox.num_ready_sessions == 3)
                living = {process.pid for process in descendants(os.getpid())}
                async with sandbox.session() as python:
                    assert python.pid in living
                    values.add((await python.run("import random; random.random()")).value)
                    files = await python.run("import os; os.listdir()")
                    assert files.value == "[]"
                    await python.run("open('left', 'w').close()")
            assert len(values) == 5  # none of them has another's random numbers

    others = children()
    asyncio.run(scenario())
    assert children() == others


def test_interpreter_that_died_while_it_was_ready_is_not_given_out():
    async def scenario():
        async with unprobed_sandbox(config_of(ready_sessions=2)) as sandbox:
            await until(lambda: sandbox.num_ready_sessions == 2)
            innermost = [each for each in descendants(os.getpid()) if each not in others][-2:]
            for interpreter in innermost:
                os.kill(interpreter.pid, signal.SIGKILL)
            await until(lambda: not any(map(is_running, innermost)))
            async with sandbox.session() as python:
                return await python.run("1")

    others = descendants(os.getpid())
    result = asyncio.run(scenario())
    assert (result.outcome, result.note) == (Outcome.OK, "")


def test_death_of_the_fork_server_ends_what_was_ready_and_the_next_is_served():
    async def scenario():
        async with unprobed_sandbox(config_of(ready_sessions=2)) as sandbox:
            await until(lambda: sandbox.num_ready_sessions == 2)
            (server,) = fork_servers(others)
            within = descendants(server.pid)
            os.kill(server.pid, signal.SIGKILL)
            await until(lambda: not any(map(is_running, within)))
            async with sandbox.session() as python:
                result = await python.run("1")
            await until(lambda: sandbox.num_ready_sessions == 2)
            return result

    others = children()
    result = asyncio.run(scenario())
    assert (result.outcome, result.note) == (Outcome.OK, "")


def test_restarted_session_takes_one_that_is_ready():
    async def scenario():
        async with (
            unprobed_sandbox(config_of(ready_sessions=1)) as sandbox,
            sandbox.session() as python,
        ):
            await until(lambda: sandbox.num_ready_sessions == 1)
            await python.run("x = 1; import os; os.abort()")
            living = {process.pid for process in descendants(os.getpid())}
            after = await python.run("'x' in globals()")
            return after, python.pid in living

    after, was_ready = asyncio.run(scenario())
    assert after.value == "False" and "restarted" in after.note and was_ready


def test_closed_sandbox_gives_out_no_sessions():
    async def scenario() -> None:
        async with unprobed_sandbox(config_of(ready_sessions=1)) as sandbox:
            pass
        with pytest.raises(SandboxError, match="the sandbox is closed"):
            await sandbox.open_session()

    others = children()
    asyncio.run(scenario())
    assert children() == others

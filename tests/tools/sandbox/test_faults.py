"""Faults around a call: it ends with a typed outcome in time, and the next one works."""

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.tools.sandbox.processes import Process, descendants
from tests.tools.sandbox.unprobed import unprobed_sandbox
from tir_alp.tools.sandbox import Limits, Outcome, SandboxConfig, SandboxError
from tir_alp.tools.sandbox.backends.namespaces import NamespacesJail

pytestmark = pytest.mark.sandbox

ON_EACH_BACKEND = pytest.mark.parametrize("backend", ["namespaces", "landlock"])
NUM_OF_JAIL = {"namespaces": 3, "landlock": 1}
SLACK_S = 60.0
"""Seconds that a loaded machine may add to a deadline."""
SLEEP = "import time; time.sleep(1); 'slept'"
Result = TypeVar("Result")


def config_of(backend: str, **settings: object) -> SandboxConfig:
    return SandboxConfig.model_validate({"backend": backend, "preload": (), **settings})


async def in_time(work: Awaitable[Result], deadline_s: float = 0.0) -> Result:
    """Wait for a result, whatever it is, within its deadline."""
    return await asyncio.wait_for(work, deadline_s + SLACK_S)


def jail_of(others: list[Process]) -> list[Process]:
    return [process for process in descendants(os.getpid()) if process not in others]


@ON_EACH_BACKEND
def test_fork_server_killed_during_births(backend: str):
    async def scenario() -> None:
        async with unprobed_sandbox(config_of(backend)) as sandbox:
            fork_server = jail_of(others)[NUM_OF_JAIL[backend] - 1]
            births = [asyncio.create_task(sandbox.open_session()) for _ in range(40)]
            await in_time(asyncio.wait(births, return_when=asyncio.FIRST_COMPLETED))
            os.kill(fork_server.pid, signal.SIGKILL)
            for birth in births:
                try:
                    session = await in_time(birth)
                except SandboxError:
                    continue
                result = await in_time(session.run("1"), 10)
                assert result.outcome in (Outcome.OK, Outcome.INFRA_ERROR), result
            async with sandbox.session() as python:
                assert (await in_time(python.run("6 * 7"), 10)).value == "42"

    others = descendants(os.getpid())
    asyncio.run(scenario())


@ON_EACH_BACKEND
def test_half_of_the_interpreters_killed_during_calls(backend: str):
    async def scenario() -> None:
        config = config_of(backend, memory_budget_mb=1 << 20)  # so that all run at once
        async with unprobed_sandbox(config) as sandbox:
            sessions = [await sandbox.open_session() for _ in range(20)]
            calls = [asyncio.create_task(session.run(SLEEP)) for session in sessions]
            await asyncio.sleep(0.1)
            victims = set(random.Random(0).sample(range(20), 10))
            for victim in victims:
                os.kill(sessions[victim].pid, signal.SIGKILL)
            for number, call in enumerate(calls):
                result = await in_time(call, 10)
                if number in victims:  # no program can send itself a SIGKILL: it is not to blame
                    assert result.outcome is Outcome.INFRA_ERROR, result
                    assert "killed from outside" in result.stderr
                else:
                    assert (result.outcome, result.value) == (Outcome.OK, "'slept'"), result
            after = [await in_time(session.run("1"), 10) for session in sessions]
            assert {result.outcome for result in after} == {Outcome.OK}
            assert [result.note != "" for result in after] == [n in victims for n in range(20)]

    asyncio.run(scenario())


@ON_EACH_BACKEND
def test_keeper_killed_during_a_call(backend: str):
    async def scenario() -> None:
        async with (
            unprobed_sandbox(config_of(backend)) as sandbox,
            sandbox.session() as python,
            sandbox.session() as neighbour,
        ):
            folder = await python.run("import os; os.path.dirname(os.getcwd())")
            await neighbour.run("x = 1")
            call = asyncio.create_task(python.run("import time; time.sleep(30)"))
            await asyncio.sleep(0.1)
            keeper = int(Path(f"/proc/{python.pid}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(keeper, signal.SIGKILL)
            result = await in_time(call, 30)
            assert result.outcome is Outcome.INFRA_ERROR, result
            assert (await in_time(python.run("2"), 10)).value == "2"
            assert (await in_time(neighbour.run("x"), 10)).value == "1"
            if backend == "landlock":  # the keeper could no longer remove its folder
                subprocess.run(["rm", "-r", (folder.value or "").strip("'")], check=True)

    asyncio.run(scenario())


@ON_EACH_BACKEND
def test_sockets_of_the_fork_server_cut_during_calls(backend: str):
    async def scenario() -> None:
        earlier = _open_files()
        async with (
            unprobed_sandbox(config_of(backend, ready_sessions=0)) as sandbox,
            sandbox.session() as busy,
            sandbox.session() as idle,
        ):
            await idle.run("x = 1")
            call = asyncio.create_task(busy.run("import time; time.sleep(30)"))
            await asyncio.sleep(0.1)
            _cut_sockets(_open_files() - earlier, socket.SOCK_SEQPACKET)
            result = await in_time(call, 30)
            assert result.outcome is Outcome.INFRA_ERROR, result
            result = await in_time(idle.run("x"), 10)
            assert result.outcome is Outcome.INFRA_ERROR, result
            for session in (busy, idle):
                assert (await in_time(session.run("6 * 7"), 10)).value == "42"

    asyncio.run(scenario())


@ON_EACH_BACKEND
def test_control_sockets_cut_during_calls(backend: str):
    async def scenario() -> None:
        async with unprobed_sandbox(config_of(backend, ready_sessions=0)) as sandbox:
            earlier = _open_files()
            sessions = [await sandbox.open_session() for _ in range(6)]
            calls = [asyncio.create_task(s.run("while True: pass")) for s in sessions]
            await asyncio.sleep(0.1)
            _cut_sockets(_open_files() - earlier, socket.SOCK_STREAM)
            for call in calls:
                result = await in_time(call, 10)
                assert result.outcome is Outcome.TOOL_ERROR, result
                assert "closed the sandbox's own channel" in result.stderr
            for session in sessions:
                assert (await in_time(session.run("6 * 7"), 10)).value == "42"

    asyncio.run(scenario())


def _open_files() -> set[tuple[int, str]]:
    """Descriptors and what they refer to; a number alone may soon refer to something else."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add((int(number), os.readlink(f"/proc/self/fd/{number}")))
    return found


def _cut_sockets(files: set[tuple[int, str]], kind: socket.SocketKind) -> None:
    for descriptor, name in files:
        if name.startswith("socket:"):
            with socket.socket(fileno=os.dup(descriptor)) as end:
                if end.type == kind:
                    end.shutdown(socket.SHUT_RDWR)


@ON_EACH_BACKEND
def test_full_folder_of_a_session(backend: str):
    async def scenario() -> None:
        config = config_of(backend, tmp_mb=4, limits={"wall_s": 20})
        async with unprobed_sandbox(config) as sandbox, sandbox.session() as python:
            fill = "while True: open(f'{len(os.listdir())}', 'wb').write(bytes(1 << 19))"
            full = await in_time(python.run(f"import os\n{fill}"), 20)
            assert full.outcome is Outcome.RESOURCE_LIMIT, full
            assert (await in_time(python.run("6 * 7"), 20)).value == "42"
            try:
                branch = await in_time(python.fork(), 20)
            except SandboxError:
                pass  # there was no space for a copy of the files
            else:
                assert (await in_time(branch.run("6 * 7"), 20)).value == "42"
                await branch.close()
            assert (await in_time(python.run("6 * 7"), 20)).value == "42"

    asyncio.run(scenario())


FULL_DISK = """
import asyncio, dataclasses, os, sys
from pathlib import Path
from tests.tools.sandbox.unprobed import unprobed_sandbox
from tir_alp.tools.sandbox import SandboxConfig, SandboxError

folder = Path(sys.argv[1])

def with_own_folder(jail):
    return dataclasses.replace(jail, environment=jail.environment | {"TMPDIR": str(folder)})

async def main():
    config = SandboxConfig(backend="landlock", preload=(), ready_sessions=0)
    async with asyncio.timeout(100), unprobed_sandbox(config, with_own_folder) as sandbox:
        session = await sandbox.open_session()
        names = [folder / str(number) for number in range(100)]
        for name in names:
            try:
                name.write_bytes(bytes(1 << 14))
            except OSError:
                break
        print((await session.run("6 * 7")).value)
        print((await session.run("open('f', 'wb').write(bytes(1 << 17))")).outcome)
        try:
            await sandbox.open_session()
        except SandboxError as error:
            print("No space left" in str(error))
        for name in names:
            name.unlink(missing_ok=True)
        print((await (await sandbox.open_session()).run("6 * 7")).value)
        print((await session.run("open('f', 'wb').write(bytes(1 << 17))")).value)

asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_full_disk_of_the_host(tmp_path: Path):
    tmp_path.chmod(0o755)
    mount = 'mount -t tmpfs -o size=1m,nr_inodes=40,mode=1777 none "$0" && exec "$@"'
    folder = str(tmp_path / "small")
    os.mkdir(folder)
    for parent in tmp_path.parents:
        if Path(tempfile.gettempdir()) in parent.parents:
            parent.chmod(0o755)  # for `nobody`
    program = [sys.executable, "-c", FULL_DISK, folder]
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, folder, *program],
        capture_output=True,
        text=True,
        timeout=120,
    )
    expected = "42\nresource_limit\nTrue\n42\n131072\n"
    assert (result.stdout, result.returncode) == (expected, 0), result.stderr


@ON_EACH_BACKEND
def test_wall_clock_that_jumps_moves_no_deadline(backend: str, monkeypatch: pytest.MonkeyPatch):
    jumps = random.Random(0)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jumps.uniform(-1e9, 1e9))

    async def scenario() -> None:
        async with unprobed_sandbox(config_of(backend)) as sandbox, sandbox.session() as python:
            for _ in range(5):
                assert (await in_time(python.run("6 * 7"), 10)).value == "42"
            endless = await in_time(python.run("while True: pass", Limits(wall_s=0.5)), 0.5)
            assert endless.outcome is Outcome.TOOL_TIMEOUT and 0.4 < endless.duration_s < SLACK_S

    asyncio.run(scenario())


@dataclasses.dataclass(frozen=True)
class FarInTime(NamespacesJail):
    """Its monotonic clock is eleven days ahead of the host's."""

    def command(self, requests_fd: int, obituaries_fd: int) -> list[str]:
        command = super().command(requests_fd, obituaries_fd)
        return ["unshare", "--time", "--monotonic", "1000000", "--boottime", "1000000", *command]


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a time namespace")
def test_monotonic_clock_that_differs_from_the_hosts_moves_no_deadline():
    def move(jail: NamespacesJail) -> FarInTime:
        fields = {f.name: getattr(jail, f.name) for f in dataclasses.fields(jail)}
        return FarInTime(**fields)

    async def scenario() -> None:
        config = config_of("namespaces")
        async with unprobed_sandbox(config, move) as sandbox, sandbox.session() as python:
            there = await python.run("import time; time.monotonic()")
            assert float(there.value or 0) > time.monotonic() + 900_000
            assert (await in_time(python.run("time.sleep(0.2); 'slept'"), 10)).value == "'slept'"
            endless = await in_time(python.run("while True: pass", Limits(wall_s=0.5)), 0.5)
            assert endless.outcome is Outcome.TOOL_TIMEOUT and 0.4 < endless.duration_s < SLACK_S
            busy = await in_time(python.run("while True: pass", Limits(wall_s=60, cpu_s=0.2)), 60)
            assert "processor time" in busy.stderr

    asyncio.run(scenario())

"""Births, copies and deaths: of interpreters, of the fork server, of the host."""

import asyncio
import dataclasses
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.sandbox.processes import descendants, is_running, wait_until
from tir_alp.tools.sandbox import (
    BlockingSession,
    Limits,
    Outcome,
    SandboxConfig,
    SandboxError,
    SandboxRefused,
    Session,
    create_sandbox,
)
from tir_alp.tools.sandbox.backends.landlock import PlainJail
from tir_alp.tools.sandbox.backends.namespaces import NamespacesJail
from tir_alp.tools.sandbox.sessions.local_sandbox import LocalSandbox

pytestmark = pytest.mark.sandbox

BARE = SandboxConfig(preload=())
ON_EACH_BACKEND = pytest.mark.parametrize("backend", ["namespaces", "landlock"])


def bare(backend: str) -> SandboxConfig:
    return SandboxConfig.model_validate({"backend": backend, "preload": ()})


def test_hundreds_of_sessions_are_born_at_once():
    async def population():
        async with create_sandbox(BARE) as sandbox:
            sessions = await asyncio.gather(*(sandbox.open_session() for _ in range(150)))
            return [(await session.run("6 * 7")).value for session in sessions]

    assert asyncio.run(population()) == ["42"] * 150


@pytest.mark.parametrize(
    ("crash", "reason"),
    [
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("import os; os.abort()", "SIG"),
        ("import os; os._exit(7)", "status 7"),
        ("import faulthandler; faulthandler._sigfpe()", "SIG"),
        ("import ctypes; ctypes.CDLL(None).exit(3)", "status 3"),
    ],
)
def test_crash_is_named_and_the_next_call_starts_afresh(
    python: BlockingSession, crash: str, reason: str
):
    python.run("x = 1")
    result = python.run(f"print('before')\n{crash}")
    assert (result.outcome, result.stdout) == (Outcome.TOOL_ERROR, "before\n")
    assert reason in result.stderr
    after = python.run("'x' in globals()")
    assert (after.outcome, after.value) == (Outcome.OK, "False")
    assert "restarted" in after.note


def test_crash_leaves_the_neighbour_alone(python: BlockingSession, neighbour: BlockingSession):
    neighbour.run("x = 1")
    python.run("import os; os.abort()")
    assert neighbour.run("x").value == "1"


def test_fork_is_an_independent_copy(python: BlockingSession):
    python.run("x = [1]")
    branch = python.fork()
    python.run("x.append(2)")
    branch.run("x.append(3)")
    assert python.run("x").value == "[1, 2]"
    assert branch.run("x").value == "[1, 3]"
    branch.close()


def test_fork_copies_the_files(python: BlockingSession):
    python.run("import os; os.mkdir('d'); os.chdir('d'); n = open('f', 'w').write('before')")
    branch = python.fork()
    branch.run("n = open('f', 'w').write('branch'); open('/tmp/new', 'w').close()")
    assert python.run("open('f').read(), os.listdir('/tmp')").value == "('before', ['d'])"
    assert branch.run("open('f').read()").value == "'branch'"
    branch.close()


def test_branch_outlives_its_parent(python: BlockingSession):
    python.run("x = 1")
    branch = python.fork()
    python.run("import os; os.abort()")
    assert branch.run("x").value == "1"
    python.close()
    assert branch.run("x").value == "1"
    branch.close()


def test_death_of_a_branch_leaves_its_parent_alone(python: BlockingSession):
    python.run("x = 1")
    branch = python.fork()
    assert branch.run("while True: pass", Limits(wall_s=0.2)).outcome is Outcome.TOOL_TIMEOUT
    assert "SIGSEGV" in branch.run("import ctypes; ctypes.string_at(0)").stderr
    branch.close()
    assert python.run("x").value == "1"


def test_branches_branch(python: BlockingSession):
    python.run("path = [0]")
    chain = [python]
    for depth in range(1, 6):
        chain.append(chain[-1].fork())
        chain[-1].run(f"path.append({depth})")
    chain[0].close()
    assert chain[-1].run("path").value == "[0, 1, 2, 3, 4, 5]"
    for session in chain[1:]:
        session.close()


def test_branches_are_confined_and_apart(python: BlockingSession):
    branch = python.fork()
    for attack in ("open('/etc/passwd')", "import os; os.fork()", "import os; os.kill(2, 9)"):
        assert branch.run(attack).outcome is Outcome.TOOL_ERROR
    assert branch.run("import os; os.getuid()").value == python.run("import os; os.getuid()").value
    branch.close()


def test_random_numbers_of_a_branch_differ(python: BlockingSession):
    python.run("import random")
    branch = python.fork()
    assert python.run("random.random()").value != branch.run("random.random()").value
    branch.close()


def test_dead_interpreter_cannot_be_forked(python: BlockingSession):
    python.run("import os; os.abort()")
    with pytest.raises(SandboxError, match="nothing left to fork"):
        python.fork()


@ON_EACH_BACKEND
def test_death_of_the_fork_server_is_an_infrastructure_error(backend: str):
    async def scenario():
        async with (
            create_sandbox(bare(backend)) as sandbox,
            sandbox.session() as busy,
            sandbox.session() as idle,
        ):
            await idle.run("x = 1")
            call = asyncio.create_task(busy.run("import time; time.sleep(30)"))
            await asyncio.sleep(0.2)
            mine = [process for process in descendants(os.getpid()) if process not in others]
            os.kill(mine[0].pid, signal.SIGKILL)  # my own child, and with it all of its own
            yield await asyncio.wait_for(call, 10)
            yield await idle.run("x")
            yield await idle.run("'x' in globals()")
            yield await busy.run("1")

    async def collect():
        return [result async for result in scenario()]

    others = set(descendants(os.getpid()))
    busy, idle, idle_again, busy_again = asyncio.run(collect())
    assert busy.outcome is Outcome.INFRA_ERROR
    assert idle.outcome is Outcome.INFRA_ERROR  # its variables are gone, and it is not to blame
    assert (idle_again.outcome, idle_again.value) == (Outcome.OK, "False")
    assert (busy_again.outcome, busy_again.value) == (Outcome.OK, "1")


@ON_EACH_BACKEND
def test_cancelled_call_costs_only_the_interpreter(backend: str):
    async def scenario():
        async with create_sandbox(bare(backend)) as sandbox, sandbox.session() as python:
            call = asyncio.create_task(python.run("while True: pass"))
            await asyncio.sleep(0.2)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            return await python.run("1")

    assert asyncio.run(scenario()).value == "1"


@ON_EACH_BACKEND
def test_nothing_is_left_when_the_sandbox_is_closed(backend: str):
    async def scenario() -> list[Path]:
        async with create_sandbox(bare(backend)) as sandbox:
            sessions = [await sandbox.open_session() for _ in range(5)]
            folders = [await _folder_of(session) for session in sessions]
            await sessions[0].fork()
            await sessions[1].run("import os; os.abort()")
            await sessions[2].run("while True: pass", Limits(wall_s=0.1))
            assert len(set(descendants(os.getpid())) - mine) > 8
            return folders

    gc.collect()  # closes what other tests left open now, and not during this one
    mine, files = set(descendants(os.getpid())), len(os.listdir("/proc/self/fd"))
    folders = asyncio.run(scenario())
    assert set(descendants(os.getpid())) == mine
    assert len(os.listdir("/proc/self/fd")) == files
    assert backend == "namespaces" or not any(folder.exists() for folder in folders)


@ON_EACH_BACKEND
def test_closed_sessions_leave_no_process_and_no_descriptor(backend: str):
    async def scenario() -> None:
        config = bare(backend)
        async with create_sandbox(config) as sandbox:
            assert isinstance(sandbox, LocalSandbox)
            counts = set()
            for _ in range(2):
                for _ in range(20):
                    async with sandbox.session() as python:
                        branch = await python.fork()
                        await branch.close()
                # A keeper ends a moment after its interpreter; ready sessions are made again.
                num_processes = num_others + NUM_PROCESSES[backend] + 2 * config.ready_sessions
                await _until(lambda: sandbox.num_ready_sessions == config.ready_sessions)
                await _until(lambda: len(descendants(os.getpid())) == num_processes)  # noqa: B023
                counts.add(len(os.listdir("/proc/self/fd")))
            assert len(counts) == 1

    num_others = len(descendants(os.getpid()))
    asyncio.run(scenario())


NUM_PROCESSES = {"namespaces": 3, "landlock": 1}
"""Processes of a jail without sessions: bubblewrap's two and the fork server."""


async def _folder_of(session: Session) -> Path:
    result = await session.run("import os; os.path.dirname(os.getcwd())")
    return Path((result.value or "").strip("'"))


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


@ON_EACH_BACKEND
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, None])
def test_end_of_the_host_is_the_end_of_the_jail(backend: str, end: signal.Signals | None):
    program = (
        f"backend = {backend!r}"
        + """
import signal, sys, threading
from tir_alp.tools.sandbox import SandboxConfig, shared_sandbox
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
session = shared_sandbox(SandboxConfig(backend=backend, preload=())).session()
branch = session.fork()
folder = session.run("import os; os.path.dirname(os.getcwd())").value
threading.Thread(target=branch.run, args=("while True: pass",), daemon=True).start()
threading.Thread(target=session.run, args=("while True: pass",), daemon=True).start()
print(folder, flush=True)
sys.stdin.read()
"""
    )
    host = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert host.stdin and host.stdout
    folder = Path(host.stdout.readline().decode().strip("'\n"))
    jailed = descendants(host.pid)
    assert len(jailed) >= 4
    if end is None:
        host.stdin.close()
    else:
        host.send_signal(end)
    host.wait(60)
    wait_until(lambda: not any(map(is_running, jailed)))
    assert backend == "namespaces" or not folder.exists()


Jail = NamespacesJail | PlainJail


def without_seccomp(jail: Jail) -> Jail:
    return _with_spec(jail, seccomp="")


def without_landlock(jail: Jail) -> Jail:
    return _with_spec(jail, landlock=False)


def without_network_namespace(jail: NamespacesJail) -> Jail:
    arguments = tuple(a for a in jail.arguments if a != "--unshare-net")
    return dataclasses.replace(jail, arguments=arguments)


def with_host_files(jail: Jail) -> Jail:
    if isinstance(jail, NamespacesJail):
        binds = tuple(b for b in (*jail.binds, ("/etc", "/etc")) if "ld.so" not in b[0])
        jail = dataclasses.replace(jail, binds=binds)
    return _with_spec(jail, readable=(*jail.spec.readable, "/etc"))


def with_secrets(jail: Jail) -> Jail:
    if isinstance(jail, NamespacesJail):
        return dataclasses.replace(jail, arguments=(*jail.arguments, "--setenv", "API_KEY", "x"))
    return dataclasses.replace(jail, environment=jail.environment | {"API_KEY": "x"})


def without_thread_count(jail: PlainJail) -> Jail:
    return dataclasses.replace(jail, max_threads=1000)


def without_rlimit(name: str) -> Callable[[Jail], Jail]:
    def alter(jail: Jail) -> Jail:
        limits = {k: v for k, v in jail.spec.rlimits.items() if k != name}
        return _with_spec(jail, rlimits=limits)

    return alter


def with_a_large_tmp(jail: Jail) -> Jail:
    return _with_spec(jail, scratch_mb=1000, scratch_files=100_000)


def _with_spec(jail: Jail, **changes: object) -> Jail:
    return dataclasses.replace(jail, spec=dataclasses.replace(jail.spec, **changes))


@pytest.mark.parametrize(
    ("backend", "weaken", "probe"),
    [
        *(
            (backend, weaken, probe)
            for backend in ("namespaces", "landlock")
            for weaken, probe in (
                (without_seccomp, "io_uring"),
                (without_landlock, "other files"),
                (with_host_files, "system files"),
                (with_secrets, "environment"),
                (without_rlimit("RLIMIT_AS"), "memory"),
                (without_rlimit("RLIMIT_NOFILE"), "open files"),
                (without_rlimit("RLIMIT_FSIZE"), "sparse files"),
                (with_a_large_tmp, "disk"),
            )
        ),
        ("namespaces", without_network_namespace, "net namespace"),
        ("namespaces", without_rlimit("RLIMIT_NPROC"), "threads"),
        ("landlock", without_thread_count, "threads"),
    ],
)
def test_weakened_sandbox_refuses_to_start(backend: str, weaken: Callable[..., Jail], probe: str):
    async def start():
        config = SandboxConfig.model_validate({"backend": backend, "preload": ()})
        async with create_sandbox(config, alter_jail=weaken):
            pass

    with pytest.raises(SandboxRefused, match=rf"[:;] {probe} \("):
        asyncio.run(start())


def test_auto_names_what_it_refused():
    def without_bubblewrap(jail: Jail) -> Jail:
        if isinstance(jail, NamespacesJail):
            return dataclasses.replace(jail, bwrap="/nonexistent/bwrap")
        return jail

    async def start():
        async with create_sandbox(BARE, alter_jail=without_bubblewrap) as sandbox:
            return sandbox.report

    report = asyncio.run(start())
    assert report.backend == "landlock"
    assert "/nonexistent/bwrap" in report.refused["namespaces"]


def test_auto_never_takes_the_unsafe_one():
    async def start():
        async with create_sandbox(BARE, alter_jail=without_seccomp):
            pass

    with pytest.raises(SandboxRefused, match=r"(?s)namespaces: .*io_uring.*landlock: .*io_uring"):
        asyncio.run(start())


def test_unsafe_warns_and_keeps_state_and_forks(capsys):
    async def scenario():
        config = SandboxConfig(backend="unsafe", preload=())
        async with create_sandbox(config) as sandbox, sandbox.session() as python:
            await python.run("x = 1; open('kept', 'w').write('text')")
            async with await python.fork() as branch:
                await branch.run("x += 1")
                copy = await branch.run("x, open('kept').read()")
            return sandbox.report, copy.value, (await python.run("x")).value

    report, copy, own = asyncio.run(scenario())
    assert (copy, own) == ("(2, 'text')", "1")
    assert "run as this user" in report.warnings[0]
    assert "run as this user" in capsys.readouterr().err


def test_module_that_is_not_installed_is_named():
    async def start():
        async with create_sandbox(SandboxConfig(preload=("no_such_module",))):
            pass

    with pytest.raises(SandboxRefused, match="no_such_module"):
        asyncio.run(start())

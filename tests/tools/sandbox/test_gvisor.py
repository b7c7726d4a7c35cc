"""Runtime `runsc` of backend `docker`: what differs if a container has a kernel of its own."""

import asyncio
import contextlib
import dataclasses
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import docker
import pytest

from tests.tools.sandbox.docker_engine import ContainerEngine
from tests.tools.sandbox.processes import wait_until
from tests.tools.sandbox.test_docker import IMAGE, containers, run_as_a_user_of
from tests.tools.sandbox.unprobed import unprobed_sandbox
from tir_alp.tools.sandbox import Limits, Outcome, SandboxConfig, SandboxRefused, create_sandbox
from tir_alp.tools.sandbox.backends.gvisor import GvisorJail
from tir_alp.tools.sandbox.jail.seal import Seal

pytestmark = pytest.mark.sandbox


@pytest.fixture(scope="module")
def address(container_engine: ContainerEngine) -> str:
    if "runsc" not in container_engine.runtimes:
        pytest.skip("no gVisor: runsc is not installed, and cannot be")
    return container_engine.address


def config(address: str, **settings: object) -> SandboxConfig:
    settings = {"runtime": "runsc", "container_per": "session"} | settings
    return SandboxConfig.model_validate(
        {
            "backend": "docker",
            "docker": {"address": address, "image": IMAGE, **settings},
            **{"preload": (), "memory_mb": 512, "tmp_mb": 8, "tmp_files": 64, "max_processes": 16},
            "ready_sessions": 0,
        }
    )


def test_it_passes_its_probes_and_leaves_nothing(address: str):
    async def scenario():
        before = len(os.listdir("/proc/self/fd"))
        async with create_sandbox(config(address)) as sandbox, sandbox.session() as python:
            uname = (await python.run("import os; os.uname().version")).value
        return uname, before, len(os.listdir("/proc/self/fd"))

    gc.collect()  # closes what other tests left open now, and not during this one
    old = containers(address)
    uname, before, after = asyncio.run(scenario())
    assert uname is not None and uname.strip("'") != os.uname().version
    assert (before, containers(address)) == (after, old)


def test_sessions_keep_state_and_branches_outlive_their_parent(address: str):
    async def scenario():
        async with unprobed_sandbox(config(address)) as sandbox:
            one, two = await sandbox.open_session(), await sandbox.open_session()
            await one.run("x = [1]; n = open('kept', 'w').write('text')")
            branch, short = await one.fork(), await one.fork()
            await short.close()
            await one.run("x.append(2)")
            assert (await branch.run("x, open('kept').read()")).value == "([1], 'text')"
            assert (await two.run("'x' in globals()")).value == "False"
            await one.close()
            assert (await branch.run("x.append(3); x, open('kept').read()")).value == (
                "([1, 3], 'text')"
            )
            own = len(containers(address)) - before
            await branch.close()
            return own, len(containers(address)) - before

    before = len(containers(address))
    assert asyncio.run(scenario()) == (2, 1)


def test_ends_are_typed_and_lost_sessions_rebuilt(address: str):
    async def scenario():
        async with (
            unprobed_sandbox(config(address)) as sandbox,
            sandbox.session() as python,
            await python.fork() as branch,
        ):
            crash = await python.run("print('before')\nimport ctypes; ctypes.string_at(0)")
            assert (crash.outcome, crash.stdout) == (Outcome.TOOL_ERROR, "before\n")
            assert "SIGSEGV" in crash.stderr
            endless = await branch.run("while True: pass", Limits(wall_s=0.5))
            assert endless.outcome is Outcome.TOOL_TIMEOUT
            assert (await branch.run("1")).note
            limits = Limits(wall_s=30, cpu_s=0.3)
            busy = await python.run("while True: pass", limits)
            assert busy.outcome is Outcome.TOOL_TIMEOUT and busy.cpu_s >= 0.3
            hungry = await python.run("x = bytearray(1 << 30)")
            assert (hungry.outcome, hungry.value) == (Outcome.RESOURCE_LIMIT, None)
            flood = await python.run("while True: print('x' * 1000)", Limits(output_bytes=10_000))
            assert flood.outcome is Outcome.RESOURCE_LIMIT
            assert (await python.run("'x' in globals()")).value == "False"

    asyncio.run(scenario())


COPIES = """
import ctypes, time
libc = ctypes.CDLL(None)
libc.syscall.restype = ctypes.c_long
for i in range(100):
    if libc.syscall(*map(ctypes.c_long, (56, 0x8000 | 17, 0, 0, 0, 0))) == 0:
        time.sleep(60)
time.sleep(20)
"""
FORGED = "import os; os.write(os.open('/proc/1/fd/1', os.O_WRONLY), b'\\0\\0\\0\\2{}')"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86-64")
def test_programs_that_copy_themselves_are_ended_by_the_keeper(address: str):
    async def scenario():
        async with unprobed_sandbox(config(address)) as sandbox, sandbox.session() as python:
            result = await python.run(COPIES, Limits(wall_s=60))
            assert result.outcome is Outcome.RESOURCE_LIMIT and "threads" in result.stderr
            assert (await python.run("1")).value == "1"

    asyncio.run(scenario())


def test_stream_of_the_guest_cannot_be_forged_by_a_program(address: str):
    async def scenario():
        async with unprobed_sandbox(config(address)) as sandbox, sandbox.session() as python:
            forged = await python.run(FORGED)
            assert forged.outcome is Outcome.TOOL_ERROR and "own channel" in forged.stderr
            assert (await python.run("1")).value == "1"

    asyncio.run(scenario())


def test_a_seal_is_of_one_key_one_sender_and_one_place():
    ours, theirs = Seal(b"key", "guest"), Seal(b"key", "guest")
    frames = [dict(_frame(ours.close({"n": n}))) for n in range(2)]
    assert theirs.open(frames[0]) == {"n": 0}
    for forged in (frames[0], {"body": "{}", "mac": "0"}, {"n": 1}):
        with pytest.raises(ValueError, match="seal"):
            Seal(b"key", "host").open(forged)
    with pytest.raises(ValueError, match="another's seal"):
        theirs.open(frames[0])  # a second time


def _frame(data: bytes) -> dict:
    from tir_alp.tools.sandbox.jail.frames import FrameReader

    (frame,) = FrameReader(1 << 20).feed(data)
    return frame


def test_container_killed_from_outside_is_an_infrastructure_error(address: str):
    async def scenario():
        async with unprobed_sandbox(config(address)) as sandbox, sandbox.session() as python:
            await python.run("x = 1")
            with contextlib.closing(docker.DockerClient(base_url=address)) as client:
                for container in set(containers(address)) - old:
                    client.api.kill(container)
            lost = await asyncio.wait_for(python.run("x"), 60)
            assert lost.outcome is Outcome.INFRA_ERROR
            assert (await python.run("'x' in globals()")).value == "False"

    old = set(containers(address))
    asyncio.run(scenario())


def test_killed_host_leaves_no_container(address: str):
    program = """
import asyncio, sys
from tests.tools.sandbox.unprobed import unprobed_sandbox
from tir_alp.tools.sandbox import SandboxConfig
async def main():
    async with unprobed_sandbox(SandboxConfig.model_validate_json(sys.argv[1])) as sandbox:
        session = await sandbox.open_session()
        print("up", flush=True)
        await session.run("while True: pass")
asyncio.run(main())
"""
    old = set(containers(address))
    host = subprocess.Popen(
        [sys.executable, "-c", program, config(address).model_dump_json()], stdout=subprocess.PIPE
    )
    assert host.stdout and host.stdout.readline() == b"up\n"
    assert set(containers(address)) - old
    host.send_signal(signal.SIGKILL)
    host.wait()
    host.stdout.close()
    wait_until(lambda: set(containers(address)) <= old)


def test_sandbox_of_an_ordinary_user(container_engine: ContainerEngine, address: str):
    assert run_as_a_user_of(container_engine, config(address)) == ("1001\n", "")


# --------------------------------------------------------------------------------- refusals


def refusal(chosen: SandboxConfig, weaken: Callable[..., GvisorJail] | None = None) -> str:
    async def start():
        async with create_sandbox(chosen, alter_jail=weaken):
            pass

    with pytest.raises(SandboxRefused) as refused:
        asyncio.run(start())
    return str(refused.value)


def test_many_sessions_in_one_container_are_refused(address: str):
    assert 'container_per = "session"' in refusal(config(address, container_per="sandbox"))


def with_options(**options: object) -> Callable[[GvisorJail], GvisorJail]:
    return lambda jail: dataclasses.replace(jail, options=jail.options | options)


def with_spec(**changes: object) -> Callable[[GvisorJail], GvisorJail]:
    return lambda jail: dataclasses.replace(jail, spec=dataclasses.replace(jail.spec, **changes))


def without_rlimit(name: str) -> Callable[[GvisorJail], GvisorJail]:
    def alter(jail: GvisorJail) -> GvisorJail:
        limits = {k: v for k, v in jail.spec.rlimits.items() if k != name}
        return with_spec(rlimits=limits)(jail)

    return alter


def with_secrets(jail: GvisorJail) -> GvisorJail:
    return dataclasses.replace(jail, environment=jail.environment | {"API_KEY": "x"})


WEAKENED = {
    "the host's kernel": (with_options(runtime="runc"), "container's kernel"),
    "root": (with_options(user="0:0"), "container's user"),
    "writable image": (with_options(read_only=False), "container's root file system"),
    "memory": (with_options(mem_limit=None, memswap_limit=None), "container's memory"),
    "processes": (with_options(pids_limit=None), "container's processes"),
    "no seccomp": (with_spec(seccomp=""), "unix sockets"),
    "environment": (with_secrets, "environment"),
    "RLIMIT_AS": (without_rlimit("RLIMIT_AS"), "memory"),
    "RLIMIT_NOFILE": (without_rlimit("RLIMIT_NOFILE"), "open files"),
    "number of files": (with_spec(scratch_files=100_000), "files"),
    "threads": (with_spec(max_threads=1000), "threads"),
}


@pytest.mark.parametrize(("weaken", "probe"), WEAKENED.values(), ids=WEAKENED)
def test_weakened_container_refuses_to_start(
    address: str, weaken: Callable[..., GvisorJail], probe: str
):
    assert f" {probe}" in refusal(config(address), weaken)

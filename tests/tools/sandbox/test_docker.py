"""Backend `docker`: what differs from a fork server that is a child of the host."""

import asyncio
import contextlib
import dataclasses
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml
from docker.errors import NotFound

from tests.tools.sandbox.docker_engine import (
    BASE_IMAGE,
    ContainerEngine,
    ContainerEngineUnavailable,
    build_sandbox_image,
    docker_engine,
    leftovers,
    make_base_image,
)
from tests.tools.sandbox.ordinary_user import run_python_as_user
from tests.tools.sandbox.processes import wait_until
from tir_alp.tools.sandbox import (
    Limits,
    Outcome,
    SandboxConfig,
    SandboxRefused,
    create_sandbox,
)
from tir_alp.tools.sandbox.backends.container_profile import write_profiles
from tir_alp.tools.sandbox.backends.docker import ContainerJail, RunningContainer

pytestmark = pytest.mark.sandbox

IMAGE = "tir-alp-sandbox:test"
IN_BOTH_MODES = pytest.mark.parametrize("container_per", ["sandbox", "session"])
REPOSITORY = Path(__file__).parents[3]


def config(address: str, **settings: object) -> SandboxConfig:
    settings = {"address": address, "image": IMAGE} | settings
    small = {"preload": (), "memory_mb": 512, "tmp_mb": 8, "tmp_files": 64, "max_processes": 16}
    # Containers are counted, and ready sessions would be more of them.
    small |= {"ready_sessions": 0}
    return SandboxConfig.model_validate({"backend": "docker", "docker": settings, **small})


@IN_BOTH_MODES
def test_ready_sessions_are_used_and_end_with_the_sandbox(engine_address: str, container_per: str):
    ready = config(engine_address, container_per=container_per)
    ready = ready.model_copy(update={"ready_sessions": 1})

    async def scenario():
        async with create_sandbox(ready) as sandbox:
            for _ in range(3):
                async with sandbox.session() as python:
                    yield await python.run("'x' in globals()")
                    await python.run("x = 1")

    async def collect():
        return [result.value async for result in scenario()]

    before = containers(engine_address)
    assert asyncio.run(collect()) == ["False"] * 3
    assert containers(engine_address) == before


def containers(address: str) -> dict[str, int]:
    """Id of each container -> pid of its fork server, as the host numbers it."""
    client = docker.DockerClient(base_url=address)
    found = {}
    for container in client.api.containers(all=True):
        with contextlib.suppress(NotFound):  # it has been removed meanwhile
            detail = client.api.inspect_container(container["Id"])
            found[detail["Id"]] = detail["State"]["Pid"]
    client.close()
    return found


@IN_BOTH_MODES
def test_sessions_keep_state_and_branch(engine_address: str, container_per: str):
    async def scenario():
        async with (
            create_sandbox(config(engine_address, container_per=container_per)) as sandbox,
            sandbox.session() as one,
            sandbox.session() as two,
        ):
            await one.run("x = [1]; n = open('kept', 'w').write('text')")
            branch = await one.fork()
            await one.run("x.append(2)")
            assert (await branch.run("x, open('kept').read()")).value == "([1], 'text')"
            assert (await two.run("'x' in globals()")).value == "False"
            assert (await one.run("import numpy; int(numpy.ones(3).sum())")).value == "3"
            num_containers = len(containers(engine_address)) - before
            await one.close()
            assert (await branch.run("x")).value == "[1]"
            return num_containers

    before = len(containers(engine_address))
    assert asyncio.run(scenario()) == (1 if container_per == "sandbox" else 2)


@IN_BOTH_MODES
def test_crashes_and_timeouts_are_typed_and_rebuilt(engine_address: str, container_per: str):
    async def scenario():
        async with (
            create_sandbox(config(engine_address, container_per=container_per)) as sandbox,
            sandbox.session() as python,
        ):
            crash = await python.run("print('before')\nimport ctypes; ctypes.string_at(0)")
            assert (crash.outcome, crash.stdout) == (Outcome.TOOL_ERROR, "before\n")
            assert "SIGSEGV" in crash.stderr
            endless = await python.run("x = 1\nwhile True: pass", Limits(wall_s=0.5))
            assert endless.outcome is Outcome.TOOL_TIMEOUT and endless.cpu_s > 0.05
            after = await python.run("'x' in globals()")
            assert (after.value, after.note != "") == ("False", True)
            hungry = await python.run("x = bytearray(1 << 30)")
            assert hungry.outcome is Outcome.RESOURCE_LIMIT

    asyncio.run(scenario())


@IN_BOTH_MODES
def test_nothing_is_left_when_the_sandbox_is_closed(
    engine_address: str, container_per: str, tmp_path: Path, monkeypatch
):
    async def scenario() -> tuple[int, int]:
        before = len(os.listdir("/proc/self/fd"))
        chosen = config(engine_address, container_per=container_per)
        async with create_sandbox(chosen) as sandbox:
            sessions = [await sandbox.open_session() for _ in range(3)]
            await sessions[0].fork()
            await sessions[1].run("import os; os.abort()")
            await sessions[2].run("while True: pass", Limits(wall_s=0.1))
        return before, len(os.listdir("/proc/self/fd"))

    tmp_path.chmod(0o711)  # the container's user goes through it
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gc.collect()  # closes what other tests left open now, and not during this one
    old = containers(engine_address)
    before, after = asyncio.run(scenario())
    assert containers(engine_address) == old
    assert before == after
    assert list(tmp_path.iterdir()) == []


def test_container_of_a_session_ends_with_the_last_of_its_branches(engine_address: str):
    async def scenario():
        async with create_sandbox(config(engine_address, container_per="session")) as sandbox:
            python = await sandbox.open_session()
            branch = await python.fork()
            own = set(containers(engine_address)) - old
            assert len(own) == 1
            await python.close()
            assert own <= set(containers(engine_address))
            await branch.close()
            await asyncio.to_thread(wait_until, lambda: not own & set(containers(engine_address)))

    old = set(containers(engine_address))
    asyncio.run(scenario())


@IN_BOTH_MODES
def test_death_of_a_container_is_an_infrastructure_error(engine_address: str, container_per: str):
    async def scenario():
        chosen = config(engine_address, container_per=container_per)
        async with create_sandbox(chosen) as sandbox, sandbox.session() as python:
            await python.run("x = 1")
            for container in set(containers(engine_address)) - old:
                client = docker.DockerClient(base_url=engine_address)
                client.api.kill(container)
                client.close()
            lost = await asyncio.wait_for(python.run("x"), 20)
            assert lost.outcome is Outcome.INFRA_ERROR
            assert (await python.run("'x' in globals()")).value == "False"

    old = set(containers(engine_address))
    asyncio.run(scenario())


@IN_BOTH_MODES
def test_killed_host_leaves_no_container(engine_address: str, container_per: str):
    program = """
import sys, threading
from tir_alp.tools.sandbox import SandboxConfig, shared_sandbox
session = shared_sandbox(SandboxConfig.model_validate_json(sys.argv[1])).session()
branch = session.fork()
threading.Thread(target=branch.run, args=("while True: pass",), daemon=True).start()
threading.Thread(target=session.run, args=("while True: pass",), daemon=True).start()
print("up", flush=True)
sys.stdin.read()
"""
    old = set(containers(engine_address))
    chosen = config(engine_address, container_per=container_per)
    host = subprocess.Popen(
        [sys.executable, "-c", program, chosen.model_dump_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert host.stdin and host.stdout and host.stdout.readline() == b"up\n"
    assert set(containers(engine_address)) - old
    host.send_signal(signal.SIGKILL)
    host.wait()
    host.stdin.close()
    host.stdout.close()
    wait_until(lambda: set(containers(engine_address)) <= old)


# --------------------------------------------------------------------------------- refusals


def refusal(chosen: SandboxConfig, weaken: Callable[..., ContainerJail] | None = None) -> str:
    async def start():
        async with create_sandbox(chosen, alter_jail=weaken):
            pass

    with pytest.raises(SandboxRefused) as refused:
        asyncio.run(start())
    return str(refused.value)


def test_engine_of_another_machine_is_refused(monkeypatch):
    assert "'remote'" in refusal(config("tcp://10.0.0.7:2375"))
    monkeypatch.setenv("DOCKER_HOST", "ssh://somebody@10.0.0.7")
    assert "'ssh://somebody@10.0.0.7'" in refusal(SandboxConfig(backend="docker"))


def test_engine_that_does_not_answer_is_refused(tmp_path: Path):
    message = refusal(config(f"unix://{tmp_path}/none.sock"))
    assert f"no container engine answers at unix://{tmp_path}/none.sock" in message
    assert "DOCKER_HOST" in message


def test_engine_that_dies_later_is_a_failure_of_the_sandbox(engine_address: str, tmp_path: Path):
    def with_dead_engine(jail: ContainerJail) -> ContainerJail:
        return dataclasses.replace(jail, address=address)

    address = f"unix://{tmp_path}/none.sock"
    message = refusal(config(engine_address), with_dead_engine)
    assert "the container does not start" in message
    asyncio.run(RunningContainer(address, "any").end())  # nothing to do, and no error


def test_missing_sdk_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "docker.errors", None)
    assert "pip install 'tir_alp[docker]'" in refusal(config("unix:///any"))


def test_missing_image_is_refused_with_the_command_that_builds_it(engine_address: str):
    message = refusal(config(engine_address, image="no-such-image"))
    assert "--target sandbox -t no-such-image" in message


def test_image_of_something_else_is_refused(engine_address: str):
    message = refusal(config(engine_address, image=BASE_IMAGE))
    assert "docker/sandbox.Dockerfile" in message


def test_image_of_another_version_is_refused(container_engine: ContainerEngine):
    lines = (f"FROM {IMAGE}", "USER 0", "RUN echo '# changed' >> /sandbox/jail/spec.py")
    client = container_engine.client()
    client.images.build(
        fileobj=io.BytesIO("\n".join(lines).encode()), tag="old:test", network_mode="none"
    )
    client.close()
    assert "build it again" in refusal(config(container_engine.address, image="old:test"))


def test_unknown_runtime_is_refused(engine_address: str):
    message = refusal(config(engine_address, runtime="no-such-runtime"))
    assert "no runtime 'no-such-runtime'" in message and "runc" in message


def test_module_that_the_image_lacks_is_named(engine_address: str):
    chosen = config(engine_address).model_copy(update={"preload": ("no_such_module",)})
    assert "no_such_module" in refusal(chosen)


def with_options(**options: object) -> Callable[[ContainerJail], ContainerJail]:
    def alter(jail: ContainerJail) -> ContainerJail:
        return dataclasses.replace(jail, options=jail.options | options)

    return alter


def with_spec(**changes: object) -> Callable[[ContainerJail], ContainerJail]:
    def alter(jail: ContainerJail) -> ContainerJail:
        return dataclasses.replace(jail, spec=dataclasses.replace(jail.spec, **changes))

    return alter


def without_rlimit(name: str) -> Callable[[ContainerJail], ContainerJail]:
    def alter(jail: ContainerJail) -> ContainerJail:
        limits = {k: v for k, v in jail.spec.rlimits.items() if k != name}
        return with_spec(rlimits=limits)(jail)

    return alter


def with_secrets(jail: ContainerJail) -> ContainerJail:
    return dataclasses.replace(jail, environment=jail.environment | {"API_KEY": "x"})


def without_thread_count(jail: ContainerJail) -> ContainerJail:
    return dataclasses.replace(jail, max_threads=1000)


WEAKENED = {
    "network": (with_options(network_mode="host"), "net namespace"),
    "pids": (with_options(pid_mode="host"), "pid namespace"),
    "host names": (with_options(network_mode="host", hostname=None, uts_mode="host"), "uts names"),
    "default profile": (with_options(security_opt=["no-new-privileges"]), "container's network"),
    "no profile": (
        with_options(security_opt=["no-new-privileges", "seccomp=unconfined"]),
        "container's io_uring",
    ),
    "gain of privileges": (
        with_options(security_opt=["seccomp=unconfined"]),
        "container's privileges",
    ),
    "capabilities": (with_options(cap_drop=["NET_RAW"]), "container's capabilities"),
    "root": (with_options(user="0:0"), "container's user"),
    "writable image": (with_options(read_only=False), "container's root file system"),
    "memory": (with_options(mem_limit=None, memswap_limit=None), "container's memory"),
    "processes": (with_options(pids_limit=None), "container's processes"),
    "no seccomp": (with_spec(seccomp=""), "unix sockets"),
    "no Landlock": (with_spec(landlock=False), "other files"),
    "files": (with_spec(readable=("/",)), "other files"),
    "environment": (with_secrets, "environment"),
    "RLIMIT_AS": (without_rlimit("RLIMIT_AS"), "memory"),
    "RLIMIT_NOFILE": (without_rlimit("RLIMIT_NOFILE"), "open files"),
    "disk": (with_spec(scratch_mb=1000, scratch_files=100_000), "disk"),
    "threads": (without_thread_count, "threads"),
}


@pytest.mark.parametrize(("weaken", "probe"), WEAKENED.values(), ids=WEAKENED)
def test_weakened_container_refuses_to_start(
    engine_address: str, weaken: Callable[..., ContainerJail], probe: str
):
    assert f" {probe}" in refusal(config(engine_address), weaken)


# --------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("name", ["seccomp.json", "seccomp-service.json"])
def test_profiles_are_those_of_the_code(name: str, tmp_path: Path):
    write_profiles(tmp_path)
    assert (REPOSITORY / "docker" / name).read_text() == (tmp_path / name).read_text()


def test_profile_allows_what_a_session_may_call_and_no_way_out():
    rules = json.loads((REPOSITORY / "docker" / "seccomp.json").read_text())["syscalls"]
    allowed = {n for r in rules if r["action"] == "SCMP_ACT_ALLOW" for n in r["names"]}
    assert {"openat", "mmap", "futex", "seccomp", "landlock_restrict_self"} <= allowed
    assert not allowed & {"mount", "unshare", "setns", "ptrace", "bpf", "io_uring_setup"}
    assert not allowed & {"keyctl", "userfaultfd", "memfd_create", "bind", "clone3", "shmget"}
    families = [r["args"][0]["value"] for r in rules if r["names"] == ["socket"]]
    assert families == [1]  # AF_UNIX


AS_A_USER = """
import asyncio, os, sys
from tir_alp.tools.sandbox import SandboxConfig, create_sandbox
async def main():
    async with create_sandbox(SandboxConfig.model_validate_json(sys.argv[1])) as sandbox:
        async with sandbox.session() as python:
            branch = await python.fork()
            await branch.close()
            print((await python.run("import os; os.getuid()")).value)
asyncio.run(main())
"""


@contextlib.contextmanager
def open_to_users(container_engine: ContainerEngine) -> Iterator[None]:
    """Within the block, the engine accepts everybody as a member of its group."""
    socket_path = Path(container_engine.address.removeprefix("unix://"))
    socket_path.chmod(0o666)
    try:
        yield
    finally:
        socket_path.chmod(0o660)


def run_as_a_user_of(container_engine: ContainerEngine, chosen: SandboxConfig) -> tuple[str, str]:
    """Output of a program that a member of the engine's group runs."""
    with open_to_users(container_engine):
        result = run_python_as_user("-c", AS_A_USER, chosen.model_dump_json())
    return result.stdout, result.stderr


@IN_BOTH_MODES
def test_sandbox_of_an_ordinary_user(container_engine: ContainerEngine, container_per: str):
    chosen = config(container_engine.address, container_per=container_per)
    assert run_as_a_user_of(container_engine, chosen) == ("1001\n", "")


@pytest.mark.timeout(900)
@pytest.mark.skipif(os.geteuid() != 0, reason="the suite runs as an ordinary user already")
def test_no_program_escapes_from_containers_of_an_ordinary_user(container_engine: ContainerEngine):
    suite = str(Path(__file__).parent / "escape")
    pytest_command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "docker", suite]
    with open_to_users(container_engine):
        result = run_python_as_user(*pytest_command, engine=container_engine.address, timeout_s=800)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


ASK_THE_SERVICE = """
import json, urllib.request
headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
body = json.dumps({"code": "print(6 * 7)"}).encode()
request = urllib.request.Request("http://127.0.0.1:8080/v1/run", body, headers)
print(json.load(urllib.request.urlopen(request))["stdout"])
"""


@contextlib.contextmanager
def composed(container_engine: ContainerEngine, image: str, folder: Path) -> Iterator[Any]:
    """The container of the compose file, without a network, so that no port is published."""
    service = {"image": image, "network_mode": "none"}
    own = folder / "own.yaml"
    own.write_text(yaml.safe_dump({"version": "3.9", "services": {"sandbox": service}}))
    command = ["docker-compose", "-p", "tir-alp-test", "-f", "compose.yaml", "-f", str(own)]
    environment = os.environ | {
        "DOCKER_HOST": container_engine.address,
        "TIR_ALP_SANDBOX_TOKEN": "secret",
    }

    def compose(*arguments: str) -> None:
        done = subprocess.run(
            [*command, *arguments],
            cwd=REPOSITORY / "docker",
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    with contextlib.closing(container_engine.client()) as client:
        try:
            compose("up", "--detach", "--no-build")
            label = "com.docker.compose.project=tir-alp-test"
            (container,) = client.containers.list(all=True, filters={"label": label})
            yield container
        finally:
            compose("down", "--timeout", "30")


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="docker-compose is not installed")
def test_service_of_the_compose_file_answers(container_engine: ContainerEngine, tmp_path: Path):
    try:
        image = build_sandbox_image(container_engine, "service")
    except ContainerEngineUnavailable as error:
        pytest.skip(str(error))

    def is_healthy() -> bool:
        container.reload()
        return container.attrs["State"]["Health"]["Status"] == "healthy"

    with composed(container_engine, image, tmp_path) as container:
        try:
            wait_until(is_healthy, within_s=120)
        except AssertionError as error:
            raise AssertionError(container.logs().decode()) from error
        output = container.exec_run(["python3", "-c", ASK_THE_SERVICE]).output.decode()
        assert output.strip() == "42", output


def test_engine_leaves_nothing(container_engine: ContainerEngine):
    with docker_engine() as other:
        make_base_image(other, container_engine.folder / "base.tar")
        client = other.client()
        client.containers.run(BASE_IMAGE, ["sleep", "1000"], network_mode="none", detach=True)
        client.close()
        assert {what.split()[0] for what in leftovers(other)} >= {"process", "mount", "control"}
    assert leftovers(other) == []

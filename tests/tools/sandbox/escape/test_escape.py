"""Every program of `programs.toml`, on every backend that can run here.

After each program, a neighbour still has its variables, nothing has touched the host's canaries,
and the session answers its next call. `test_user.py` runs all of this again as an ordinary user.
"""

import os
import re
import select
import socket
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.tools.sandbox.ordinary_user import LENT_ENGINE
from tests.tools.sandbox.processes import wait_until
from tir_alp.tools.sandbox import (
    BlockingSandbox,
    BlockingSession,
    Limits,
    Outcome,
    RunResult,
    SandboxConfig,
)

pytestmark = pytest.mark.sandbox

PROGRAMS = tomllib.loads((Path(__file__).parent / "programs.toml").read_text())
CONTAINER_PER_SESSION = "docker, one container per session"
KERNEL_PER_SESSION = "docker, gVisor"
BACKENDS = ("namespaces", "landlock", "docker", CONTAINER_PER_SESSION, KERNEL_PER_SESSION)
COUNTS_LATE = (CONTAINER_PER_SESSION, KERNEL_PER_SESSION)
"""A program can meet a limit of the container before its keeper counts its files (in gVisor, its
threads), and then a later call finds the session ended."""
OWN_IN_GVISOR = {
    *("network of the kernel's files", "hosts", "environ of init", "environ of self"),
    *("command line of init", "mounts", "maps", "descriptors in proc", "processes", "sys"),
    *("terminal", "fuse", "tun", "devices", "listing of /", "leaving by a symlink to a folder"),
}
"""Programs that see something in gVisor, though nothing of the host: files of the image and of the
container's own kernel."""
DENIAL = re.compile(
    r"Errno (1|2|13|18|30|38)\]|PermissionError|Operation not permitted|BrokenProcessPool"
)
A_BRANCH = PROGRAMS["denied_system_calls"]["clone like the sandbox, without"]
X86_64 = os.uname().machine == "x86_64"

PRELUDE = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def syscall(*arguments):
    if libc.syscall(*map(ctypes.c_long, arguments)) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
mark = 1
"""


@dataclass
class World:
    """A backend with two sessions, and the host's canaries."""

    sandbox: BlockingSandbox
    neighbour: BlockingSession
    facts: str
    canaries: list[socket.socket]
    backend: str
    session: BlockingSession | None = None
    is_fresh: bool = False
    """Whether no program has run in the session's present interpreter."""
    count: int = field(default=0)

    def open_session(self) -> BlockingSession:
        """A session for any number of programs that do no harm."""
        session, self.is_fresh = self._session(), False
        return session

    def fresh_session(self) -> BlockingSession:
        """A session for one program."""
        if self.session is not None and self.is_fresh:
            self._prepare(self.session)
        else:
            self.drop_session()
        return self.open_session()

    def answers(self) -> bool:
        """Whether the session answers, with the same interpreter or another one."""
        result = self._session().run("20 + 1")
        self.is_fresh = self.is_fresh or result.note != ""
        return result.value == "21"

    def _session(self) -> BlockingSession:
        if self.session is None:
            self.session = self.sandbox.session()
            self._prepare(self.session)
        return self.session

    def _prepare(self, session: BlockingSession) -> None:
        assert session.run(PRELUDE + self.facts).outcome is Outcome.OK
        self.is_fresh = True

    def drop_session(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None

    def check(self) -> None:
        self.count += 1
        assert self.neighbour.run("count += 1; count").value == str(self.count)
        touched, _, _ = select.select(self.canaries, [], [], 0)
        assert not touched, "a canary of the host was reached"


def _gvisor(request: pytest.FixtureRequest) -> str:
    if os.environ.get(LENT_ENGINE):
        pytest.skip(
            "gVisor is tested by the owner of the engine only: one kernel per session takes long"
        )
    if "runsc" not in request.getfixturevalue("container_engine").runtimes:
        pytest.skip("no gVisor: runsc is not installed, and cannot be")
    return "runsc"


def config_of(backend: str, request: pytest.FixtureRequest) -> SandboxConfig:
    docker = {}
    if "docker" in backend:
        docker = {
            "address": request.getfixturevalue("engine_address"),
            "image": "tir-alp-sandbox:test",
            "container_per": "sandbox" if backend == "docker" else "session",
            "runtime": _gvisor(request) if backend == KERNEL_PER_SESSION else None,
        }
    return SandboxConfig.model_validate(
        {
            "backend": backend.partition(",")[0],
            "docker": docker,
            "preload": (),
            "memory_mb": 512,
            "tmp_mb": 8,
            "tmp_files": 64,
            "max_processes": 16,
            "limits": {"wall_s": 60.0, "output_bytes": 1 << 20},
        }
    )


@pytest.fixture(scope="module", params=BACKENDS)
def world(request: pytest.FixtureRequest, tmp_path_factory) -> Iterator[World]:
    secret = tmp_path_factory.mktemp("host") / "canary"
    secret.write_text("canary")
    sandbox = BlockingSandbox(config_of(request.param, request))
    neighbour = sandbox.session()
    neighbour.run("import os; count = 0; n = open('own', 'w').write('neighbour')")
    own_file = neighbour.run("os.path.abspath('own')").value
    pid = neighbour.run("os.getpid()").value
    if request.param in (
        CONTAINER_PER_SESSION,
        KERNEL_PER_SESSION,
    ):  # where it has no number, but the fork server has
        pid = "1"
    tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(type=socket.SOCK_DGRAM)
    port = tcp.getsockname()[1]
    udp.bind(("127.0.0.1", port))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0canary{port}")
    abstract.listen()
    facts = f"HOST_PID, NEIGHBOUR_PID, CANARY_PORT = {os.getpid()}, {pid}, {port}\n"
    if request.param == "namespaces":  # where the neighbour's file has the same name as an own one
        facts += f"CANARY_FILE, NEIGHBOUR_FILE = {str(secret)!r}, '/tmp/own'\n"
    else:
        facts += f"CANARY_FILE, NEIGHBOUR_FILE = {str(secret)!r}, {own_file}\n"
    world = World(sandbox, neighbour, facts, [tcp, udp, abstract], request.param)
    yield world
    world.drop_session()
    assert secret.read_text() == "canary"
    assert neighbour.run("open('own').read()").value == "'neighbour'"
    sandbox.close()
    for canary in world.canaries:
        canary.close()


def programs(table: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("program", PROGRAMS[table].values(), ids=PROGRAMS[table])


def attempt(world: World, program: str, limits: Limits | None = None) -> RunResult:
    """Run a program in an interpreter that has run nothing else, and check the neighbour."""
    result = world.fresh_session().run(program, limits)
    world.check()
    return result


def survives(world: World) -> bool:
    return world.open_session().run("mark").value == "1"


def was_denied(result: RunResult) -> bool:
    last_line = (result.stderr.splitlines() or [""])[-1]
    return result.outcome is Outcome.TOOL_ERROR and DENIAL.search(last_line) is not None


@programs("denied")
def test_denied(world: World, program: str):
    if "," not in world.backend:  # a session with a container of its own takes long to start
        world.drop_session()
    result = world.open_session().run(program)
    world.check()
    in_gvisor = world.backend == KERNEL_PER_SESSION
    sees_its_own = in_gvisor and program in {PROGRAMS["denied"][name] for name in OWN_IN_GVISOR}
    assert sees_its_own or was_denied(result), result
    assert survives(world)


@pytest.mark.skipif(not X86_64, reason="numbers of x86-64")
@programs("denied_system_calls")
def test_system_call_is_denied(world: World, program: str):
    result = world.open_session().run(f"syscall({program})")
    world.check()
    if world.backend == KERNEL_PER_SESSION and program == A_BRANCH:
        # The kernel cannot ask the host, so it has copied itself. Two replies to one call end both.
        wait_until(lambda: not survives(world))
        assert world.answers()
        world.drop_session()
        return
    assert was_denied(result), result
    assert survives(world)


@programs("stopped")
def test_stopped(world: World, program: str):
    result = attempt(world, f"print('partial', flush=True)\n{program}", Limits(wall_s=0.3))
    assert (result.outcome, result.stdout) == (Outcome.TOOL_TIMEOUT, "partial\n"), result
    assert result.duration_s < 30 and world.answers()


@programs("limited")
def test_limited(world: World, program: str):
    result = attempt(world, program)
    assert result.outcome is Outcome.RESOURCE_LIMIT, result
    if world.backend in COUNTS_LATE:
        wait_until(world.answers)
    else:
        assert world.answers()


def test_a_file_of_the_largest_size_does_not_end_a_later_call(world: World):
    result = attempt(world, PROGRAMS["limited"]["one large file"])
    assert result.outcome is Outcome.RESOURCE_LIMIT, result
    if world.backend in COUNTS_LATE:
        wait_until(world.answers)
    later = world.open_session().run("import time; time.sleep(0.5); 1")
    assert (later.outcome, later.value, later.note) == (Outcome.OK, "1", ""), later


@programs("killed")
def test_killed(world: World, program: str):
    result = attempt(world, program)
    assert (result.outcome, result.value) == (Outcome.TOOL_ERROR, None), result
    assert "the interpreter was killed" in result.stderr and world.answers()


@pytest.mark.skipif(not X86_64, reason="foreign ABIs of x86-64")
@programs("killed_by_abi")
def test_killed_by_abi(world: World, program: str):
    result = attempt(world, program)
    # gVisor has no such ABI, and treats the call as another one.
    is_another = world.backend == KERNEL_PER_SESSION and (result.value or "").startswith("-")
    assert (is_another or "SIGSYS" in result.stderr) and world.answers()


@programs("harmless")
def test_harmless(world: World, program: str):
    attempt(world, program, Limits(wall_s=1))
    session = world.open_session()
    session.run("1")
    for _ in range(2):  # the first call may be the one that notices
        last = session.run("print('alive')")
    assert last.outcome in (Outcome.OK, Outcome.TOOL_ERROR)
    world.drop_session()
    assert world.answers()


def test_environment_holds_nothing_of_the_host(world: World):
    names = "HOME LANG MALLOC_ARENA_MAX MKL_NUM_THREADS MPLBACKEND OMP_NUM_THREADS"
    names += " OPENBLAS_NUM_THREADS PATH PWD TMPDIR"
    result = attempt(world, "' '.join(sorted(os.environ))")
    assert result.value == repr(names)


def test_descriptors_are_only_its_own(world: World):
    code = """
def is_open(number):
    try: return bool(os.fstat(number))
    except OSError: return False
[n for n in range(1000) if is_open(n)]
"""
    assert attempt(world, code).value == "[0, 1, 2, 3]"


def test_folder_is_empty_and_its_own(world: World):
    assert attempt(world, "os.listdir()").value == "[]"


def test_frame_sent_between_calls_ends_the_interpreter(world: World):
    code = """
import threading
def forge():
    import time; time.sleep(0.1)
    os.write(3, b'\\0\\0\\0\\2{}')
threading.Thread(target=forge).start()
"""
    attempt(world, code)
    session = world.open_session()
    session.run("import time; time.sleep(0.3)")
    result = session.run("'forge' in globals()")
    assert (result.outcome, result.value) == (Outcome.OK, "False") and result.note


def test_branches_are_confined_too(world: World):
    world.drop_session()
    with_branch = world.open_session().fork()
    for program in ("os.fork()", "open('/etc/passwd')", "socket.socket()", "os.kill(1, 9)"):
        assert was_denied(with_branch.run(program))
    with_branch.close()
    world.check()


def test_there_are_enough_programs():
    assert sum(map(len, PROGRAMS.values())) >= 120

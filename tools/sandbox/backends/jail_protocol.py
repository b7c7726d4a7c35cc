"""The seam between the sandbox and what confines it: a `Jail` says how the fork server is started.

Everything above, from the fork server's protocol to the typed outcomes, is the same for each jail.
"""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path
from typing import IO, Protocol

from tir_alp.tools.sandbox.config import SandboxConfig
from tir_alp.tools.sandbox.jail import paths
from tir_alp.tools.sandbox.jail.spec import JailSpec

JAIL_FOLDER = Path(__file__).parents[1] / "jail"
ENVIRONMENT = {
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "MPLBACKEND": "Agg",
    # One thread a library: a fork copies only the calling thread, and sessions are the parallelism.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # An arena a thread would eat the address space that a session may use.
    "MALLOC_ARENA_MAX": "1",
}
# The fork server gets the one folder that it needs, under its own name, and nothing else of ours.
_START = """
import sys, types
for name in ("tir_alp", "tir_alp.tools", "tir_alp.tools.sandbox"):
    sys.modules[name] = types.ModuleType(name)
sys.modules[name].__path__ = [{folder!r}]
from tir_alp.tools.sandbox.jail.{module} import main
main({arguments})
"""


class Started(Protocol):
    """A fork server that has been started."""

    async def end(self) -> None:
        """Kill it, and wait until it is dead. What it has forked may outlive it by moments."""
        ...


class Jail(Protocol):
    """What holds the fork server and its sessions. `BACKENDS` makes one from a config."""

    @property
    def name(self) -> str:
        """Of the backend."""
        ...

    @property
    def spec(self) -> JailSpec:
        """What the fork server is told."""
        ...

    @property
    def locks(self) -> frozenset[str]:
        """The mechanisms that the probes may name as what stopped an attack."""
        ...

    @property
    def max_threads(self) -> int | None:
        """How many the host lets an interpreter have; None where the kernel counts them."""
        ...

    @property
    def one_session(self) -> bool:
        """Whether each session gets a fork server of its own."""
        ...

    async def start(
        self, requests: socket.socket, obituaries: socket.socket, errors: IO[bytes]
    ) -> Started:
        """Start a fork server on its ends of two sockets; what goes wrong, it writes to `errors`.

        Raises:
            SandboxError: It could not be started.
        """
        ...


class ChildProcess:
    """A fork server that is a child of the host."""

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        descriptors: tuple[int, int],
        errors: IO[bytes],
    ) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
            pass_fds=descriptors,
            start_new_session=True,
        )

    async def end(self) -> None:
        """See `Started`."""
        self._process.kill()
        self._process.wait()


def python_command(
    folder: str, module: str, *arguments: object, python: str | None = None
) -> list[str]:
    """The command of a Python that calls the `main` of a module of the `jail` folder.

    Args:
        folder: Where the `jail` folder is.
        module: Its name in there.
        arguments: Of `main`.
        python: Path of the interpreter; None: this one.
    """
    start = _START.format(folder=folder, module=module, arguments=", ".join(map(repr, arguments)))
    return [python or paths.python(), "-I", "-u", "-c", start]


def session_limits(config: SandboxConfig) -> dict[str, int]:
    """The rlimits of one process. That on processes is not among them: it counts a user's."""
    return {
        "RLIMIT_AS": config.memory_mb << 20,
        "RLIMIT_NOFILE": config.open_files,
        "RLIMIT_FSIZE": config.tmp_mb << 20,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }

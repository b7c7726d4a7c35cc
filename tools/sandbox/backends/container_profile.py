"""The system calls of a whole container, in the container engine's format: an allow-list again.

It holds what a session may call (`seccomp.py`) and what the fork server and the keepers need to
make sessions; for the container of the HTTP service, also what a server needs.
`write_profiles("docker")` writes these profiles to `docker/*.json`, for containers that are started
without this code.
"""

from __future__ import annotations

import errno
import json
import socket
from pathlib import Path
from typing import Any

from tir_alp.tools.sandbox.backends.seccomp import ALLOWED, CLONE_NEW_ANY, LOOKS_MISSING

_FORK_SERVER = """
    capget capset connect execve fcntl fork ioctl kill landlock_add_rule landlock_create_ruleset
    landlock_restrict_self prctl prlimit64 sched_setaffinity seccomp setpgid setrlimit tgkill vfork
"""
_SERVICE = """
    accept4 bind listen memfd_create pidfd_open pidfd_send_signal recvmmsg sendmmsg setsid
"""
_SERVICE_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)

_ARCHITECTURES = ("SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64")
"""Without their 32-bit variants: a call through one of these ends the process."""


def container_profile(*, service: bool = False) -> dict[str, Any]:
    """A profile for `--security-opt seccomp=`.

    Args:
        service: Whether the HTTP service runs in the container, with the sessions inside.
    """
    names = {*ALLOWED, *(_FORK_SERVER + (_SERVICE if service else "")).split()}
    families = (socket.AF_UNIX, *(_SERVICE_FAMILIES if service else ()))
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.EPERM,
        "archMap": [{"architecture": name, "subArchitectures": []} for name in _ARCHITECTURES],
        "syscalls": [
            {"names": sorted(names), "action": "SCMP_ACT_ALLOW"},
            {
                "names": ["clone"],
                "action": "SCMP_ACT_ALLOW",
                "args": [_argument("SCMP_CMP_MASKED_EQ", CLONE_NEW_ANY, 0)],
            },
            *(
                {
                    "names": names,
                    "action": "SCMP_ACT_ALLOW",
                    "args": [_argument("SCMP_CMP_EQ", int(family))],
                }
                for names, allowed in ((["socket"], families), (["socketpair"], (socket.AF_UNIX,)))
                for family in allowed
            ),
            {
                "names": list(LOOKS_MISSING),
                "action": "SCMP_ACT_ERRNO",
                "errnoRet": errno.ENOSYS,
            },
        ],
    }


def write_profiles(folder: Path) -> None:
    """Write each profile to a file."""
    for name, service in {"seccomp.json": False, "seccomp-service.json": True}.items():
        text = json.dumps(container_profile(service=service), indent=2)
        (folder / name).write_text(f"{text}\n")


def _argument(operator: str, value: int, value_two: int = 0) -> dict[str, Any]:
    return {"index": 0, "value": value, "valueTwo": value_two, "op": operator}

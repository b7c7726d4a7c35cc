"""A session in namespaces of its own: its own processes, users, mounts and message queues.

The keeper is pid 1 of the session's pid namespace, so that its death ends all the others. The /tmp
is a file system of its own, whose size the kernel bounds.
"""

from __future__ import annotations

import os
import shutil
import stat

from tir_alp.tools.sandbox.jail import kernel, landlock
from tir_alp.tools.sandbox.jail.confine import DEVICES
from tir_alp.tools.sandbox.jail.spec import JailSpec

SCRATCH_ROOT = "/session"
"""The folder that Landlock makes writable. It contains the mount point, so that its rule still
holds when another file system is mounted there."""
SCRATCH = "/session/tmp"
STDIN = f"{SCRATCH}/.stdin"
PROC = "/session-proc"
"""All that a session sees of /proc: the link by which `/dev/stdin` leads to the file `STDIN`."""
_SPARE = "/session/spare"
_SCRATCH_FLAGS = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
_USER = 1000


class NamespacesRoom:
    """See `fork_server.Room`."""

    keeper_flags = (
        kernel.CLONE_NEWUSER | kernel.CLONE_NEWPID | kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC
    )
    branch_flags = kernel.BRANCH_INTO_NAMESPACES
    stdin_file = STDIN

    def __init__(self, spec: JailSpec) -> None:
        self._spec = spec
        self._ruleset: int | None = None
        if spec.landlock:
            self._ruleset = landlock.build_ruleset(spec.readable, DEVICES, SCRATCH_ROOT)

    def furnish(self) -> None:
        """In the keeper: become an ordinary user of the new namespaces, with an empty /tmp."""
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{_USER} 0 1")
        _write("/proc/self/gid_map", f"{_USER} 0 1")
        _write("/proc/self/oom_score_adj", "1000")
        self._mount_scratch(SCRATCH)
        kernel.mount(PROC, "/proc", "", kernel.MS_BIND)
        os.chdir("/tmp")

    def enter(self) -> int | None:
        """In the interpreter: nothing to do; the rule set is the same for all."""
        return self._ruleset

    def wait(self, interpreter: int) -> tuple[int, int, str]:
        """In the keeper: wait for a death."""
        return *os.wait(), ""

    def leave(self) -> None:
        """In the keeper: nothing to do; the mounts end with their namespace."""

    def enter_branch(self) -> None:
        """In a branch: nothing to do; `furnish_branch` replaces its /tmp from outside."""

    def furnish_branch(self, pidfd: int) -> None:
        """In a helper: give a waiting branch its user and a copy of its parent's /tmp."""
        process = os.open(f"/proc/{_pid_of(pidfd)}", os.O_PATH)  # invisible in its namespaces
        kernel.enter_namespaces(pidfd, kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS)
        _write("uid_map", f"{_USER} {_USER} 1", process)
        _write("gid_map", f"{_USER} {_USER} 1", process)
        self._mount_scratch(_SPARE)
        shutil.copytree(SCRATCH, _SPARE, symlinks=True, ignore=_special_files, dirs_exist_ok=True)
        kernel.mount(_SPARE, SCRATCH, "", kernel.MS_MOVE)

    def _mount_scratch(self, target: str) -> None:
        size = f"size={self._spec.scratch_mb}m,nr_inodes={self._spec.scratch_files}"
        kernel.mount("tmpfs", target, "tmpfs", _SCRATCH_FLAGS, f"{size},mode=0700")


def _special_files(folder: str, names: list[str]) -> list[str]:
    """What a copy of a folder leaves out: sockets, and pipes, on which it would block."""
    modes = {name: os.lstat(os.path.join(folder, name)).st_mode for name in names}
    return [n for n, m in modes.items() if stat.S_ISFIFO(m) or stat.S_ISSOCK(m)]


def _pid_of(pidfd: int) -> int:
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pid:"))


def _write(path: str, text: str, folder: int | None = None) -> None:
    descriptor = os.open(path, os.O_WRONLY, dir_fd=folder)
    os.write(descriptor, text.encode())
    os.close(descriptor)

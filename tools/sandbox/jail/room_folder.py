"""A session in a folder of its own, on a machine without namespaces.

The keeper does what the kernel does for `room_namespaces`: it measures the folder again and again
and ends the session when the folder is too full. It also ends the rest of the session on request,
or when the fork server dies. The interpreter and its branches are one process group, which none of
them can leave. They share the folder; each has its own copy of the files in a subfolder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import sys
import tempfile

from tir_alp.tools.sandbox.jail import kernel, landlock
from tir_alp.tools.sandbox.jail.confine import DEVICES
from tir_alp.tools.sandbox.jail.spec import JailSpec

_LOOK_EVERY_S = 0.05
_LOOK_AT_LEAST_EVERY_S = 0.2
_MAX_DEPTH = 64
_BLOCK = 512
_SPACE_OF_FOLDERS = 1 << 18
"""Bytes beside those of files: folders and the file system's own blocks. Without them, one file of
the largest size that its rlimit permits would be too much, and end a later call."""
_SIGNALS = (signal.SIGCHLD, signal.SIGTERM)


class FolderRoom:
    """See `fork_server.Room`."""

    keeper_flags = 0
    branch_flags = kernel.BRANCH_IN_PLACE
    stdin_file = None

    def __init__(self, spec: JailSpec) -> None:
        self._spec = spec
        self._fork_server = os.getpid()
        self._limit = ""
        self._pause_s = _LOOK_EVERY_S
        self._last_use = 0, 0

    def furnish(self) -> None:
        """In the keeper: make the folder, and die with the fork server."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        _die_with(self._fork_server, signal.SIGTERM)
        self._keeper = os.getpid()
        # Explicit, because Python would look for another folder if this one is full.
        self._folder = tempfile.mkdtemp(prefix="sandbox-", dir=os.environ["TMPDIR"])
        self._enter_folder(os.path.join(self._folder, "0"))

    def enter(self) -> int | None:
        """In the interpreter: lead a process group, die with the keeper, see only the folder."""
        _die_with(self._keeper, signal.SIGKILL)
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        with contextlib.suppress(PermissionError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        if not self._spec.landlock:
            return None
        return landlock.build_ruleset(self._spec.readable, DEVICES, self._folder)

    def wait(self, interpreter: int) -> tuple[int, int, str]:
        """In the keeper: wait for a death, and end the session if the folder becomes too full."""
        with contextlib.suppress(OSError):  # it does this itself, but may be killed before
            os.setpgid(interpreter, interpreter)
        while True:
            pid, status = self._reap(interpreter)
            if pid:
                return pid, status, self._limit
            received = signal.sigtimedwait(_SIGNALS, self._pause_s)
            if received is not None and received.si_signo == signal.SIGTERM:
                _kill_group(interpreter)
            elif received is None and (limit := self._exceeded(interpreter)):
                self._limit = limit
                _kill_group(interpreter)

    def leave(self) -> None:
        """In the keeper: remove the folder. A program can nest folders too deeply for Python."""
        for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
            null = [(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
            command = [*command, "--", self._folder]
            os.waitpid(os.posix_spawnp(command[0], command, os.environ, file_actions=null), 0)

    def enter_branch(self) -> None:
        """In a branch: copy the files of the interpreter that it was forked from."""
        origin, folder = self._own_folder, os.path.join(self._folder, str(os.getpid()))
        inside = os.path.relpath(os.getcwd(), origin)
        _copy(origin, folder)
        self._enter_folder(folder)
        os.chdir(inside)

    def furnish_branch(self, pidfd: int) -> None:
        """In a helper: nothing to do, since a branch does everything itself."""

    def _enter_folder(self, folder: str) -> None:
        self._own_folder = folder
        os.makedirs(folder, exist_ok=True)
        os.chdir(folder)
        for name in ("HOME", "TMPDIR", "PWD"):
            os.environ[name] = folder
        tempfile.tempdir = None  # the fork server's, which would be remembered

    def _reap(self, interpreter: int) -> tuple[int, int]:
        """A death as (pid, wait status), or zeros; raises ChildProcessError if none can follow."""
        return os.waitpid(-1, os.WNOHANG)

    def _exceeded(self, interpreter: int) -> str:
        """The limit that the session has exceeded; empty if there is none."""
        return "its files took more space than it may use" if self._is_too_full() else ""

    def _is_too_full(self) -> bool:
        use = _measure(self._folder)
        busy, self._last_use = use != self._last_use, use
        self._pause_s = _LOOK_EVERY_S if busy else min(2 * self._pause_s, _LOOK_AT_LEAST_EVERY_S)
        num_bytes, num_files = use
        max_bytes = (self._spec.scratch_mb << 20) + _SPACE_OF_FOLDERS
        return num_bytes > max_bytes or num_files > self._spec.scratch_files


def _die_with(parent: int, death_signal: int) -> None:
    kernel.prctl(kernel.PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent:  # the parent had died already
        os._exit(1)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _copy(origin: str, target: str) -> None:
    """As `shutil.copytree`, which cannot be used: it reads attributes that the filter forbids."""
    os.mkdir(target)
    with os.scandir(origin) as entries:
        for entry in entries:
            copy = os.path.join(target, entry.name)
            if entry.is_symlink():
                os.symlink(os.readlink(entry.path), copy)
            elif entry.is_dir():
                _copy(entry.path, copy)
            elif entry.is_file():  # not a pipe or a socket: reading those would block
                shutil.copyfile(entry.path, copy)
                shutil.copymode(entry.path, copy)


def _measure(folder: str) -> tuple[int, int]:
    """Bytes and files in a folder; endless if permissions or depth hide something from us."""
    num_bytes = num_files = 0
    folders = [(folder, 0)]
    while folders:
        path, depth = folders.pop()
        if depth > _MAX_DEPTH:
            return sys.maxsize, sys.maxsize
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    num_files += 1
                    num_bytes += status.st_blocks * _BLOCK
                    if stat.S_ISDIR(status.st_mode):
                        folders.append((entry.path, depth + 1))
        except FileNotFoundError:  # removed meanwhile
            continue
        except OSError:
            return sys.maxsize, sys.maxsize
    return num_bytes, num_files

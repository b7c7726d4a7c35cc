"""The system calls that Python does not wrap, as functions that raise `OSError`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform

CLONE_THREAD = 0x00010000
CLONE_NEWNS = 0x00020000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_PARENT = 0x00008000
SIGCHLD = 17
BRANCH_INTO_NAMESPACES = CLONE_NEWUSER | CLONE_NEWNS | CLONE_PARENT | SIGCHLD
BRANCH_IN_PLACE = CLONE_PARENT | SIGCHLD
"""How an interpreter forks itself: as its own sibling, with or without its own mount and user
namespaces. A seccomp filter asks the host about exactly one of the two and forbids every other
fork."""

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_MOVE = 2, 4, 8, 4096, 8192

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39

_X86_64 = platform.machine() == "x86_64"
_NR_CLONE = 56 if _X86_64 else 220
_NR_SECCOMP = 317 if _X86_64 else 277
_NR_LANDLOCK_RESTRICT_SELF = 446
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_NEW_LISTENER = 8
_CAPABILITY_VERSION_3 = 0x20080522
_LAST_CAPABILITY = 40

_libc = ctypes.CDLL(None, use_errno=True)
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)
_libc_with_gil.syscall.restype = ctypes.c_long
_libc.syscall.restype = ctypes.c_long


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def syscall(number: int, *arguments: object) -> int:
    """Call the kernel directly; integers are passed as C longs."""
    longs = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *longs))


def clone(flags: int) -> int:
    """Fork this process into new namespaces; return 0 in the child, the child's pid in the parent.

    `os.fork` takes no flags. Python's own fork hooks run, so that locks, thread state and the seed
    of `random` are correct in the child. The caller must have no other threads.
    """
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = _libc_with_gil.syscall(ctypes.c_long(_NR_CLONE), ctypes.c_long(flags), 0, 0, 0, 0)
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    return _check(pid)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Mount a file system, or move a mount."""
    _check(
        _libc.mount(
            source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
        )
    )


def enter_namespaces(pidfd: int, kinds: int) -> None:
    """Join some of another process's namespaces."""
    _check(_libc.setns(pidfd, kinds))


def unshare(kinds: int) -> None:
    """Move this process into new namespaces."""
    _check(_libc.unshare(kinds))


def prctl(option: int, value: int = 0) -> int:
    """Set or get one attribute of this process."""
    return _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def drop_capabilities() -> None:
    """Empty every capability set of this thread; the bounding set only if that is allowed."""
    with contextlib.suppress(PermissionError):  # lowering the bound takes a capability itself
        for capability in range(_LAST_CAPABILITY + 1):
            prctl(PR_CAPBSET_DROP, capability)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()))


def landlock_restrict_self(ruleset: int) -> None:
    """Put this thread and everything that it starts under a Landlock rule set, for good."""
    syscall(_NR_LANDLOCK_RESTRICT_SELF, ruleset, 0)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install_seccomp(program: bytes, *, asks: bool) -> int | None:
    """Install a compiled filter; return the descriptor on which its NOTIFY rules ask the host.

    Args:
        program: The filter in the kernel's format.
        asks: Whether it has NOTIFY rules; if not, None is returned.
    """
    arguments = _Program(len(program) // 8, program)
    flags = _SECCOMP_FILTER_FLAG_NEW_LISTENER if asks else 0
    result = syscall(_NR_SECCOMP, _SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(arguments))
    return result if asks else None

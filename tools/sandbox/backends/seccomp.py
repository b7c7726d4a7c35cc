"""The system calls that a session may make: an allow-list, compiled on the host to a BPF program.

Everything else fails with EPERM: sockets other than local pairs, exec, fork, mounts, namespaces,
ptrace, io_uring, keyrings, bpf, memfd, System V IPC, and every way to send a signal, even to
oneself. A call through a foreign ABI (i386 or x32 on x86-64) kills the process.
"""

from __future__ import annotations

import errno
import socket
import tempfile

from tir_alp.tools.sandbox.jail.kernel import CLONE_THREAD
from tir_alp.tools.sandbox.result import SandboxRefused

_FILES = """
    access chdir chmod close close_range copy_file_range dup dup2 dup3 faccessat faccessat2
    fadvise64 fallocate fchdir fchmod fchmodat fchmodat2 fdatasync flock fstat fstatfs fsync
    ftruncate futimesat getcwd getdents getdents64 link linkat lseek lstat mkdir mkdirat newfstatat
    open openat pipe pipe2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readlink readlinkat
    readv rename renameat renameat2 rmdir sendfile stat statfs statx symlink symlinkat truncate
    umask unlink unlinkat utime utimensat utimes write writev
"""
_MEMORY = "brk madvise membarrier mincore mmap mprotect mremap msync munmap"
_PROCESS = """
    arch_prctl exit exit_group futex getcpu getegid geteuid getgid getgroups getpgid getpgrp getpid
    getppid getpriority getresgid getresuid getrlimit getrusage getsid gettid getuid restart_syscall
    rseq sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getparam
    sched_getscheduler sched_yield set_robust_list set_tid_address sysinfo times uname wait4 waitid
"""
_SIGNALS = """
    alarm getitimer pause rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend
    rt_sigtimedwait setitimer sigaltstack
"""
_TIME = "clock_getres clock_gettime clock_nanosleep gettimeofday nanosleep time"
_WAITING = """
    epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 poll
    ppoll pselect6 select
"""
_LOCAL_PAIRS = """
    getpeername getsockname getsockopt recvfrom recvmsg sendmsg sendto setsockopt shutdown
"""
_OTHER = "getrandom"
ALLOWED = (
    _FILES + _MEMORY + _PROCESS + _SIGNALS + _TIME + _WAITING + _LOCAL_PAIRS + _OTHER
).split()
"""Allowed with any arguments; a name that this architecture lacks is skipped."""

# clone is allowed for threads. clone3 passes its flags through a pointer, where a filter cannot
# read them: it must look missing, so that the C library falls back to clone.
CLONE_NEW_ANY = 0x7E020080
LOOKS_MISSING = ("clone3",)

_PR_SET_NAME, _PR_GET_NAME = 15, 16
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""
_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)
"""Duplicates, flags and locks. Not F_SETOWN and F_SETSIG, which make the kernel send signals."""


def compile_filter(
    branch_flags: int, *, ask_for_threads: bool = False, asks_host: bool = True
) -> bytes:
    """The filter for this machine's architecture, in the kernel's format.

    Args:
        branch_flags: Flags of the one clone(2) that makes a process; the kernel asks the host about
            it.
        ask_for_threads: Whether the kernel asks the host about every new thread as well.
        asks_host: Whether the kernel can ask the host. If not, that clone(2) is allowed.

    Raises:
        SandboxRefused: libseccomp is not installed.
    """
    try:
        import pyseccomp as seccomp  # raises if libseccomp is missing: only its users see that
    except RuntimeError as error:
        raise SandboxRefused(f"no system call filter: {error} (Debian: libseccomp2)") from error

    filter_ = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    filter_.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)

    def add(action: int, name: str, *conditions: seccomp.Arg) -> None:
        if seccomp.resolve_syscall(seccomp.Arch.NATIVE, name) >= 0:
            filter_.add_rule_exactly(action, name, *conditions)

    for name in ALLOWED:
        add(seccomp.ALLOW, name)
    for name in LOOKS_MISSING:
        add(seccomp.ERRNO(errno.ENOSYS), name)
    thread = seccomp.Arg(0, seccomp.MASKED_EQ, CLONE_THREAD | CLONE_NEW_ANY, CLONE_THREAD)
    add(seccomp.NOTIFY if ask_for_threads else seccomp.ALLOW, "clone", thread)
    branch = seccomp.Arg(0, seccomp.EQ, branch_flags)
    add(seccomp.NOTIFY if asks_host else seccomp.ALLOW, "clone", branch)
    add(seccomp.ALLOW, "socketpair", seccomp.Arg(0, seccomp.EQ, socket.AF_UNIX))
    for request in _IOCTLS:
        add(seccomp.ALLOW, "ioctl", seccomp.Arg(1, seccomp.EQ, request))
    for command in _FCNTLS:
        add(seccomp.ALLOW, "fcntl", seccomp.Arg(1, seccomp.EQ, command))
    for option in (_PR_SET_NAME, _PR_GET_NAME):
        add(seccomp.ALLOW, "prctl", seccomp.Arg(0, seccomp.EQ, option))
    own, read_only = seccomp.Arg(0, seccomp.EQ, 0), seccomp.Arg(2, seccomp.EQ, 0)
    add(seccomp.ALLOW, "prlimit64", own, read_only)
    add(seccomp.ALLOW, "sched_setaffinity", own)
    with tempfile.TemporaryFile() as program:
        filter_.export_bpf(program)
        program.seek(0)
        return program.read()

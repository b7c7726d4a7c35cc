"""What the probes try: one program per promise, and the locks that should stop it. Pure data.

Each program is an expression whose value is `'held'` only if the attack was stopped as it should
be. If several locks are named, each of them alone would be enough.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

from tir_alp.tools.sandbox.backends.jail_protocol import ENVIRONMENT
from tir_alp.tools.sandbox.config import SandboxConfig


@dataclass(frozen=True, slots=True)
class Attack:
    """Something that must not work."""

    promise: str
    locks: tuple[str, ...]
    """The locks that stop it. A backend that has none of them does not promise to stop it."""
    program: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """What a session must not reach: a file and a port of the host, a file of a neighbour."""

    path: str
    port: int
    neighbour_path: str


PRELUDE = """
import ctypes, errno, mmap, os, resource, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

def syscall(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

DENIED = (errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENOSYS, errno.EROFS)
FULL = (errno.ENOSPC, errno.EFBIG, errno.EMFILE)

def stopped(attack, by=DENIED):
    try:
        return f'got {attack()!r:.200}'
    except OSError as error:
        return 'held' if error.errno in by else repr(error)
    except by as error:
        return 'held'
"""

_ARCHITECTURE = 0 if platform.machine() == "x86_64" else 1
_NUMBERS = {
    name: numbers[_ARCHITECTURE]
    for name, numbers in {
        "ptrace": (101, 117),
        "mount": (165, 40),
        "unshare": (272, 97),
        "setns": (308, 268),
        "keyctl": (250, 219),
        "bpf": (321, 280),
        "userfaultfd": (323, 282),
        "process_vm_readv": (310, 270),
        "clone3": (435, 435),
        "io_uring_setup": (425, 425),
        "pidfd_send_signal": (424, 424),
        "memfd_create": (319, 279),
    }.items()
}
_PTRACE_ATTACH = 16
_CLONE_NEWUSER = 0x10000000

KILLED_BY_ABI = {
    "i386": """
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex('b814000000cd80c3'))  # mov eax, 20 (getpid); int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
ctypes.CFUNCTYPE(ctypes.c_int)(address)()
""",
    "x32": "syscall(0x40000000 + 39)",
}


_SOCKETS = ("seccomp", "namespaces", "container")
_FILES = ("Landlock", "namespaces")
_OWN_IMAGE = "gVisor"
"""A container and a kernel per session: there are no files but those of the image."""


def intrusions(config: SandboxConfig, canary: Canary) -> tuple[Attack, ...]:
    """Attempts to reach what lies outside of a session."""
    n = _NUMBERS
    names = {*ENVIRONMENT, "PWD"}
    environment = f"'held' if set(os.environ) <= {{*{sorted(names)}}} else dict(os.environ)"
    programs = {
        ("network", *_SOCKETS): f"socket.create_connection(('127.0.0.1', {canary.port}), 2)",
        ("udp", *_SOCKETS): "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        ("ipv6", *_SOCKETS): "socket.socket(socket.AF_INET6)",
        ("unix sockets", *_SOCKETS): "socket.socket(socket.AF_UNIX)",
        ("netlink", *_SOCKETS): "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        ("vsock", "seccomp"): "socket.socket(40)",
        ("host files", *_FILES, "container", _OWN_IMAGE): f"open({canary.path!r}).read()",
        ("system files", *_FILES): "open('/etc/passwd').read()",
        ("/proc", *_FILES): "os.listdir('/proc') and open('/proc/self/environ').read()",
        ("other files", "Landlock"): "os.listdir('/')",
        ("read-only libraries", *_FILES, "container"): "open(os.__file__ + '.x', 'w')",
        ("neighbour's files", *_FILES, _OWN_IMAGE): f"open({canary.neighbour_path!r}).read()",
        ("signals", "seccomp", "Landlock", "namespaces"): "os.kill(1, 9)",
        ("signals to all", "seccomp", "Landlock", "namespaces"): "os.kill(-1, 0)",
        ("signals by fcntl", "seccomp"): "__import__('fcntl').fcntl(1, 8, 1)",
        ("ptrace", "seccomp"): f"syscall({n['ptrace']}, {_PTRACE_ATTACH}, 1, 0, 0)",
        ("foreign memory", "seccomp"): f"syscall({n['process_vm_readv']}, 1, 0, 0, 0, 0, 0)",
        ("fork", "seccomp"): "os.fork()",
        ("exec", "seccomp", "Landlock"): "os.execv(sys.executable, ['python'])",
        ("subprocess", "seccomp"): "subprocess.run([sys.executable, '-V'])",
        ("clone3", "seccomp"): f"syscall({n['clone3']}, 0, 0)",
        ("user namespaces", "seccomp"): f"syscall({n['unshare']}, {_CLONE_NEWUSER})",
        ("mount", "seccomp"): f"syscall({n['mount']}, 0, 0, 0, 0, 0)",
        ("io_uring", "seccomp"): f"syscall({n['io_uring_setup']}, 1, 0)",
        ("keyring", "seccomp"): f"syscall({n['keyctl']}, 0, -3, 0)",
        ("bpf", "seccomp"): f"syscall({n['bpf']}, 0, 0, 0)",
        ("userfaultfd", "seccomp"): f"syscall({n['userfaultfd']}, 1)",
        ("memfd", "seccomp"): "os.memfd_create('x')",
        ("limits", "seccomp"): "resource.prlimit(0, resource.RLIMIT_NOFILE, (8, 8))",
    }
    memory = f"stopped(lambda: len(bytearray({config.memory_mb} << 20)), MemoryError)"
    return (
        *(Attack(name, tuple(k), f"stopped(lambda: {p})") for (name, *k), p in programs.items()),
        Attack("environment", ("launcher",), environment),
        Attack("memory", ("rlimit AS",), memory),
    )


def exhaustions(config: SandboxConfig) -> tuple[Attack, ...]:
    """Attempts to use more of something than a session may."""
    attacks = (
        Attack("threads", ("NPROC", "host", "gVisor keeper"), _THREADS),
        Attack("open files", ("rlimit NOFILE",), _OPEN_FILES),
        Attack("disk", ("tmpfs", "keeper"), _DISK),
        Attack("files", ("tmpfs", "keeper"), _NUM_FILES),
        Attack("sparse files", ("rlimit FSIZE",), _SPARSE),
    )
    return tuple(Attack(a.promise, a.locks, a.program.format(**dict(config))) for a in attacks)


_THREADS = """
wait, threads = threading.Event(), []
def swarm():
    while len(threads) < {max_processes}:
        threads.append(threading.Thread(target=wait.wait))
        threads[-1].start()
    time.sleep(2)  # for a keeper, which looks only now and then
    return len(threads)
verdict = stopped(swarm, RuntimeError)
wait.set()
verdict
"""
_OPEN_FILES = """
verdict = stopped(lambda: [os.dup(0) for _ in range({open_files})], FULL)
os.closerange(4, {open_files})
verdict
"""
# An attack that is not stopped at once waits for the keeper, which looks only now and then.
_DISK = """
def fill():
    for i in range({tmp_mb} + 1):
        with open(f'fill{{i}}', 'wb') as file:
            os.posix_fallocate(file.fileno(), 0, 1 << 20)
    time.sleep(2)
stopped(fill, FULL)
"""
_NUM_FILES = """
for name in os.listdir():
    os.unlink(name)
def litter():
    for i in range({tmp_files} + 1):
        open(str(i), 'w').close()
    time.sleep(2)
stopped(litter, FULL)
"""
_SPARSE = """
for name in os.listdir():
    os.unlink(name)
open('sparse', 'w').close()
stopped(lambda: os.truncate('sparse', ({tmp_mb} << 20) + 1), FULL)
"""

"""The Landlock rule set of a session: read the libraries, write the scratch folder, nothing else.

Beside the mount namespace, Landlock is the second lock on files and, from ABI 6 on, on signals and
abstract sockets. In namespaces, the fork server builds the rule set once for all sessions.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from tir_alp.tools.sandbox.jail.kernel import syscall

_NR_CREATE_RULESET, _NR_ADD_RULE = 444, 445
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_TRUNCATE = 1 << 14
_DEVICE_NODES = (1 << 6) | (1 << 11)  # make a character or a block device
_EXECUTE, _IOCTL_DEV = 1 << 0, 1 << 15
_LAST_FS_BIT = {1: 12, 2: 13, 3: 14, 4: 14}  # from ABI 5 on: 15
_NET_TCP = 0b11  # bind, connect
_SCOPES = 0b11  # abstract unix sockets, signals


class _Attributes(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def abi() -> int:
    """The Landlock version of this kernel; 0 if it has none."""
    try:
        return syscall(_NR_CREATE_RULESET, 0, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


def build_ruleset(readable: Iterable[str], devices: Iterable[str], writable: str) -> int | None:
    """A descriptor of the rule set; None if the kernel has no Landlock."""
    version = abi()
    if version == 0:
        return None
    handled = (2 << _LAST_FS_BIT.get(version, 15)) - 1
    attributes = _Attributes(
        handled, _NET_TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0
    )
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = syscall(_NR_CREATE_RULESET, ctypes.byref(attributes), size, 0)
    for path in readable:
        _allow(ruleset, path, _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0))
    for path in devices:
        _allow(ruleset, path, _READ_FILE | _WRITE_FILE | (_TRUNCATE & handled))
    _allow(ruleset, writable, handled & ~(_EXECUTE | _IOCTL_DEV | _DEVICE_NODES))
    return ruleset


def _allow(ruleset: int, path: str, access: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = _PathBeneath(access, descriptor)
    syscall(_NR_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    os.close(descriptor)

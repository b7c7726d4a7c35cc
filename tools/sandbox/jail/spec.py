"""What the host tells the fork server, once, about the sessions that it will fork."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class JailSpec:
    """Everything that a session is allowed. Crosses into the jail as one JSON object."""

    room: Literal["namespaces", "folder", "gvisor"]
    """Where a session lives: in namespaces of its own, or in a folder of its own; that on the
    machine's kernel or on another."""
    preload: tuple[str, ...]
    """Modules imported before the first fork, so that every session has them at once."""
    import_paths: tuple[str, ...]
    """Folders of installed packages, appended to `sys.path`."""
    readable: tuple[str, ...]
    """Files and folders that Landlock lets a program read."""
    landlock: bool = True
    seccomp: str
    """The system call filter, compiled, in hexadecimal. Empty: none."""
    asks_host: bool = True
    """Whether the filter asks the host about forks; False where the kernel cannot."""
    rlimits: dict[str, int]
    """`resource` constant -> soft and hard limit, e.g. `{"RLIMIT_NOFILE": 128}`."""
    scratch_mb: int
    """Size of a session's own /tmp."""
    scratch_files: int
    """Inodes of a session's own /tmp."""
    max_threads: int | None = None
    """That the keeper lets a session have, branches included, in room `gvisor`; others count them
    elsewhere."""

"""What the host tells the fork server about the sessions that it will fork. Sent once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class JailSpec:
    """Everything that a session is allowed to do. Sent into the jail as one JSON object."""

    room: Literal["namespaces", "folder", "gvisor"]
    """Where a session lives: in namespaces of its own, or in a folder of its own, on the host's
    kernel or on gVisor's."""
    preload: tuple[str, ...]
    """Modules imported before the first fork, so that every session has them at once."""
    import_paths: tuple[str, ...]
    """Folders of installed packages, appended to `sys.path`."""
    readable: tuple[str, ...]
    """Files and folders that Landlock lets a program read."""
    landlock: bool = True
    seccomp: str
    """The compiled system call filter in hexadecimal; empty means no filter."""
    asks_host: bool = True
    """Whether the filter asks the host about forks; False if the kernel cannot ask."""
    rlimits: dict[str, int]
    """`resource` constant -> soft and hard limit, e.g. `{"RLIMIT_NOFILE": 128}`."""
    scratch_mb: int
    """Size of a session's own /tmp, in MB."""
    scratch_files: int
    """Number of inodes of a session's own /tmp."""
    max_threads: int | None = None
    """Number of threads that the keeper lets a session have, branches included. Only for room
    `gvisor`; for the others, the kernel or the host counts."""

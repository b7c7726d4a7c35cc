"""Who sent a message, by the kernel's word, on a socket with SO_PASSCRED."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

_CREDENTIALS = struct.Struct("iII")
CREDENTIALS_SPACE = socket.CMSG_SPACE(_CREDENTIALS.size)
"""What `recvmsg` needs for it."""


def sender(ancillary: Iterable[tuple[int, int, bytes]]) -> int:
    """The sender's pid, as this process numbers it; 0 if the message does not tell."""
    for _, kind, payload in ancillary:
        if kind == socket.SCM_CREDENTIALS:
            return _CREDENTIALS.unpack(payload)[0]
    return 0

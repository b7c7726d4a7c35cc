"""The pid of a message's sender, vouched for by the kernel, on a socket with SO_PASSCRED set."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

_CREDENTIALS = struct.Struct("iII")
CREDENTIALS_SPACE = socket.CMSG_SPACE(_CREDENTIALS.size)
"""Bytes of ancillary data that `recvmsg` needs for the credentials."""


def sender(ancillary: Iterable[tuple[int, int, bytes]]) -> int:
    """The sender's pid as this process numbers it; 0 if the message carries no credentials."""
    for _, kind, payload in ancillary:
        if kind == socket.SCM_CREDENTIALS:
            return _CREDENTIALS.unpack(payload)[0]
    return 0

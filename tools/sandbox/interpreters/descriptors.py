"""Who sent a message, by the kernel's word, on a socket with SO_PASSCRED."""

from __future__ import annotations

import asyncio
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


async def readable(descriptor: int, timeout_s: float) -> None:
    """Wait until there is something to read; of a pidfd, until its process is dead.

    Raises:
        TimeoutError: There was nothing in time.
    """
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, lambda: ready.done() or ready.set_result(None))
    try:
        async with asyncio.timeout(timeout_s):  # `wait_for` can swallow a cancellation
            await ready
    finally:
        loop.remove_reader(descriptor)

"""Waiting for a descriptor, in the event loop and without a thread."""

from __future__ import annotations

import asyncio


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

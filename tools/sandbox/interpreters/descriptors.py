"""Waits for a descriptor in the event loop."""

from __future__ import annotations

import asyncio


async def readable(descriptor: int, timeout_s: float) -> None:
    """Wait until a descriptor can be read; a pidfd can be read once its process is dead.

    Raises:
        TimeoutError: It could not be read in time.
    """
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, lambda: ready.done() or ready.set_result(None))
    try:
        async with asyncio.timeout(timeout_s):  # `wait_for` can swallow a cancellation
            await ready
    finally:
        loop.remove_reader(descriptor)

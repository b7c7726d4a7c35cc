"""The event loop in a thread: what its users left unfinished is cancelled, and ends in order."""

import asyncio
import contextlib
import threading

from tir_alp.tools.background_loop import BackgroundLoop


def test_what_is_left_unfinished_is_cancelled_and_cleans_up(recwarn):
    began, done = threading.Event(), []

    @contextlib.asynccontextmanager
    async def opened():
        try:
            began.set()
            await asyncio.sleep(60)
            yield
        finally:
            await asyncio.sleep(0)  # cleaning up needs a running loop
            done.append("cleaned up")

    async def enter():
        async with opened():
            pass

    with BackgroundLoop("test") as loop:
        asyncio.run_coroutine_threadsafe(enter(), loop)
        assert began.wait(10)
    assert done == ["cleaned up"] and not recwarn.list

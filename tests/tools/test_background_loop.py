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


def test_it_can_be_entered_again_after_its_end():
    background = BackgroundLoop("test")
    for _ in range(2):
        with background as loop:
            done = asyncio.run_coroutine_threadsafe(asyncio.sleep(0, "done"), loop)
            assert done.result(10) == "done"

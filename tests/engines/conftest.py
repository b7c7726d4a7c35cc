"""One SGLang server for all tests that need none of their own: it takes half a minute to start."""

import asyncio
import importlib.util
import os
import threading

import pytest

from tests.engines.harness import Harness, embedded, served
from tir_alp.tiny import BASE


@pytest.fixture(scope="session")
def sglang_url(tmp_path_factory):
    """Address of a server of the tiny model in float32; its key is in our environment.

    One that runs already is used if `TIR_ALP_TEST_SERVER` says where, with its key beside it.
    """
    if running := os.environ.get("TIR_ALP_TEST_SERVER"):
        yield running
        return
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("sglang is not installed: docs/sglang.md")
    import aiohttp

    from tir_alp.config import SGLangConfig
    from tir_alp.engines import sglang
    from tir_alp.engines.sglang_client import SGLangClient
    from tir_alp.engines.sglang_process import ServerProcess

    config = SGLangConfig(type="sglang", device="cpu", dtype="float32", max_cache_tokens=1 << 16)
    process = ServerProcess(
        "the tests' server",
        sglang.server_arguments(config, str(BASE), 0, 0, 0),
        sglang.server_environment(config, str(BASE)),
        tmp_path_factory.mktemp("server") / "server.log",
        "secret",
        print,
    )
    # The server dies with the thread that started it, so that has to be one that stays.
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def wait(work, timeout):
        return asyncio.run_coroutine_threadsafe(work, loop).result(timeout)

    async def start():
        url = await process.start()
        async with aiohttp.ClientSession() as session:
            client = SGLangClient(session, url, "secret", stall_timeout_s=60, load_timeout_s=60)
            await process.wait_until_ready(client, 600)
        return url

    os.environ[sglang.KEY_VARIABLE] = "secret"
    try:
        yield wait(start(), 620)
    finally:
        del os.environ[sglang.KEY_VARIABLE]
        wait(process.kill(), 90)
        loop.call_soon_threadsafe(loop.stop)


@pytest.fixture(params=["embedded", "sglang"])
def harness(request):
    """Each engine in turn."""
    if request.param == "embedded":
        return Harness("embedded", embedded)
    url = request.getfixturevalue("sglang_url")
    return Harness("sglang", lambda of: served(url, of))

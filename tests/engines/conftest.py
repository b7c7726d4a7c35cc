"""One server of each kind, shared by all tests that need none of their own.

A server takes a minute to start.
"""

import asyncio
import importlib.util
import os
import threading
from contextlib import asynccontextmanager, contextmanager

import pytest
import torch

from tests.engines.harness import (
    Harness,
    embedded,
    model,
    served,
    served_by_vllm,
    vllm_config,
    write_model,
)


@contextmanager
def staying():
    """Run coroutines in a thread that stays: a server ends with the thread that started it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    try:
        yield lambda work, timeout: asyncio.run_coroutine_threadsafe(work, loop).result(timeout)
    finally:
        loop.call_soon_threadsafe(loop.stop)


@pytest.fixture(scope="session")
def sglang_url(tmp_path_factory):
    """Address of a server of the tiny model in float32, whose key is in the environment.

    A server that runs already is used if `TIR_ALP_TEST_SERVER` has its address.
    """
    if running := os.environ.get("TIR_ALP_TEST_SERVER"):
        yield running
        return
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("sglang is not installed: docs/engines.md")
    from tir_alp.config import SGLangConfig
    from tir_alp.engines.sglang import process as sglang_process
    from tir_alp.engines.sglang.fleet import KEY_VARIABLE

    config = SGLangConfig(type="sglang", device="cpu", dtype="float32", max_cache_tokens=1 << 16)
    path = write_model(tmp_path_factory.mktemp("model"))
    process = sglang_process.SGLangProcess(
        "the tests' server",
        sglang_process.server_arguments(config, path, 0, 0, 0),
        sglang_process.server_environment(config, path),
        tmp_path_factory.mktemp("server") / "server.log",
        "secret",
        print,
    )

    async def start():
        url = await process.listen()
        async with client_of(url) as client:
            await process.wait_until_ready(client, 600)
        return url

    os.environ[KEY_VARIABLE] = "secret"
    with staying() as wait:
        try:
            yield wait(start(), 620)
        finally:
            del os.environ[KEY_VARIABLE]
            wait(process.kill(), 90)


@pytest.fixture(scope="session")
def router_url(sglang_url, tmp_path_factory):
    """Address of a router that has the server of `sglang_url`."""
    if importlib.util.find_spec("sglang_router") is None:
        pytest.skip("sglang-router is not installed: docs/engines.md")
    from tir_alp.engines.sglang.router import RouterProcess

    process = RouterProcess(tmp_path_factory.mktemp("router") / "log", "secret", print)

    async def start():
        url = await process.listen()
        async with client_of(url) as client:
            await process.wait_until_ready(client, 600)
            await client.call("/workers", url=sglang_url, api_key="secret")
            while not dict(await client.get("/workers") or {})["workers"]:
                await asyncio.sleep(0.1)
        return url

    with staying() as wait:
        try:
            yield wait(start(), 620)
        finally:
            wait(process.kill(), 90)


@asynccontextmanager
async def client_of(url):
    """A client of a server, or of a router."""
    import aiohttp

    from tir_alp.engines.sglang.client import SGLangClient

    async with aiohttp.ClientSession() as session:
        yield SGLangClient(session, url, "secret", stall_timeout_s=60, load_timeout_s=60)


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory):
    """Folder of a vLLM server of the tests' model, if TIR_ALP_VLLM_PYTHON names its Python."""
    if "TIR_ALP_VLLM_PYTHON" not in os.environ:
        pytest.skip("vLLM has a Python of its own, and TIR_ALP_VLLM_PYTHON names none")
    import aiohttp

    from tir_alp.engines.vllm import process as vllm_process
    from tir_alp.engines.vllm.request import VLLMClient

    folder = tmp_path_factory.mktemp("vllm")
    vllm_process.write_start(folder / "start", model(), model().state_dict(), torch.float32)
    process = vllm_process.server_process(vllm_config(), folder, 0, print)

    async def start():
        await process.start()
        connector = aiohttp.UnixConnector(str(folder / vllm_process.SOCKET))
        async with aiohttp.ClientSession(connector=connector) as session:
            client = VLLMClient(
                session, "http://localhost", None, stall_timeout_s=60, load_timeout_s=60
            )
            await process.wait_until_ready(client, 600)

    with staying() as wait:
        try:
            wait(start(), 620)
            yield folder
        finally:
            wait(process.kill(), 90)


@pytest.fixture(params=["embedded", "sglang", "router", "vllm"])
def harness(request):
    """Each engine in turn."""
    if request.param == "embedded":
        return Harness("embedded", embedded)
    if request.param == "vllm":
        folder = request.getfixturevalue("vllm_server")
        return Harness("vllm", lambda of: served_by_vllm(folder, of))
    url = request.getfixturevalue("sglang_url")
    if request.param == "router":
        router = request.getfixturevalue("router_url")
        return Harness("router", lambda of: served(url, of, router=router))
    return Harness("sglang", lambda of: served(url, of))

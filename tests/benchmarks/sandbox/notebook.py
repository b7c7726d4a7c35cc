"""One Jupyter kernel per client: it has state, and nothing that confines a program."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.benchmarks.sandbox.rival import CannotFork, Client, Host, Missing

_START_TIMEOUT_S = 120.0
_ATTEMPTS = 3


class _Kernel:
    def __init__(self, manager: Any, client: Any) -> None:
        self._manager = manager
        self._client = client

    async def call(self, code: str) -> str:
        printed: list[str] = []

        def take(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        reply = await self._client.execute_interactive(
            code, store_history=False, output_hook=take, allow_stdin=False
        )
        if reply["content"]["status"] != "ok":
            raise RuntimeError(str(reply["content"]))
        return "".join(printed)

    async def fork(self) -> Client:
        raise CannotFork

    async def close(self) -> None:
        self._client.stop_channels()
        await self._manager.shutdown_kernel(now=True)


class _Kernels:
    def __init__(self, jupyter_client: Any) -> None:
        self._jupyter_client = jupyter_client

    async def open(self) -> Client:
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(RuntimeError):  # another kernel took one of its ports
                return await self._open()
        return await self._open()

    async def _open(self) -> Client:
        manager = self._jupyter_client.AsyncKernelManager(kernel_name="python3")
        await manager.start_kernel(stderr=subprocess.DEVNULL)
        client = manager.client()
        client.start_channels()
        await client.wait_for_ready(timeout=_START_TIMEOUT_S)
        return _Kernel(manager, client)


@asynccontextmanager
async def start_kernels() -> AsyncIterator[Host]:
    """Kernels of this machine's ipykernel, which is not a dependency of the project."""
    try:
        importlib.import_module("ipykernel")
        yield _Kernels(importlib.import_module("jupyter_client"))
    except ImportError as error:
        raise Missing(f"{error}; pip install ipykernel") from error

"""What lives in a sandbox host's actor: a sandbox, and the HTTP service in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from typing import Any

import ray

from tir_alp.cluster.same_code import Host
from tir_alp.tools.sandbox import SandboxConfig, SandboxError, create_sandbox
from tir_alp.tools.sandbox.service.server import Service, ServiceConfig, serve

_START_TIMEOUT_S = 120.0


class SandboxHost(Host):
    """Serves one sandbox. It dies with its process, and so do the programs in it."""

    async def start(self, config: Mapping[str, Any], port: int, token: str) -> str:
        """Start both; returns the address.

        Args:
            config: Of the sandbox.
            port: Where to listen if it is free; else, and with 0, anywhere.
            token: What clients have to show.

        Raises:
            SandboxRefused: This machine cannot hold a program in.
        """
        async with contextlib.AsyncExitStack() as opened:
            sandbox = await opened.enter_async_context(
                create_sandbox(SandboxConfig.model_validate(config))
            )
            self._service = Service(sandbox, ServiceConfig(token=token))
            try:
                address = await self._listen(port)
            except SandboxError:
                address = await self._listen(0)
            self._exit = opened.pop_all()
        return address

    async def heartbeat(self) -> Mapping[str, float]:
        """The number of its process."""
        return {"pid": os.getpid()}

    async def stop(self) -> None:
        """End the service and the sandbox."""
        self._stop.set()
        await asyncio.gather(self._serving, return_exceptions=True)
        await self._exit.aclose()

    async def _listen(self, port: int) -> str:
        address = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        node = ray.util.get_node_ip_address()
        self._serving = asyncio.create_task(
            serve(self._service.application(), node, port, self._stop, address.set_result)
        )
        await asyncio.wait(
            (self._serving, address),
            timeout=_START_TIMEOUT_S,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if address.done():
            return address.result()
        if self._serving.done():
            await self._serving  # says why, if it failed
            raise SandboxError(f"the service ended before it had an address at {node}:{port}")
        self._serving.cancel()
        raise SandboxError(
            f"the service had no address at {node}:{port} within {_START_TIMEOUT_S:g} s"
        )

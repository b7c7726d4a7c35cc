"""What runs in a sandbox host's actor: a sandbox, and the HTTP service in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from typing import Any

import ray

from tir_alp.cluster.same_code import ReportsCode
from tir_alp.tools.sandbox import SandboxConfig, SandboxError, create_sandbox
from tir_alp.tools.sandbox.service.server import Service, ServiceConfig, serve

_START_TIMEOUT_S = 120.0


class SandboxHost(ReportsCode):
    """Serves one sandbox, which ends with its process, as do the programs in it."""

    async def start(self, config: Mapping[str, Any], port: int, token: str) -> str:
        """Start the sandbox and the service; returns the service's address.

        Args:
            config: Settings of the sandbox.
            port: Port to listen on; if it is taken, or 0, any free port.
            token: Token that clients have to send.

        Raises:
            SandboxRefused: If this machine cannot confine a program.
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
        """Health report: the process id."""
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
            await self._serving  # raises the reason, if it failed
            raise SandboxError(f"the service ended before it had an address at {node}:{port}")
        self._serving.cancel()
        raise SandboxError(
            f"the service had no address at {node}:{port} within {_START_TIMEOUT_S:g} s"
        )

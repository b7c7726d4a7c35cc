"""A proxy in front of a server that fails on demand, one request path at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web


@dataclass
class FaultyProxy:
    """What the proxy does to requests whose path starts with `path`."""

    url: str = ""
    path: str = "/generate"
    fault: str | None = None
    """None, "error" (500), "truncate" (a body that breaks off), "drip" (single bytes that never
    make an answer), "refuse" (503) or "unknown" (400)."""
    num_faults: int = 1 << 30
    """Number of requests that fail; those after them succeed."""
    num_passed: int = 0
    """Number of requests that succeed before the first that fails."""
    paths: list[str] = field(default_factory=list)


@asynccontextmanager
async def proxy_of(server_url: str, **settings) -> AsyncIterator[FaultyProxy]:
    """Serve a proxy of a server while the block runs."""
    proxy = FaultyProxy(**settings)

    async def handle(request: web.Request) -> web.StreamResponse:
        proxy.paths.append(request.path)
        fault = None
        if proxy.fault is not None and request.path.startswith(proxy.path):
            if proxy.num_passed > 0:
                proxy.num_passed -= 1
            elif proxy.num_faults > 0:
                proxy.num_faults -= 1
                fault = proxy.fault
        if fault == "error":
            return web.Response(status=500, text="out of order")
        if fault == "unknown":
            return web.json_response({"error": {"message": "failed"}}, status=400)
        if fault == "refuse":
            return web.Response(status=503)
        answer = web.StreamResponse()
        if fault == "drip":
            await answer.prepare(request)
            for _ in range(2000):
                await answer.write(b":")
                await asyncio.sleep(0.05)
            return answer
        body = await request.read()
        headers = {
            name: request.headers[name]
            for name in ("Authorization", "Content-Type")
            if name in request.headers
        }
        async with session.request(
            request.method, server_url + request.path_qs, data=body, headers=headers
        ) as response:
            answer.set_status(response.status)
            answer.content_type = response.content_type
            await answer.prepare(request)
            async for piece in response.content.iter_any():
                if fault == "truncate":
                    await answer.write(piece[: len(piece) // 2])
                    assert request.transport is not None
                    request.transport.close()
                    return answer
                await answer.write(piece)
        return answer

    application = web.Application(client_max_size=1 << 30)
    application.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    async with aiohttp.ClientSession() as session:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        proxy.url = f"http://{host}:{port}"
        try:
            yield proxy
        finally:
            await runner.cleanup()

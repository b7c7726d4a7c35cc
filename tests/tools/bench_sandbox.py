"""Latencies of the sandbox in milliseconds: `python tests/tools/bench_sandbox.py [BACKEND ...]`."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator

from tir_alp.tools.sandbox import Sandbox, SandboxConfig, create_sandbox

ROUNDS = 200


async def new_sessions(sandbox: Sandbox) -> AsyncIterator[None]:
    for _ in range(ROUNDS):
        async with sandbox.session():
            pass
        yield


async def episodes(sandbox: Sandbox) -> AsyncIterator[None]:
    for _ in range(ROUNDS):
        async with sandbox.session() as python:
            for turn in range(3):
                await python.run(f"x = {turn}\nprint(x)")
        yield


async def calls(sandbox: Sandbox) -> AsyncIterator[None]:
    async with sandbox.session() as python:
        for _ in range(10 * ROUNDS):
            await python.run("print(1)")
            yield


async def forks(sandbox: Sandbox) -> AsyncIterator[None]:
    async with sandbox.session() as python:
        for _ in range(ROUNDS):
            branch = await python.fork()
            await branch.close()
            yield


async def eight_clients(sandbox: Sandbox) -> float:
    """Calls a second, of eight sessions at once."""

    async def client() -> None:
        async with sandbox.session() as python:
            for _ in range(ROUNDS):
                await python.run("print(1)")

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(8)))
    return 8 * ROUNDS / (time.perf_counter() - started)


async def measure(config: SandboxConfig) -> None:
    started = time.perf_counter()
    async with create_sandbox(config) as sandbox:
        start_s = time.perf_counter() - started
        print(f"{config.backend}, preload={config.preload}: start and probes {start_s:.2f} s")
        for name, benchmark in {
            "new session, opened and closed": new_sessions,
            "session with three calls": episodes,
            "call in a live session": calls,
            "fork, closed again": forks,
        }.items():
            times, last = [], time.perf_counter()
            async for _ in benchmark(sandbox):
                now = time.perf_counter()
                times.append((now - last) * 1e3)
                last = now
            times.sort()
            quantiles = [times[int(len(times) * q)] for q in (0.5, 0.95, 0.99)]
            print(f"  {name:32} p50 {quantiles[0]:7.3f}  p95 {quantiles[1]:7.3f}", end="")
            print(f"  p99 {quantiles[2]:7.3f}  ({1e3 * len(times) / sum(times):.0f} a second)")
        print(f"  {'calls of eight clients':32} {await eight_clients(sandbox):.0f} a second")


async def main() -> None:
    for backend in sys.argv[1:] or ["namespaces", "landlock"]:
        for preload in ((), ("numpy", "sympy")):
            config = {"backend": backend, "preload": preload}
            await measure(SandboxConfig.model_validate(config))


if __name__ == "__main__":
    asyncio.run(main())

"""Measures one kind of work, done by one client or by several at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.benchmarks.sandbox.rival import Client, Host

PRINT = "print(6 * 7)"
IMPORT = "import sympy\nx = sympy.Symbol('x')\n"
FACTOR = "print(sympy.factor(x**6 - 1))"
_EXPECTED = {
    PRINT: "42\n",
    FACTOR: "(x - 1)*(x + 1)*(x**2 - x + 1)*(x**2 + x + 1)\n",
}
_MAX_ROUNDS = 4000
_MIN_ROUNDS = 3

Round = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Times:
    """The result of `measure`. The percentiles are those of single rounds."""

    num_rounds: int
    num_failed: int
    """Number of failed rounds, which are not in `num_rounds`."""
    p50_ms: float
    p95_ms: float
    p99_ms: float
    per_s: float
    """Rounds per second, of all clients together."""


async def measure(rounds: list[Round], seconds: float) -> Times:
    """Let each client do rounds until the time is over, but at least three.

    Raises:
        RuntimeError: Most rounds failed.
    """
    times: list[float] = []
    failures: list[RuntimeError] = []
    began = time.perf_counter()

    async def client(one_round: Round) -> None:
        for number in range(_MAX_ROUNDS):
            started = time.perf_counter()
            if number >= _MIN_ROUNDS and started - began > seconds:
                return
            try:
                await one_round()
            except RuntimeError as error:
                failures.append(error)
            else:
                times.append(time.perf_counter() - started)

    await asyncio.gather(*map(client, rounds))
    if len(failures) > len(times):
        raise failures[0]
    per_s = len(times) / (time.perf_counter() - began)
    times.sort()
    p50, p95, p99 = (1e3 * times[int(len(times) * share)] for share in (0.5, 0.95, 0.99))
    return Times(len(times), len(failures), p50, p95, p99, per_s)


async def _expect(client: Client, work: str, before: str = "") -> None:
    printed = await client.call(before + work)
    if printed != _EXPECTED[work]:
        raise RuntimeError(f"it printed {printed!r}, not {_EXPECTED[work]!r}")


async def _warm(host: Host, clients: int, before: str) -> list[Client]:
    opened = [await host.open() for _ in range(clients)]
    for client in opened:
        await client.call(before + "print()")
    return opened


async def _calls(host: Host, clients: int, seconds: float, work: str, before: str) -> Times:
    opened = await _warm(host, clients, before)
    try:
        return await measure([lambda c=c: _expect(c, work) for c in opened], seconds)
    finally:
        for client in opened:
            await client.close()


async def prints(host: Host, clients: int, seconds: float) -> Times:
    """A call that prints, in a live interpreter."""
    return await _calls(host, clients, seconds, PRINT, "")


async def sympy_calls(host: Host, clients: int, seconds: float) -> Times:
    """A call that factors, in a live interpreter that has imported sympy."""
    return await _calls(host, clients, seconds, FACTOR, IMPORT)


async def imports_and_sympy_calls(host: Host, clients: int, seconds: float) -> Times:
    """A call that imports sympy and factors, where nothing is kept between calls."""
    opened = [await host.open() for _ in range(clients)]
    return await measure([lambda c=c: _expect(c, FACTOR, IMPORT) for c in opened], seconds)


async def new_sessions(host: Host, clients: int, seconds: float) -> Times:
    """A new session: open it, make one call that prints, close it."""

    async def one_round() -> None:
        client = await host.open()
        await _expect(client, PRINT)
        await client.close()

    return await measure([one_round] * clients, seconds)


async def forks(host: Host, clients: int, seconds: float) -> Times:
    """A live copy of an interpreter with state: make it, make one call that prints, close it."""
    opened = await _warm(host, clients, "state = list(range(1000))\n")

    async def one_round(client: Client) -> None:
        branch = await client.fork()
        await _expect(branch, PRINT)
        await branch.close()

    try:
        return await measure([lambda c=c: one_round(c) for c in opened], seconds)
    finally:
        for client in opened:
            await client.close()

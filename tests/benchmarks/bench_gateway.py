"""How much a request takes in the gateway: 64 clients, an engine that answers at once.

    python -m tests.benchmarks.bench_gateway [CLIENTS] [REQUESTS]

Clients speak HTTP themselves and are in a process of their own, so that what an official client
takes for itself is not counted. Each has a conversation of eight turns with a tool's results.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time

from aiohttp import ClientSession

from tests.agents.served import gateway
from tests.agents.templates import TOOL, Scripted
from tir_alp.agents.session import Session, SessionSettings

_TURNS = 8
_REPLY = "The result so far is 42, and I go on with the next step of the plan."


async def talk(session: ClientSession, url: str, key: str, requests: int) -> list[float]:
    """Have conversations one after another; return the duration of each request, in seconds."""
    took: list[float] = []
    messages: list[dict[str, str]] = []
    headers = {"Authorization": f"Bearer {key}"}
    for number in range(requests):
        if number % _TURNS == 0:
            messages = [{"role": "user", "content": f"task {number}: " + "work on it. " * 20}]
        body = {"model": "m", "messages": messages, "tools": [TOOL]}
        began = time.perf_counter()
        async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as got:
            reply = await got.json()
        took.append(time.perf_counter() - began)
        messages.append(reply["choices"][0]["message"])
        messages.append({"role": "user", "content": "And now? " * 20})
        await asyncio.sleep(0.2)  # as long as an agent thinks, or a model
    return took


async def clients(requests: int) -> None:
    """Play the clients of the endpoints that the standard input names; print the durations."""
    endpoints = json.load(sys.stdin)
    async with ClientSession() as session:
        found = await asyncio.gather(*(talk(session, url, key, requests) for url, key in endpoints))
    print(json.dumps([each for one in found for each in one]))


async def main(num_clients: int, requests: int) -> None:
    """Serve, and print what the clients measured."""
    engine = Scripted(_REPLY)
    async with gateway() as (made, encodes):
        settings = SessionSettings(max_context_tokens=1 << 16)
        endpoints = [
            made.open(Session(engine.generate, encodes, settings)) for _ in range(num_clients)
        ]
        named = json.dumps([[each.url, each.key] for each in endpoints])
        command = [sys.executable, "-m", "tests.benchmarks.bench_gateway", "clients", str(requests)]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        began, used = time.perf_counter(), time.process_time()
        printed, _ = await process.communicate(named.encode())
        wall, cpu = time.perf_counter() - began, time.process_time() - used
    took = sorted(1000 * each for each in json.loads(printed))
    p50, p95 = statistics.median(took), took[int(0.95 * len(took))]
    print(f"{num_clients} clients, {len(took)} requests in {wall:.1f} s")
    print(f"p50 {p50:.2f} ms, p95 {p95:.2f} ms; {1000 * cpu / len(took):.2f} ms of CPU per request")


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["clients"]:
        asyncio.run(clients(int(words[1])))
    else:
        count, each = [*map(int, words), 64, 16][:2] if len(words) < 2 else map(int, words)
        asyncio.run(main(count, each))

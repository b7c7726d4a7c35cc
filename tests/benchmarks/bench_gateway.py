"""What the gateway adds: to a request, and to the generation of a model.

    python -m tests.benchmarks.bench_gateway [CLIENTS] [REQUESTS]
    python -m tests.benchmarks.bench_gateway tokens [MODEL] [TOKENS] [ROUNDS]

The first has an engine that answers at once, and clients with conversations of eight turns with a
tool's results. The second samples the same completions with a model, directly and through the
gateway, by turns. Clients speak HTTP themselves and are in a process of their own, so that what an
official client takes for itself is not counted.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from contextlib import asynccontextmanager

from aiohttp import ClientSession

from tests.agents.served import gateway
from tests.agents.templates import TOOL, Scripted
from tir_alp.agents.dialogue_encoder import DialogueEncoder
from tir_alp.agents.gateway import Gateway
from tir_alp.agents.messages import Dialogue, Message
from tir_alp.agents.session import Session, SessionSettings
from tir_alp.engines.base import Completion, Sampling
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.models.resolve import resolve
from tir_alp.training.policy import load_policy, load_tokenizer
from tir_alp.types import StopReason

_TURNS, _THINKS_S = 8, 0.2
_REPLY = "The result so far is 42, and I go on with the next step of the plan."
_CLIENTS = 64


class AtOnce(Scripted):
    """An engine that always has the same answer, and takes no time for it."""

    def __init__(self) -> None:
        super().__init__(_REPLY)
        ids = tuple(self.tokenizer.encode(_REPLY + self.end, add_special_tokens=False))
        self.answer = Completion(
            token_ids=ids,
            logprobs=(-0.1,) * len(ids),
            stop_reason=StopReason.EOS,
            policy_version=0,
        )

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        """Return the answer."""
        return self.answer


async def talk(session: ClientSession, url: str, key: str, requests: int) -> list[float]:
    """Have conversations one after another; return the duration of each request, in seconds."""
    took: list[float] = []
    messages: list[dict[str, str]] = []
    headers = {"Authorization": f"Bearer {key}"}
    for number in range(requests):
        # As long as an agent thinks, or a model; for each another time, so that they do not ask
        # all at once.
        await asyncio.sleep(random.expovariate(1 / _THINKS_S))
        if number % _TURNS == 0:
            messages = [{"role": "user", "content": f"task {number}: " + "work on it. " * 20}]
        body = {"model": "m", "messages": messages, "tools": [TOOL]}
        began = time.perf_counter()
        async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as got:
            reply = await got.json()
        took.append(time.perf_counter() - began)
        messages.append(reply["choices"][0]["message"])
        messages.append({"role": "user", "content": "And now? " * 20})
    return took


async def clients(requests: int) -> None:
    """Play the clients of the endpoints that the standard input names; print the durations."""
    endpoints = json.load(sys.stdin)
    async with ClientSession() as session:
        found = await asyncio.gather(*(talk(session, url, key, requests) for url, key in endpoints))
    print(json.dumps([each for one in found for each in one]))


async def overhead(num_clients: int, requests: int) -> None:
    """Serve, and print what the clients measured."""
    engine = AtOnce()
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
    print(f"{num_clients} clients, {len(took)} requests in {wall:.1f} s, load {_load()}")
    print(f"p50 {p50:.2f} ms, p95 {p95:.2f} ms; {1000 * cpu / len(took):.2f} ms of CPU per request")


def question(number: int) -> str:
    """Return the question of a client."""
    return f"What is {number}*37+{number}?"


async def asking() -> None:
    """Ask the endpoints of each line of the standard input at once; print when all are answered."""
    async with ClientSession() as session:

        async def ask(number: int, url: str, key: str) -> None:
            body = {"model": "m", "messages": [{"role": "user", "content": question(number)}]}
            headers = {"Authorization": f"Bearer {key}"}
            async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as it:
                assert it.status == 200, await it.text()

        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            named = enumerate(json.loads(line))
            await asyncio.gather(*(ask(number, url, key) for number, (url, key) in named))
            print("done", flush=True)


@asynccontextmanager
async def asker():
    """Yield a function that asks endpoints in another process, and returns at the last answer."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_gateway", "asking"]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    written, read = process.stdin, process.stdout
    assert written is not None and read is not None

    async def ask(named: str) -> None:
        written.write(f"{named}\n".encode())
        assert await read.readline() == b"done\n"

    assert await read.readline() == b"ready\n"
    yield ask
    written.close()
    await process.wait()


async def tokens(model: str, most: int, rounds: int) -> None:
    """Print tokens per second of a model, directly and through the gateway.

    The ratio of the processor's time is what a machine without other load would show, but for the
    clients, whose process it leaves out.
    """
    path = resolve(model)
    encoder = DialogueEncoder(load_tokenizer(path))
    engine = TransformersEngine(load_policy(path), max_cache_tokens=1 << 16)
    sampled = 0
    never = frozenset[int]()  # so that completions are equally long

    async def generate(token_ids, sampling):
        nonlocal sampled
        found = await engine.generate(token_ids, sampling)
        sampled += len(found.token_ids)
        return found

    encoder.stop_token_ids = never
    settings = SessionSettings(max_context_tokens=1024, max_turn_tokens=most)
    made, rates = Gateway(encoder), {"directly": [], "through the gateway": []}
    per_cpu = {name: [] for name in rates}
    await made.start()

    async def directly() -> None:
        async def one(number: int) -> None:
            shown = encoder.opening(Dialogue((Message("user", question(number)),)))
            sampling = Sampling(max_tokens=most, temperature=1.0, stop_token_ids=never)
            await generate(shown, sampling)

        await asyncio.gather(*map(one, range(_CLIENTS)))

    async def through() -> None:
        ended = [made.open(Session(generate, encoder, settings)) for _ in range(_CLIENTS)]
        await ask(json.dumps([[each.url, each.key] for each in ended]))
        for each in ended:
            await made.end(each)

    async with asker() as ask:
        for _ in range(rounds + 1):
            for name, work in (("directly", directly), ("through the gateway", through)):
                sampled, began, used = 0, time.perf_counter(), time.process_time()
                await work()
                rates[name].append(sampled / (time.perf_counter() - began))
                per_cpu[name].append(sampled / (time.process_time() - used))
    await made.close()
    await engine.close()
    for name, found in rates.items():
        print(f"{name}: {statistics.median(found[1:]):,.0f} tokens/s")
    for what, both in (("time", rates), ("time of the processor", per_cpu)):
        pairs = [b / a for a, b in zip(*both.values(), strict=True)][1:]  # without the warm-up
        low, middle, high = statistics.quantiles(pairs, n=4)
        print(f"ratio by {what} {middle:.3f}, middle half {low:.3f} to {high:.3f}")
    print(f"{rounds} rounds, load {_load()}")


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["clients", number]:
            asyncio.run(clients(int(number)))
        case ["asking"]:
            asyncio.run(asking())
        case ["tokens", *rest]:
            model, most, rounds = rest + ["tiny-able", "192", "5"][len(rest) :]
            asyncio.run(tokens(model, int(most), int(rounds)))
        case words:
            found = [*map(int, words)]
            asyncio.run(overhead(*(found + [64, 16][len(found) :])))

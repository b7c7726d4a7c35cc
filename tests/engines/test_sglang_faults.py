"""SGLang: servers and routers that fail."""

import asyncio
import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.engines.faulty_proxy import proxy_of
from tests.engines.harness import (
    PROMPTS,
    distance,
    needs_sglang,
    served_by,
    write_model,
)
from tests.engines.sglang import NEW, OLD, PATIENCE, PROMPT, run, until
from tir_alp.config import SGLangConfig
from tir_alp.engines.base import EngineContext, EngineFailed, Sampling
from tir_alp.models.tiny import BASE
from tir_alp.types import StopReason

pytestmark = [needs_sglang, pytest.mark.timeout(900)]

# ------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error", "answered 500: out of order"),
        ("truncate", "broke off"),
        ("drip", "sent no event within 4 s"),
    ],
)
def test_a_request_that_fails_is_reported_and_not_repeated(sglang_url, fault, message):
    async def work():
        async with (
            proxy_of(sglang_url, fault=fault, num_faults=0) as proxy,
            served_by((proxy.url,), OLD, stall_timeout_s=60) as engine,
        ):
            engine.fleet.servers[0].client._stall_timeout_s = 4.0 if fault == "drip" else 60.0
            proxy.num_faults = 1
            before = proxy.paths.count("/generate")
            with pytest.raises(EngineFailed, match=message):
                await engine.generate(PROMPT, Sampling(max_tokens=30))
            assert proxy.paths.count("/generate") == before + 1
            engine.fleet.servers[0].client._stall_timeout_s = 60.0
            return await engine.generate(PROMPT, Sampling(max_tokens=30))

    assert run(work()).stop_reason is StopReason.LENGTH


def test_a_request_that_was_not_accepted_is_repeated(sglang_url):
    async def work():
        async with (
            proxy_of(sglang_url, fault="refuse", num_faults=0) as proxy,
            served_by((proxy.url,), OLD) as engine,
        ):
            proxy.num_faults = 2
            return await engine.generate(PROMPT, Sampling(max_tokens=30))

    assert len(run(work()).token_ids) == 30


def test_a_server_that_fails_request_after_request_is_lost_and_verified_anew(sglang_url):
    said: list[str] = []

    async def work():
        async with (
            proxy_of(sglang_url, fault="error", num_faults=0) as proxy,
            served_by((proxy.url,), OLD, said.append) as engine,
        ):
            proxy.num_faults = 3
            attempts = [engine.generate(PROMPT, Sampling(max_tokens=30)) for _ in range(3)]
            results = await asyncio.gather(*attempts, return_exceptions=True)
            assert all(isinstance(result, EngineFailed) for result in results)
            return await engine.generate(PROMPT, Sampling(max_tokens=30))

    assert distance({0: OLD}, PROMPT, run(work())) < 1e-4
    assert "3 requests failed in a row" in said[1] and "is back" in said[-1]


def session_of(pid: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def wait_until_gone(sessions: list[int]) -> None:
    """Killed processes with much memory take a moment to end."""
    deadline = time.monotonic() + PATIENCE
    while left := [pid for session in sessions for pid in session_of(session)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.2)


def shared_memory_of(session: int) -> set[int]:
    """Inodes of the files in /dev/shm that processes of a session have mapped.

    A semaphore is mapped under another name than its final one.
    """
    found = set()
    for pid in session_of(session):
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text()
            found |= {int(inode) for inode in re.findall(r" (\d+) +/dev/shm/", maps)}
    return found


@pytest.mark.slow
def test_servers_and_router_that_are_killed_or_frozen_are_replaced(monkeypatch, tmp_path):
    """Two servers and a router in front of them. One server is killed, and its first restart fails
    because there is no descriptor; the other is frozen, the router is killed, and at the end all
    restarts fail.
    """
    from tir_alp.engines.servers.http_client import ServerFailed
    from tir_alp.engines.sglang import process as sglang_process
    from tir_alp.engines.sglang.engine import open_sglang

    free_port = sglang_process.free_port
    num_full = 0

    def port_of_a_full_machine() -> int:
        nonlocal num_full
        if num_full > 0:
            num_full -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return free_port()

    monkeypatch.setattr(sglang_process, "free_port", port_of_a_full_machine)
    said: list[str] = []
    config = SGLangConfig(
        type="sglang",
        device="cpu",
        dtype="float32",
        max_cache_tokens=1 << 14,
        num_servers=2,
        router="local",
        stall_timeout_s=30,
    )
    sessions: list[int] = []
    shared: set[int] = set()
    tokens: Counter[int] = Counter()

    def sampling(uid: int, max_tokens: int) -> Sampling:
        def watch():
            return lambda _: tokens.update((uid,)) or False

        return Sampling(max_tokens=max_tokens, sequence_uid=uid, stop_matcher=watch)

    async def patiently(engine, uid: int):
        """Request a completion until one succeeds: some requests precede the notice of a loss."""
        while True:
            with contextlib.suppress(EngineFailed):
                completion = await engine.generate(PROMPT, sampling(uid, 30))
                assert completion.policy_version == 1
                assert distance({1: NEW}, PROMPT, completion) < 1e-4
                return completion

    async def work():
        nonlocal num_full
        context = EngineContext(path=write_model(tmp_path), on_update="keep", log=said.append)
        async with open_sglang(config, context) as engine:
            await engine.load_weights(NEW.state_dict(), 1)
            servers: Any = engine.fleet.servers
            router: Any = engine.router
            sessions.extend(each.process.pid for each in (*servers, router))
            shared.update(*map(shared_memory_of, sessions))

            # Turns of a sequence go to the server that has its earlier turns in the cache.
            firsts = [(*PROMPTS[2], 100 + uid) for uid in range(4)]
            turns = await asyncio.gather(
                *(engine.generate(ids, sampling(uid, 20)) for uid, ids in enumerate(firsts))
            )
            cached = engine.health()["tokens_cached"]
            for uid, (ids, turn) in enumerate(zip(firsts, turns, strict=True)):
                await engine.generate((*ids, *turn.token_ids, 9, 9), sampling(uid, 2))
            assert engine.health()["tokens_cached"] - cached >= 4 * (51 + 19)

            os.kill(router.process.pid, signal.SIGKILL)
            await until(lambda: not router.serves)
            await patiently(engine, 5)  # without the router
            await until(lambda: "SGLang's router is back" in said)

            longs = []
            for uid in (6, 7):  # one after the other: the router goes by the requests it has
                longs.append(asyncio.create_task(engine.generate(PROMPT, sampling(uid, 900))))
                await until(lambda uid=uid: tokens[uid] > 2)
            assert [len(server.requests) for server in servers] == [1, 1]
            num_full = 1
            os.kill(servers[0].process.pid, signal.SIGKILL)
            for pid in session_of(servers[1].process.pid):
                os.kill(pid, signal.SIGSTOP)
            for long in longs:
                with pytest.raises(EngineFailed, match=r"was lost|sent no event|broke off"):
                    await long
            await patiently(engine, 8)
            await until(lambda: sum("is back, with verified" in line for line in said) == 2)
            await until(lambda: router._is_settled)
            await asyncio.gather(*(patiently(engine, uid) for uid in (9, 10)))

            sessions.extend(each.process.pid for each in (*servers, router))
            shared.update(*map(shared_memory_of, sessions))
            num_full = 1 << 30
            for server in servers:
                os.kill(server.process.pid, signal.SIGKILL)
            with pytest.raises(EngineFailed, match=r"lost 3 times in a row.* Too many open files"):
                while True:
                    with contextlib.suppress(ServerFailed):  # sent before the loss was noticed
                        await engine.generate(PROMPT, sampling(11, 3))

    run(work(), 850)
    assert sum("did not come back: [Errno 24] Too many open files" in line for line in said) >= 4
    assert sum("is back, with verified weights of 1" in line for line in said) == 2
    assert len(set(sessions)) == 6
    wait_until_gone(sessions)
    assert len(shared) >= 8  # a file and a semaphore of each server that ran
    assert not [each.name for each in os.scandir("/dev/shm") if each.inode() in shared]


def test_nothing_of_a_server_outlives_the_process_that_started_it(tmp_path):
    program = f"""
        import asyncio, pathlib
        from tir_alp.engines.sglang import process as sglang
        from tir_alp.config import SGLangConfig
        from tir_alp.engines.sglang.process import SGLangProcess
        async def main():
            config = SGLangConfig(type="sglang", device="cpu", dtype="float32")
            process = SGLangProcess(
                "server",
                sglang.server_arguments(config, {str(BASE)!r}, 0, 0, 0),
                sglang.server_environment(config, {str(BASE)!r}),
                pathlib.Path({str(tmp_path)!r}) / "log", "key", print,
            )
            await process.listen()
            print(process.pid, flush=True)
            await process.ended()
        asyncio.run(main())
    """
    starter = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    server = int(starter.stdout.readline())
    deadline = time.monotonic() + PATIENCE
    while len(session_of(server)) < 3:  # until the scheduler runs as well
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.2)
    starter.kill()
    starter.wait()
    wait_until_gone([server])

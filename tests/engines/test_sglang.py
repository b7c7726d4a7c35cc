"""Real SGLang servers: weights, versions, and what is left when something breaks."""

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.faulty_proxy import proxy_of
from tests.engines.harness import (
    PROMPTS,
    VOCABULARY,
    distance,
    logprobs,
    logprobs_of,
    model,
    needs_sglang,
    served,
    served_by,
    write_model,
)
from tir_alp.config import SGLangConfig
from tir_alp.engines.base import EngineContext, EngineFailed, Probe, Sampling
from tir_alp.engines.probe import check_probe
from tir_alp.models.tiny import BASE, TRAIN_CONFIG
from tir_alp.rollouts.renderer import Renderer
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.training.policy import load_tokenizer
from tir_alp.types import StopReason

pytestmark = [needs_sglang, pytest.mark.timeout(900)]

OLD, NEW = model(0), model(1)
PROMPT = PROMPTS[0]
PATIENCE = 600.0
"""Seconds that a test may wait for a condition on a busy machine."""


def run(work, timeout: float = PATIENCE):
    return asyncio.run(asyncio.wait_for(work, timeout))


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.05)


def drifted(seed: int, versions: int):
    """A model that takes a small step for each version, as training does."""
    models = {0: model(seed)}
    torch.manual_seed(seed)
    for version in range(1, versions + 1):
        models[version] = model(seed)
        models[version].load_state_dict(models[version - 1].state_dict())
        with torch.no_grad():
            for parameter in models[version].parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return models


# ---------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("way", ["disk", "tensor", "distributed"])
def test_after_five_updates_the_engine_is_the_trainer_to_float32(sglang_url, way, tmp_path):
    """3,072 tokens at either temperature. The engine verifies each update."""
    models = drifted(3, 5)

    async def work():
        settings = {"weights": way, "weights_folder": tmp_path, "max_running": 32}
        async with served(sglang_url, models[0], **settings) as engine:
            for version in range(1, 6):
                await engine.load_weights(models[version].state_dict(), version)
            return {
                temperature: await asyncio.gather(
                    *(
                        engine.generate(
                            PROMPTS[uid % 4],
                            Sampling(max_tokens=96, temperature=temperature, sequence_uid=uid),
                        )
                        for uid in range(32)
                    )
                )
                for temperature in (1.0, 0.7)
            }

    for temperature, completions in run(work()).items():
        assert sum(len(each.token_ids) for each in completions) == 3072
        for uid, completion in enumerate(completions):
            assert completion.policy_version == 5
            assert distance(models, PROMPTS[uid % 4], completion, temperature) < 1e-4
    before = logprobs_of(models[4], PROMPTS[0], completions[0], 0.7)
    assert before.sub(torch.tensor(completions[0].logprobs)).abs().max() > 1e-3


def test_an_update_during_completions_splits_them_where_it_happens(sglang_url):
    models = {0: OLD, 1: NEW}
    tokens: list[int] = []

    def watch():
        return lambda token_id: tokens.append(token_id) or False

    async def work():
        async with served(sglang_url, OLD) as engine:
            sampling = Sampling(max_tokens=400, stop_matcher=watch)
            running = asyncio.create_task(engine.generate(PROMPT, sampling))
            await until(lambda: len(tokens) > 20)
            await engine.load_weights(NEW.state_dict(), 1)
            return await running

    completion = run(work())
    first, second = completion.version_spans
    assert (first.version, second.version) == (completion.policy_version, 1) == (0, 1)
    assert 20 < first.stop < 400 == second.stop
    assert distance(models, PROMPT, completion) < 1e-4
    wrong_way_round = {0: NEW, 1: OLD}
    assert distance(wrong_way_round, PROMPT, completion) > 1e-2


def test_weights_that_wait_are_loaded_between_two_completions(sglang_url):
    tokens: list[int] = []

    def watch():
        return lambda token_id: tokens.append(token_id) or False

    async def work():
        async with served(sglang_url, OLD, on_update="wait") as engine:
            long = Sampling(max_tokens=200, stop_matcher=watch)
            running = asyncio.create_task(engine.generate(PROMPT, long))
            await until(lambda: len(tokens) > 20)
            loading = asyncio.create_task(engine.load_weights(NEW.state_dict(), 1))
            await until(lambda: not engine._gate.is_set())
            later = await engine.generate(PROMPT, Sampling(max_tokens=9, sequence_uid=1))
            await loading
            return await running, later

    completion, later = run(work())
    assert (completion.policy_version, completion.version_spans) == (0, ())
    assert (later.policy_version, later.version_spans) == (1, ())
    assert distance({0: OLD, 1: NEW}, PROMPT, completion) < 1e-4
    assert distance({0: OLD, 1: NEW}, PROMPT, later) < 1e-4


def test_a_server_with_other_weights_than_it_should_have_does_not_pass(sglang_url):
    from tir_alp.engines.servers.http_client import ServerFailed
    from tir_alp.engines.servers.weights import WeightSnapshot, snapshot_tensors
    from tir_alp.engines.sglang.weights import verify_tensors

    slightly = model(0)
    with torch.no_grad():
        slightly.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    tensors = snapshot_tensors(slightly.state_dict(), torch.float32)
    only = {"model.layers.1.mlp.down_proj.weight": tensors["model.layers.1.mlp.down_proj.weight"]}

    async def work():
        async with served(sglang_url, OLD) as engine:
            client = engine.fleet.servers[0].client
            with pytest.raises(ServerFailed, match=r"down_proj.weight' differs from the trainer's"):
                await verify_tensors(client, WeightSnapshot(0, only, None))
            whole = snapshot_tensors(OLD.state_dict(), torch.float32)
            assert (await verify_tensors(client, WeightSnapshot(0, whole, None))).num_compared == 4
            reported = await client.prompt_logprobs(PROMPTS[2])

            def check(shift):
                probe = Probe(PROMPTS[2], tuple(each + shift for each in reported))
                return check_probe(probe, reported, "float32", server=client.url, version=0)

            assert check(0.0) < 1e-5
            with pytest.raises(EngineFailed, match=r"are 0\.002 nats from the trainer's"):
                check(2e-3)

    run(work())


def test_without_reported_tensors_the_probe_alone_verifies_and_is_required(sglang_url):
    """SGLang answers 400 for Qwen3 and other classes that are not related to Llama."""
    from tir_alp.engines.servers.http_client import ServerFailed
    from tir_alp.engines.sglang.weights import verify_tensors

    said: list[str] = []

    async def ask_trainer(token_ids):
        return probe_of(OLD, token_ids)

    async def work():
        async with (
            proxy_of(sglang_url, path="/get_weights_by_name", fault="unknown") as proxy,
            served_by((proxy.url,), None, said.append, ask_trainer=ask_trainer) as engine,
        ):
            await engine.load_weights(OLD.state_dict(), 1)
            assert engine.health()["tensors_compared"] == 0
            assert 0 < engine.health()["probe_difference"] < 1e-5
            snapshot = replace(engine.fleet.snapshot, probe=None)
            with pytest.raises(ServerFailed, match=r"reports none of 4 .* no probe: nothing shows"):
                await verify_tensors(engine.fleet.servers[0].client, snapshot)

    # The server starts with other weights than the trainer has, and gets those first.
    run(given(sglang_url, OLD))
    run(work())
    assert "new weights are verified by the logprobs of a probe alone" in said[0]


def probe_of(of, token_ids) -> Probe:
    every = logprobs(of, token_ids)
    said = every[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()
    return Probe(token_ids, tuple(said))


def test_an_engine_in_an_actor_verifies_by_the_probe_that_comes_with_the_weights(sglang_url):
    """As in an actor of a cluster. The server reports no tensors here either."""
    pytest.importorskip("ray")
    from tir_alp.cluster.engine_host import EngineHost
    from tir_alp.cluster.packed_weights import pack

    packed = pack(OLD.state_dict())

    async def work():
        async with proxy_of(sglang_url, path="/get_weights_by_name", fault="unknown") as proxy:
            engine = {"type": "sglang", "urls": [proxy.url], "device": "cpu", "dtype": "float32"}
            config = load_config([], read_toml(TRAIN_CONFIG) | {"engine": engine})
            host = EngineHost()
            await host.start(config, str(BASE), 0, Renderer(load_tokenizer(str(BASE))))
            try:
                health = await host.load_weights(packed, 1, probe_of(OLD, PROMPTS[2]))
                assert health["tensors_compared"] == 0 < health["probe_difference"] < 1e-5
                with pytest.raises(EngineFailed, match="does not sample from the weights"):
                    await host.load_weights(packed, 2, probe_of(model(1), PROMPTS[2]))
            finally:
                await host.stop()

    run(work())


async def given(url: str, of) -> None:
    """Give a server the weights of a model, and leave it."""
    async with served(url, of):
        pass


@pytest.mark.parametrize("router", ["none", "local"])
def test_what_a_half_updated_server_samples_is_refused_until_it_is_whole(sglang_url, router):
    """Meanwhile a router has no server; it gets the server back."""
    said: list[str] = []

    async def work():
        async with (
            proxy_of(sglang_url, path="/end_weight_update", fault="error", num_faults=0) as proxy,
            served_by((proxy.url,), OLD, said.append, weights="tensor", router=router) as engine,
        ):
            running = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=900)))
            await until(lambda: engine.health()["running"] == 1)
            proxy.num_faults = 1
            await engine.load_weights(NEW.state_dict(), 1)
            with pytest.raises(EngineFailed, match="was lost: its weights could not be updated"):
                await running
            if (routed := engine.router) is not None:
                await until(lambda: routed.serves)
            return await engine.generate(PROMPT, Sampling(max_tokens=30))

    completion = run(work())
    assert completion.policy_version == 1
    assert distance({1: NEW}, PROMPT, completion) < 1e-4
    assert any("is back, with verified weights of 1" in line for line in said)


def test_memory_is_lent_in_order_and_weights_come_back(sglang_url):
    """On a CPU the server frees nothing, but does and checks everything else."""
    tokens: list[int] = []

    def watch():
        return lambda token_id: tokens.append(token_id) or False

    async def work():
        async with (
            proxy_of(sglang_url) as proxy,
            served_by((proxy.url,), OLD, release_memory=True) as engine,
        ):
            sampling = Sampling(max_tokens=100, stop_matcher=watch)
            running = asyncio.create_task(engine.generate(PROMPT, sampling))
            await until(lambda: tokens)
            proxy.paths.clear()
            await engine.lend_memory()  # waits: a running request would crash the server
            assert await running
            waiting = asyncio.create_task(engine.generate(PROMPT, Sampling(max_tokens=9)))
            await engine.load_weights(NEW.state_dict(), 1)
            return await waiting, proxy.paths

    completion, paths = run(work())
    assert paths[:5] == [
        "/flush_cache",
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/pause_generation",
        "/update_weights_from_disk",
    ]
    assert completion.policy_version == 1
    assert distance({1: NEW}, PROMPT, completion) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_that_is_lent_is_free(tmp_path):
    from tir_alp.engines.sglang.engine import open_sglang

    config = SGLangConfig(
        type="sglang", max_cache_tokens=1 << 18, weights="tensor", release_memory=True
    )

    async def work():
        context = EngineContext(path=write_model(tmp_path), on_update="keep")
        async with open_sglang(config, context) as engine:
            before, _ = torch.cuda.mem_get_info()
            await engine.lend_memory()
            between, _ = torch.cuda.mem_get_info()
            await engine.load_weights(NEW.state_dict(), 1)
            assert (await engine.generate(PROMPT, Sampling(max_tokens=9))).policy_version == 1
            return between - before

    config_of = model().config
    width = 2 * config_of.num_key_value_heads * config_of.head_dim * config_of.num_hidden_layers
    assert run(work()) >= 2 * width * (1 << 18)  # bytes of the cache in bfloat16


# ---------------------------------------------------------------------------------------- requests


def test_a_token_out_of_the_vocabulary_is_refused_before_it_ends_the_server(sglang_url):
    async def work():
        async with served(sglang_url, OLD) as engine:
            with pytest.raises(ValueError, match="not in the vocabulary: ids go from 0 to 261"):
                await engine.generate((5, VOCABULARY), Sampling(max_tokens=5))
            await engine.generate((5, VOCABULARY - 1), Sampling(max_tokens=5))

    run(work())


def test_a_wrong_key_is_reported(sglang_url, monkeypatch):
    monkeypatch.setenv("TIR_ALP_SGLANG_KEY", "wrong")

    async def work():
        async with served(sglang_url, OLD, start_timeout_s=1):
            pass

    with pytest.raises(ValueError, match="cannot start: there is no healthy SGLang server at http"):
        run(work())


def test_a_router_with_servers_of_others_is_refused(sglang_url, router_url):
    async def work():
        async with (
            proxy_of(sglang_url) as ours,
            served_by((ours.url,), None, router=router_url),
        ):
            pass

    with pytest.raises(ValueError, match=f"does not have, the first is {sglang_url}: name all of"):
        run(work())


def test_a_router_that_does_not_come_back_is_given_up(sglang_url, router_url):
    said: list[str] = []

    async def work():
        async with (
            proxy_of(router_url, path="/workers", fault="error", num_faults=0) as front,
            served_by((sglang_url,), OLD, said.append, router=front.url) as engine,
        ):
            router: Any = engine.router
            await engine.generate(PROMPT, Sampling(max_tokens=3))
            assert front.paths.count("/generate") == 1
            hasty = {"stall_timeout_s": 0.1, "start_timeout_s": 0.1}
            router._config = router._config.model_copy(update=hasty)
            front.num_faults = 1 << 30
            await until(lambda: router._changed.set() or "is given up" in said[-1])
            completion = await engine.generate(PROMPT, Sampling(max_tokens=3))
            assert front.paths.count("/generate") == 1
            return completion

    assert distance({0: OLD}, PROMPT, run(work())) < 1e-4
    assert sum("answered 500: out of order" in line for line in said) == 4


def test_turns_of_a_sequence_and_samples_of_a_prompt_stay_on_one_server(sglang_url):
    async def work():
        async with (
            proxy_of(sglang_url) as first,
            proxy_of(sglang_url) as second,
            served_by((first.url, second.url), None) as engine,
        ):
            homes = []
            for uid, prompt in enumerate([PROMPTS[0]] * 3 + [PROMPTS[1]] * 3):
                for turn in range(2):
                    before = first.paths.count("/generate")
                    sampling = Sampling(max_tokens=2, sequence_uid=uid)
                    await engine.generate((*prompt, *[9] * turn), sampling)
                    homes.append(first.paths.count("/generate") - before)
            crowd = [
                engine.generate(PROMPTS[2], Sampling(max_tokens=30, sequence_uid=uid))
                for uid in range(100, 140)
            ]
            before = second.paths.count("/generate")
            await asyncio.gather(*crowd)
            return homes, second.paths.count("/generate") - before

    homes, num_moved = run(work())
    assert len({tuple(homes[index : index + 6]) for index in (0, 6)}) <= 2
    assert all(len(set(homes[index : index + 6])) == 1 for index in (0, 6))
    assert 8 <= num_moved <= 32  # many samples are divided all the same


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

            longs = [
                asyncio.create_task(engine.generate(PROMPT, sampling(uid, 900))) for uid in (6, 7)
            ]
            await until(lambda: min(tokens[6], tokens[7]) > 2)
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

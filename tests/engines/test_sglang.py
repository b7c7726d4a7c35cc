"""SGLang: weights and requests, against a real server."""

import asyncio
from dataclasses import replace
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
from tests.engines.sglang import NEW, OLD, PROMPT, drifted, run, until
from tir_alp.config import SGLangConfig
from tir_alp.engines.base import EngineContext, EngineFailed, Probe, Sampling
from tir_alp.engines.probe import check_probe
from tir_alp.models.tiny import BASE, TRAIN_CONFIG
from tir_alp.rollouts.renderer import Renderer
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.training.policy import load_tokenizer

pytestmark = [needs_sglang, pytest.mark.timeout(900)]

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

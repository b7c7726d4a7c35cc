"""The roles of a run as actors of a real Ray cluster, started once for all tests here.

The cluster has two nodes, both on this machine, and the tests are clients of it, as a run with
`--cluster ray://HOST:PORT` is. The environment has no sandbox, so that runners start fast.
"""

import asyncio
import contextlib
import itertools
import os
import re
import signal
import socket
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

pytest.importorskip("ray")

import ray
from ray.cluster_utils import Cluster as Nodes
from ray.util.placement_group import placement_group_table

from tests.cluster.fragile import FragileRank
from tir_alp.cluster import placement as cluster_module
from tir_alp.cluster import sandbox_host
from tir_alp.cluster.engine_pool import EnginePool
from tir_alp.cluster.environment_pool import EnvironmentPool
from tir_alp.cluster.packed_weights import pack, unpack
from tir_alp.cluster.placement import open_cluster
from tir_alp.cluster.poison_tasks import Suspects
from tir_alp.cluster.remote_trainer import RemoteTrainer
from tir_alp.cluster.reservation import check_gpus, connect
from tir_alp.cluster.same_code import code_of, differences
from tir_alp.cluster.trainer_host import interface_of
from tir_alp.cluster.watched_actor import reason_of
from tir_alp.config import SGLangConfig, TransformersConfig
from tir_alp.engines.base import Completion, Probe, Sampling
from tir_alp.models.tiny import BASE, TRAIN_CONFIG
from tir_alp.roles import RoleLost
from tir_alp.rollouts.renderer import Renderer
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.run.local_placement import LocalPlacement
from tir_alp.tools.sandbox import SandboxError, SandboxRefused
from tir_alp.training.policy import load_policy, load_tokenizer
from tir_alp.types import StopReason

WORDS = (
    *("--cluster.engines.count", "2", "--cluster.environments.count", "2"),
    *("--cluster.spread", "true", "--cluster.heartbeat_s", "0.5", "--cluster.patience_s", "10"),
    *("--rollout.groups_per_step", "2", "--rollout.group_size", "2"),
    *("--env.id", "tests.cluster.fragile:Fragile-v0", "--env.kwargs", "{}"),
)
NODE = {"num_cpus": 5, "include_dashboard": False}
SOON = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
"""Makes Ray notice a dead node within seconds; its defaults would outlast the tests."""
TASK = {"task": {"task_id": "any", "question": "q", "answer": "a"}}
ENGINES = {"sglang": SGLangConfig(type="sglang"), "transformers": TransformersConfig()}
PROMPT = (2, 45, 78, 33, 1, 3)


class Short(Renderer):
    """Its rule ends a completion at the third token."""

    def stop_matcher(self):
        count = itertools.count(1)
        return lambda _: next(count) == 3


RENDERER = Short(load_tokenizer(str(BASE)))


async def unasked(token_ids):
    raise AssertionError("the embedded engine does not ask the trainer")


@pytest.fixture(scope="module")
def port():
    """The port on which the cluster accepts clients."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def nodes(port):
    """Two nodes, each with room for all actors; the second one may be killed."""
    settings = {**SOON, "worker_niceness": 0}
    head = {**NODE, "ray_client_server_port": port, "_system_config": settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.getcwd())  # nodes know nothing of a client's modules
        # Without this, a client's process may die at its start.
        patch.setenv("GRPC_ENABLE_FORK_SUPPORT", "0")
        made = Nodes(initialize_head=True, head_node_args=head)
        made.add_node(**NODE)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def config(nodes, port):
    """The config of a run whose cluster is up."""
    address = f"ray://127.0.0.1:{port}"
    made = load_config(["--cluster", address, *WORDS], read_toml(TRAIN_CONFIG))
    connect(made.cluster, print)
    yield made
    ray.shutdown()


def run(body, seconds=240):
    async def limited():
        async with asyncio.timeout(seconds):
            return await body()

    return asyncio.run(limited())


async def until(holds):
    while not holds():
        await asyncio.sleep(0.05)


async def pid_of(slot):
    await until(lambda: slot.actor is not None and slot.health)
    return slot.health["pid"]


@asynccontextmanager
async def engines(config):
    async with (
        open_cluster(config) as cluster,
        cluster.engine(str(BASE), 0, RENDERER, unasked) as pool,
    ):
        assert isinstance(pool, EnginePool)
        yield cluster, pool


def play(cluster, task_id, action="hello"):
    env = cluster.make_env()
    try:
        task = {**TASK["task"], "task_id": task_id}
        assert env.reset(options={"task": task})[0] == "say"
        return env.step(action)
    finally:
        env.close()


def sampling(uid, max_tokens=20):
    return Sampling(max_tokens=max_tokens, temperature=1.0, sequence_uid=uid)


def test_the_object_store_returns_weights_of_any_dtype_unchanged():
    square = torch.randn(4, 4)
    weights = {
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "b": torch.tensor(7),
        "c": square.T,
        "embedding": square,
        "head": square,
    }
    again = unpack(pack(weights))
    assert again["head"] is again["embedding"]  # engines recognise a tied head by this
    assert {name: (each.dtype, each.shape) for name, each in again.items()} == {
        name: (each.dtype, each.shape) for name, each in weights.items()
    }
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_modules_that_differ_or_are_missing_on_one_side_are_named(tmp_path):
    for name, text in {"a.py": "1", "b/c.py": "2", "b/d.txt": "3"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code = code_of(tmp_path)
    assert sorted(code) == ["a.py", "b/c.py"]
    assert differences(code, code) == ""
    assert differences(code, {"a.py": code["a.py"], "e.py": "0"}) == "b/c.py, e.py"
    assert differences({f"{index}.py": "0" for index in range(7)}, {}).endswith("4.py and 2 more")


def test_a_tensor_that_is_corrupted_on_its_way_is_named():
    packed = pack({f"layer.{index}": torch.randn(8) for index in range(100)})
    tensor = packed["layer.12"]
    assert not isinstance(tensor, str) and tensor.checksum is not None
    tensor.plain[3] ^= 1
    with pytest.raises(ValueError, match=r"'layer\.12' did not arrive"):
        unpack(packed)


def test_a_cluster_that_is_too_small_is_reported(config, capsys):
    engines = config.cluster.engines.model_copy(update={"count": 100})
    small = config.cluster.model_copy(update={"engines": engines, "start_timeout_s": 1.0})

    async def body():
        async with open_cluster(config.model_copy(update={"cluster": small})):
            pass

    asked = (
        r".*'engines': 100.* [0-9]+ CPUs asked, [0-9]+ of [0-9]+ free, 0 GPUs asked, 0 of 0 free"
    )
    with pytest.raises(ValueError, match=rf"not have room within 1 s: {asked}: lower cluster"):
        run(body)
    assert re.search(rf"^waiting for room in the cluster: {asked}$", capsys.readouterr().err, re.M)

    async def gone():
        groups = placement_group_table
        await until(lambda: {each["state"] for each in groups().values()} <= {"REMOVED"})

    run(gone, seconds=30)  # its reservation is withdrawn


@pytest.mark.parametrize(
    ("words", "is_well"),
    [
        (("--engine.tensor_parallel", "2", "--cluster.engines.gpus", "1"), False),
        (("--engine.num_servers", "2", "--cluster.engines.gpus", "2"), True),
        (("--cluster.engines.gpus", "0.5"), True),
        (("--cluster.engines.gpus", "1", "--engine.first_gpu", "1"), False),
        (("--engine.device", "cpu"), True),
        (("--engine.urls", '["http://host:1"]'), True),
    ],
)
def test_servers_that_take_more_gpus_than_their_actor_has_are_refused(words, is_well):
    made = load_config(["--engine.type", "sglang", *words], read_toml(TRAIN_CONFIG))
    with contextlib.nullcontext() if is_well else pytest.raises(ValueError, match=r"engines\.gpus"):
        check_gpus(made)


@pytest.mark.parametrize(("failures", "is_taken"), [(2, True), (3, False)])
def test_a_client_whose_process_on_the_head_dies_at_its_start_tries_again(
    monkeypatch, failures, is_taken
):
    left = [ConnectionAbortedError("Starting Ray client server failed")] * failures

    def init(*_, **__):
        if left:
            raise left.pop()

    monkeypatch.setattr(ray, "init", init)
    settings = load_config(WORDS, read_toml(TRAIN_CONFIG)).cluster
    with nullcontext() if is_taken else pytest.raises(ValueError, match="there is no Ray cluster"):
        connect(settings, print)
    assert not left


def test_if_one_actor_cannot_start_all_are_closed():
    closed = []

    class Fake:
        def __init__(self, name):
            self.name = name

        async def open(self):
            if self.name == "broken":
                raise ValueError("no model")
            await asyncio.Event().wait()

        async def close(self):
            closed.append(self.name)

    actors: Any = [Fake("slow"), Fake("broken")]
    with pytest.raises(ValueError, match="no model"):
        run(lambda: cluster_module.open_all(actors), seconds=10)
    assert closed == ["slow", "broken"]


def test_the_health_of_a_pool_is_that_of_its_worst_engine():
    pool: Any = EnginePool.__new__(EnginePool)
    first = {"running": 1, "tensors_compared": 4, "probe_difference": 0.2, "pid": 7}
    second = {"running": 2, "tensors_compared": 3, "probe_difference": 0.1, "pid": 8}
    here = [SimpleNamespace(health=health, actor="there") for health in (first, second)]
    pool.actors = [*here, SimpleNamespace(health={}, actor=None)]
    expected = {"running": 3, "tensors_compared": 3, "probe_difference": 0.2, "engines": 2}
    assert pool.health() == expected


@pytest.mark.parametrize(("engine", "has_probe"), [("sglang", True), ("transformers", False)])
def test_servers_get_a_probe_together_with_the_weights(config, engine, has_probe):
    given = []

    class Fake:
        actor = object()

        async def call(self, method, *arguments, timeout_s):
            if method == "generate":
                return Completion(
                    token_ids=(8, 9),
                    logprobs=(-1.0, -1.0),
                    stop_reason=StopReason.LENGTH,
                    policy_version=0,
                )
            given.append(arguments[1:])
            return {}

        def take_report(self, report):
            pass

        name = "engine-0"

    async def ask_trainer(token_ids):
        return Probe(token_ids, (-2.0,) * (len(token_ids) - 1))

    of_run = config.model_copy(update={"engine": ENGINES[engine]})

    async def body():
        pool = EnginePool(
            of_run, str(BASE), 0, RENDERER, ask_trainer, lambda _: cast(Any, [Fake()])
        )
        await pool.generate((5, 6, 7), sampling(0))
        await pool.load_weights(BASE, version=4)

    run(body)
    assert given == [(4, Probe((5, 6, 7, 8, 9), (-2.0,) * 4) if has_probe else None)]


def test_ranks_meet_on_the_interface_that_other_nodes_can_reach():
    assert interface_of("127.0.0.1") == "lo" and interface_of("203.0.113.1") is None


def test_a_pool_samples_what_one_engine_does_and_survives_the_loss_of_one(config):
    """A dead engine's requests are sent to another; its successor starts with the new weights."""
    weights = load_policy(str(BASE)).state_dict()
    weights = {name: tensor * 1.5 for name, tensor in weights.items()}

    async def alone():
        async with LocalPlacement(config).engine(str(BASE), 0, RENDERER, unasked) as engine:
            first = [await engine.generate(PROMPT, sampling(uid)) for uid in range(6)]
            await engine.load_weights(weights, version=3)
            second = [await engine.generate(PROMPT, sampling(uid)) for uid in range(6)]
            return first, second

    async def pooled():
        async with engines(config) as (_, pool):
            kinds = {name.split("/")[1] for name in ray.util.list_named_actors()}
            assert kinds == {"engine-0", "engine-1", "environment-0", "environment-1"}
            pid = await pid_of(pool.actors[0])
            asked = [asyncio.create_task(pool.generate(PROMPT, sampling(u))) for u in range(6)]
            os.kill(pid, signal.SIGKILL)
            first = await asyncio.gather(*asked)
            await pool.load_weights(weights, version=3)
            await until(lambda: pool.actors[0].num_replaced == 1)
            second = await asyncio.gather(*(pool.generate(PROMPT, sampling(u)) for u in range(6)))
            ruled = replace(sampling(0), stop_matcher=RENDERER.stop_matcher)
            assert len((await pool.generate(PROMPT, ruled)).token_ids) == 3
            return first, second, pool.health()

    first, second = run(alone)
    pool_first, pool_second, health = run(pooled)
    assert [each.token_ids for each in pool_first] == [each.token_ids for each in first]
    assert [each.token_ids for each in pool_second] == [each.token_ids for each in second]
    assert {each.policy_version for each in pool_second} == {3}
    assert health["engines"] == 2


async def await_sandboxes(environments, sandbox):
    """An episode waits for sandbox hosts only if the cluster replaces them."""
    env = environments.config().env.model_copy(update={"kwargs": {"sandbox": str(sandbox)}})
    config = environments.config().model_copy(update={"env": env})

    def episode(has_sandboxes):
        suspects = Suspects(print, 20.0)
        hosts = environments.hosts
        made = EnvironmentPool(hosts, lambda: config, suspects, 20.0, has_sandboxes).make()
        try:
            return made.reset(options={"task": {"task_id": "early"}})[0]
        finally:
            made.close()

    with pytest.raises(SandboxRefused):
        await asyncio.to_thread(episode, False)
    waiting = asyncio.create_task(asyncio.to_thread(episode, True))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    sandbox.touch()
    assert await waiting == "say"


def test_calls_to_a_dead_environment_runner_fail_and_a_poison_task_is_excluded(config, tmp_path):
    async def body():
        async with open_cluster(config) as cluster:
            environments = cluster.environment_pool

            text, *_, info = await asyncio.to_thread(play, cluster, "good")
            assert text == "hello" and info["pid"] != os.getpid()
            await await_sandboxes(environments, tmp_path / "sandbox")

            frozen = await pid_of(environments.hosts[0])
            waiting = [
                asyncio.create_task(asyncio.to_thread(play, cluster, "slow", "wait")) for _ in "ab"
            ]
            await until(lambda: environments.hosts[0].health.get("environments") == 1)
            os.kill(frozen, signal.SIGSTOP)
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            assert isinstance(done.pop().exception(), RoleLost)
            for host in environments.hosts:
                await until(lambda host=host: host.actor is not None)

            while "poison" not in environments.suspects.guilty:
                with pytest.raises((RoleLost, RuntimeError)):
                    await asyncio.to_thread(play, cluster, "poison")
            assert environments.suspects.guilty == ("poison",)
            assert (await asyncio.to_thread(play, cluster, "good"))[0] == "hello"
            os.kill(await pid_of(environments.hosts[0]), signal.SIGKILL)
            os.kill(await pid_of(environments.hosts[1]), signal.SIGKILL)
            await asyncio.wait(waiting)

    run(body)


def test_other_code_prevents_a_start_and_is_only_logged_for_a_later_actor(
    config, monkeypatch, capsys
):
    async def body():
        async with open_cluster(config) as cluster:
            host = cluster.actors["environments"][0]
            pid = await pid_of(host)
            monkeypatch.setattr(cluster_module, "differences", lambda *_: "loss.py")
            os.kill(pid, signal.SIGKILL)
            await until(lambda: host.num_replaced == 1)
        with pytest.raises(ValueError, match=r"loss\.py; install the same on all nodes"):
            async with open_cluster(config):
                raise AssertionError("not reached")

    run(body)
    assert "environment-0 runs other code of tir_alp than this process: loss.py\n" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (1, RoleLost, "a rank of the trainer was lost: rank 0 stopped"),
        (2, OSError, "no space left"),  # an error that the method raised, not the loss of a rank
        (3, RoleLost, "a rank of the trainer was lost: its process ended"),
        (4, RoleLost, "the trainer did not answer within 0.5 s"),
    ],
)
def test_an_error_of_the_trainer_differs_from_its_loss(config, scale, error, message):
    actor: Any = ray.remote(FragileRank).options(num_cpus=0).remote()
    rank: Any = SimpleNamespace(name="trainer-0", actor=actor)
    with pytest.raises(error, match=message):
        RemoteTrainer([rank], timeout_s=0.5 if scale == 4 else 60.0).perturb_weights(scale)
    ray.kill(actor)
    rank.actor = None
    with pytest.raises(RoleLost, match="trainer-0 was lost"):
        RemoteTrainer([rank], timeout_s=60.0).perturb_weights(scale)


@pytest.mark.parametrize(
    ("seconds", "why"), [(60.0, "had no address at .* within 0.5 s"), (0.0, "ended before it had")]
)
def test_a_sandbox_service_that_gets_no_address_fails(seconds, why, monkeypatch):
    async def serve(*_):
        await asyncio.sleep(seconds)

    monkeypatch.setattr(sandbox_host, "serve", serve)
    monkeypatch.setattr(sandbox_host, "_START_TIMEOUT_S", 0.5)
    with pytest.raises(SandboxError, match=why):
        run(lambda: sandbox_host.SandboxHost().start({"backend": "unsafe"}, 0, "token"), seconds=20)


def test_the_last_lines_of_podman_are_the_reason():
    printed = "one\ntwo\n\nthree\nfour\n"
    assert (
        reason_of(RuntimeError(f"['podman', 'run'] failed: stderr={printed}"))
        == "two | three | four"
    )
    assert reason_of(RuntimeError(printed)) == "four"


def test_actors_of_a_dead_node_are_replaced_on_another(config, nodes):
    async def body():
        # The previous test frees its resources with a delay; actors are spread over what is free.
        await until(lambda: ray.available_resources().get("CPU") == 2 * NODE["num_cpus"])
        async with open_cluster(config) as cluster:
            hosts = cluster.actors["environments"]
            assert ["environment" in line for line in cluster.layout()] == [True, True]
            pids = {await pid_of(host) for host in hosts}
            begun = [cluster.make_env() for _ in hosts]  # one on each node
            for env in begun:
                await asyncio.to_thread(env.reset, options=TASK)
            (node,) = nodes.worker_nodes
            await asyncio.to_thread(nodes.remove_node, node, allow_graceful=False)

            def now():
                alive = (host for host in hosts if host.actor is not None)
                return {host.health["pid"] for host in alive if "pid" in host.health}

            await until(lambda: len(now()) == 2 and now() != pids)
            assert len(now() & pids) == 1 and len(cluster.layout()) == 1
            for env in begun:
                assert (await asyncio.to_thread(env.reset, options=TASK))[0] == "say"

    run(body)

"""The doctor compares what a run's actors take with the memory of the nodes of a real cluster."""

import asyncio
import os

import gymnasium
import pytest

pytest.importorskip("ray")

import ray
from ray.cluster_utils import Cluster as Nodes

from tir_alp.cluster.placement import open_cluster
from tir_alp.doctor.examine import examine_model
from tir_alp.models.tiny import BASE, TRAIN_CONFIG
from tir_alp.rollouts.renderer import Renderer
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.training.policy import load_tokenizer

EAGER = {"_system_config": {"worker_niceness": 0}}
"""Makes actors compete as equals with the other tests."""
BIG, SMALL = 2**40, 10**9
WORDS = (
    *("--cluster.engines.count", "2", "--cluster.environments.count", "2"),
    *("--cluster.spread", "true", "--env.id", "tests.cluster.fragile:Fragile-v0"),
    *("--env.kwargs", "{}"),
)


@pytest.fixture(scope="module")
def address():
    """A cluster of two nodes, of which one has little memory."""
    node = {"num_cpus": 5, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.getcwd())
        made = Nodes(initialize_head=True, head_node_args={**node, "memory": BIG, **EAGER})
        made.add_node(**node, memory=SMALL)
    yield made.address
    ray.shutdown()
    made.shutdown()


def test_a_node_that_is_too_small_is_named_with_what_takes_most(address):
    config = load_config(["--cluster", address, *WORDS], read_toml(TRAIN_CONFIG))

    async def nodes_and_layout():
        async with asyncio.timeout(240), open_cluster(config) as cluster:
            return cluster.nodes(), cluster.layout()

    nodes, layout = asyncio.run(nodes_and_layout())
    assert len(layout) == 2 and {node.memory for node in nodes} == {BIG, SMALL}
    assert len({node.name for node in nodes}) == 2
    assert all(node.num_cpus == 5 for node in nodes)
    counts = {"trainer": 0, "engines": 0, "environments": 0}
    for node in nodes:
        for kind, number in node.actors.items():
            counts[kind] += number
    assert counts == {"trainer": 1, "engines": 2, "environments": 2}

    tokenizer = load_tokenizer(str(BASE))
    env = gymnasium.make("tests.cluster.fragile:Fragile-v0")
    found, *_ = examine_model(config, str(BASE), tokenizer, Renderer(tokenizer), env, nodes)
    env.close()
    (small,) = [node for node in nodes if node.memory == SMALL]
    assert found.check == "memory" and not found.holds
    assert f"{small.name}: needs" in found.figure and "1 GB are free" in found.figure
    assert "servers and actors" in found.fix

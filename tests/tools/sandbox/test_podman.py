"""Backend `docker` on Podman, through its service with Docker's API."""

import asyncio
import contextlib
from collections.abc import Iterator

import docker
import pytest

from tests.tools.sandbox.docker_engine import ContainerEngine, ContainerEngineUnavailable
from tests.tools.sandbox.podman_engine import podman_engine
from tests.tools.sandbox.test_docker import IMAGE, IN_BOTH_MODES, config, containers
from tir_alp.tools.sandbox import Limits, Outcome, create_sandbox

pytestmark = pytest.mark.sandbox


@pytest.fixture(scope="module")
def podman(container_engine: ContainerEngine) -> Iterator[str]:
    """Address of a Podman service that has the image which Docker built."""
    with contextlib.ExitStack() as stack:
        try:
            address = stack.enter_context(podman_engine())
        except ContainerEngineUnavailable as error:
            pytest.skip(f"no Podman: {error}")
        with (
            contextlib.closing(container_engine.client()) as builder,
            contextlib.closing(docker.DockerClient(base_url=address, timeout=120)) as client,
        ):
            client.images.load(b"".join(builder.images.get(IMAGE).save(named=True)))
        yield address


@IN_BOTH_MODES
def test_sandbox_holds_on_podman_and_leaves_nothing(podman: str, container_per: str):
    async def scenario():
        async with (
            create_sandbox(config(podman, container_per=container_per)) as sandbox,
            sandbox.session() as python,
        ):
            await python.run("x = [1]; n = open('kept', 'w').write('text')")
            async with await python.fork() as branch:
                await python.run("x.append(2)")
                assert (await branch.run("x, open('kept').read()")).value == "([1], 'text')"
            endless = await python.run("while True: pass", Limits(wall_s=0.5))
            assert endless.outcome is Outcome.TOOL_TIMEOUT
            assert (await python.run("'x' in globals()")).value == "False"

    before = containers(podman)
    asyncio.run(scenario())
    assert containers(podman) == before

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from tests.tools.sandbox.docker_engine import (
    ContainerEngine,
    ContainerEngineUnavailable,
    build_sandbox_image,
    docker_engine,
    leftovers,
    make_base_image,
)
from tests.tools.sandbox.ordinary_user import LENT_ENGINE
from tir_alp.tools.sandbox import BlockingSandbox, BlockingSession, SandboxConfig, shared_sandbox

# No ready sessions: some tests count the children of this process.
BARE = SandboxConfig(
    preload=(), memory_mb=512, tmp_mb=8, tmp_files=64, max_processes=16, ready_sessions=0
)


@pytest.fixture(scope="session")
def sandbox() -> BlockingSandbox:
    return shared_sandbox(BARE)


@pytest.fixture
def python(sandbox: BlockingSandbox) -> Iterator[BlockingSession]:
    session = sandbox.session()
    yield session
    session.close()


@pytest.fixture
def neighbour(sandbox: BlockingSandbox) -> Iterator[BlockingSession]:
    session = sandbox.session()
    yield session
    session.close()


Serving = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="session")
def serving() -> Serving:
    """`with serving(*arguments, **environment) as address`: runs the command as a user would."""

    @contextlib.contextmanager
    def start(*arguments: str, **environment: str) -> Iterator[str]:
        command = [sys.executable, "-m", "tir_alp.sandbox", "serve", "--port", "0"]
        server = subprocess.Popen(
            [*command, "--preload", "", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        assert server.stderr is not None
        try:
            yield server.stderr.readline().split()[-1]
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0

    return start


@pytest.fixture(scope="session")
def container_engine() -> Iterator[ContainerEngine]:
    """A Docker engine for the tests alone, with the image of the sandbox."""
    with contextlib.ExitStack() as stack:
        try:
            engine = stack.enter_context(docker_engine())
            make_base_image(engine)
            build_sandbox_image(engine)
        except ContainerEngineUnavailable as error:
            pytest.skip(f"no Docker engine: {error}")
        yield engine
        stack.close()
        assert leftovers(engine) == []


@pytest.fixture(scope="session")
def engine_address(request: pytest.FixtureRequest) -> str:
    """Address of the tests' own engine, or of the one that root lends to an ordinary user."""
    return os.environ.get(LENT_ENGINE) or request.getfixturevalue("container_engine").address

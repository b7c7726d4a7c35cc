from collections.abc import Iterator

import pytest

from tir_alp.tools.sandbox import BlockingSandbox, BlockingSession, SandboxConfig, shared_sandbox

BARE = SandboxConfig(preload=(), memory_mb=512, tmp_mb=8, tmp_files=64, max_processes=16)


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

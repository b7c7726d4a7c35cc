"""A local sandbox that does not attack itself first, for settings under which probes would fail."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tir_alp.tools.sandbox import SandboxConfig
from tir_alp.tools.sandbox.backends.jail_protocol import Jail
from tir_alp.tools.sandbox.create import BACKENDS
from tir_alp.tools.sandbox.result import SandboxReport
from tir_alp.tools.sandbox.sessions.local_sandbox import LocalSandbox


@asynccontextmanager
async def unprobed_sandbox(
    config: SandboxConfig, alter_jail: Callable[..., Jail] = lambda jail: jail
) -> AsyncIterator[LocalSandbox]:
    """A sandbox that is started now and stopped at the end of the block."""
    jail = alter_jail(BACKENDS[config.backend](config))
    sandbox = LocalSandbox(config, jail, SandboxReport(backend=jail.name))
    try:
        await sandbox.start()
        yield sandbox
    finally:
        await sandbox.stop()

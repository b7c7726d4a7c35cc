"""Our own backends, with all of their default protections."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pydantic import ValidationError

from tests.benchmarks.sandbox.rival import Client, Host, Missing
from tir_alp.tools.sandbox import Outcome, Sandbox, SandboxConfig, SandboxRefused, create_sandbox
from tir_alp.tools.sandbox.base import Session


class _Client:
    def __init__(self, session: Session) -> None:
        self._session = session

    async def call(self, code: str) -> str:
        result = await self._session.run(code)
        if result.outcome is not Outcome.OK:
            raise RuntimeError(f"{result.outcome}: {result.stderr}")
        return result.stdout

    async def fork(self) -> Client:
        return _Client(await self._session.fork())

    async def close(self) -> None:
        await self._session.close()


class _Host:
    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    async def open(self) -> Client:
        return _Client(await self._sandbox.open_session())


@asynccontextmanager
async def start_ours(**settings: object) -> AsyncIterator[Host]:
    """A sandbox with this config whose probes have passed."""
    try:
        config = SandboxConfig.model_validate(settings)
    except ValidationError as error:
        raise Missing(f"this version does not know it: {error.errors()[0]['msg']}") from error
    sandbox = create_sandbox(config)
    try:
        host = _Host(await sandbox.__aenter__())
    except SandboxRefused as refusal:
        raise Missing(str(refusal)) from refusal
    try:
        yield host
    finally:
        await sandbox.__aexit__(None, None, None)

"""Chooses a backend. A sandbox that does not keep its promises does not start."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from tir_alp.tools.sandbox.backends.docker import plan_docker
from tir_alp.tools.sandbox.backends.jail_protocol import Jail
from tir_alp.tools.sandbox.backends.landlock import plan_landlock, plan_unsafe
from tir_alp.tools.sandbox.backends.namespaces import plan_namespaces
from tir_alp.tools.sandbox.base import Sandbox
from tir_alp.tools.sandbox.config import SandboxConfig
from tir_alp.tools.sandbox.probes.probe import ProbeResult, probe, refuse_if_weak
from tir_alp.tools.sandbox.result import SandboxRefused, SandboxReport
from tir_alp.tools.sandbox.sessions.local_sandbox import LocalSandbox

if TYPE_CHECKING:
    from tir_alp.tools.sandbox.service.client import RemoteSandbox

BACKENDS: dict[str, Callable[[SandboxConfig], Jail]] = {
    "namespaces": plan_namespaces,
    "landlock": plan_landlock,
    "docker": plan_docker,
    "unsafe": plan_unsafe,
}
"""Backend -> what makes its jail. These run on this machine."""

AUTOMATIC = ("namespaces", "landlock")
"""The backends that `auto` chooses from, the strongest first."""

UNSAFE_WARNING = (
    "sandbox backend 'unsafe': programs written by the model run as this user, with its files, "
    "its network and its processes"
)


@asynccontextmanager
async def create_sandbox(
    config: SandboxConfig | None = None, *, alter_jail: Callable[..., Jail] | None = None
) -> AsyncIterator[Sandbox]:
    """A sandbox whose own attacks on it have failed; backend `unsafe` is not attacked.

    Args:
        config: Settings; None takes the defaults.
        alter_jail: For tests of the probes: changes the jail before it is built.

    Raises:
        SandboxRefused: This machine cannot confine a program; the message names the probes that
            got out, and how.
    """
    config = config or SandboxConfig()
    sandbox = await _open(config, alter_jail or (lambda jail: jail))
    try:
        yield sandbox
    finally:
        await sandbox.stop()


async def examine(name: str, config: SandboxConfig) -> list[ProbeResult]:
    """The results of a backend's probes on this machine.

    Raises:
        SandboxRefused: The backend does not even start.
    """
    sandbox = LocalSandbox(config, BACKENDS[name](config), SandboxReport(backend=name))
    try:
        await sandbox.start()
        return await probe(sandbox, config)
    finally:
        await sandbox.stop()


async def _open(
    config: SandboxConfig, alter_jail: Callable[..., Jail]
) -> LocalSandbox | RemoteSandbox:
    if config.backend == "remote":
        return await _connect(config)
    if config.backend != "auto":
        return await _build(config.backend, config, alter_jail, {})
    refused: dict[str, str] = {}
    for name in AUTOMATIC:
        try:
            return await _build(name, config, alter_jail, refused)
        except SandboxRefused as refusal:
            refused[name] = str(refusal)
    listing = "".join(f"\n  {name}: {reason}" for name, reason in refused.items())
    raise SandboxRefused(f"no sandbox backend holds on this machine:{listing}")


async def _connect(config: SandboxConfig) -> RemoteSandbox:
    try:
        from tir_alp.tools.sandbox.service.client import RemoteSandbox
    except ImportError as error:
        raise SandboxRefused(f"{error}; `remote` needs: pip install 'tir_alp[service]'") from error
    sandbox = RemoteSandbox(config)
    try:
        await sandbox.start()
    except BaseException:
        await sandbox.stop()
        raise
    return sandbox


async def _build(
    name: str, config: SandboxConfig, alter_jail: Callable[..., Jail], refused: dict[str, str]
) -> LocalSandbox:
    warnings = (UNSAFE_WARNING,) if name == "unsafe" else ()
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    report = SandboxReport(backend=name, refused=dict(refused), warnings=warnings)
    sandbox = LocalSandbox(config, alter_jail(BACKENDS[name](config)), report)
    try:
        await sandbox.start()
        if name != "unsafe":
            await refuse_if_weak(sandbox, config)
    except BaseException:
        await sandbox.stop()
        raise
    return sandbox

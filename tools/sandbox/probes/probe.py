"""The sandbox attacks itself before anybody may use it, and refuses to start if an attack works.

There are two kinds of probes: programs that try something inside a session (`attacks.py`), and
checks from outside of what the kernel reports about the session's process. The latter are for locks
that no attack reaches, because another lock stops it first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import socket
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.backends.jail_protocol import Jail
from tir_alp.tools.sandbox.config import Limits, SandboxConfig
from tir_alp.tools.sandbox.probes.attacks import (
    KILLED_BY_ABI,
    PRELUDE,
    Attack,
    Canary,
    exhaustions,
    intrusions,
)
from tir_alp.tools.sandbox.result import RunResult, SandboxError, SandboxRefused

if TYPE_CHECKING:
    from tir_alp.tools.sandbox.sessions.local_sandbox import LocalSandbox
    from tir_alp.tools.sandbox.sessions.session import PythonSession

_LIMITS = Limits(wall_s=60.0)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The result of one probe."""

    promise: str
    mechanism: str
    """The locks that stop the attack, each of which would be enough."""
    failure: str
    """What the attack got; empty if it was stopped or not tried."""
    promised: bool = True
    """Whether the backend promises to stop the attack."""


async def refuse_if_weak(sandbox: LocalSandbox, config: SandboxConfig) -> None:
    """Run every probe.

    Raises:
        SandboxRefused: An attack worked; the message names each one and what it got.
    """
    results = await probe(sandbox, config)
    failures = [f"{f.promise} ({f.failure})" for f in results if f.failure]
    if failures:
        raise SandboxRefused(f"the sandbox does not hold on this machine: {'; '.join(failures)}")


async def probe(sandbox: LocalSandbox, config: SandboxConfig) -> list[ProbeResult]:
    """Run every probe and return the results.

    Raises:
        SandboxRefused: The probes could not be run.
    """
    jail = sandbox.jail
    try:
        async with sandbox.session() as neighbour, _canary(neighbour) as canary:
            reports = await asyncio.gather(
                _attack(sandbox, jail, intrusions(config, canary)),
                _attack(sandbox, jail, exhaustions(config)),
                _foreign_abis(sandbox, jail),
                _forged_reply(sandbox),
                _look_from_outside(neighbour, jail),
            )
            alive = await neighbour.run("len(open('neighbour').read())", _LIMITS)
    except SandboxError as error:
        raise SandboxRefused(f"the probes could not run: {error}") from error
    unharmed = "" if alive.value == "1" else f"an attack reached another session: {alive}"
    return [*(f for report in reports for f in report), ProbeResult("neighbour", "all", unharmed)]


@contextlib.asynccontextmanager
async def _canary(neighbour: PythonSession) -> AsyncIterator[Canary]:
    code = "open('neighbour', 'w').write('x'); import os; os.path.abspath('neighbour')"
    path = (await neighbour.run(code, _LIMITS)).value or ""
    with tempfile.NamedTemporaryFile("w") as file, socket.create_server(("127.0.0.1", 0)) as server:
        file.write("canary")
        file.flush()
        port = server.getsockname()[1]
        yield Canary(path=file.name, port=port, neighbour_path=path.strip("'"))


async def _attack(
    sandbox: LocalSandbox, jail: Jail, attacks: Iterable[Attack]
) -> list[ProbeResult]:
    async with sandbox.session() as session:
        await session.run(PRELUDE, _LIMITS)
        results = []
        for attack in attacks:
            locks = [lock for lock in attack.locks if lock.split()[0] in jail.locks]
            if not locks:
                results.append(ProbeResult(attack.promise, "", "", promised=False))
                continue
            result = await session.run(attack.program, _LIMITS)
            may_be_ended = any(lock.endswith("keeper") for lock in locks)
            was_ended = may_be_ended and result.outcome is Outcome.RESOURCE_LIMIT
            failure = "" if result.value == "'held'" or was_ended else _summary(result)
            results.append(ProbeResult(attack.promise, ", ".join(locks), failure))
            if result.value != "'held'":  # the attack may have cost the interpreter
                await session.run(PRELUDE, _LIMITS)
        return results


async def _foreign_abis(sandbox: LocalSandbox, jail: Jail) -> list[ProbeResult]:
    if platform.machine() != "x86_64":
        return []
    results = []
    for name, attack in KILLED_BY_ABI.items():
        async with sandbox.session() as session:
            result = await session.run(PRELUDE + attack, _LIMITS)
            # gVisor has no such ABI and treats the call as another, native one.
            is_error = "gVisor" in jail.locks and (result.value or "").startswith("-")
            failure = "" if is_error or "SIGSYS" in result.stderr else _summary(result)
            results.append(ProbeResult(f"{name} system calls", "seccomp", failure))
    return results


async def _forged_reply(sandbox: LocalSandbox) -> list[ProbeResult]:
    forged = b'{"id": 1, "ok": true, "value": "forged", "limit": ""}'
    frame = len(forged).to_bytes(4, "big") + forged
    async with sandbox.session() as session:
        result = await session.run(f"import os; os.write(3, {frame!r})", _LIMITS)
        held = result.outcome is Outcome.TOOL_ERROR and result.value != "forged"
        return [ProbeResult("forged reply", "host", "" if held else _summary(result))]


async def _look_from_outside(session: PythonSession, jail: Jail) -> list[ProbeResult]:
    """Check what the kernel reports about an interpreter, or about the kernel that it runs on.

    Attacks cannot distinguish these locks.
    """
    if "gVisor" in jail.locks:  # gVisor needs some capabilities, in its own user namespace
        prefix, promises, namespaces = "gVisor's ", [], _visible_namespaces(session.pid)
    else:
        prefix, promises = "", ["capabilities"]
        namespaces = _NAMESPACES if "namespaces" in jail.locks else ()
    promises += ["no new privileges", "seccomp", "root", *(f"{n} namespace" for n in namespaces)]
    failures = dict(_process_state(session.pid, namespaces))
    return [ProbeResult(prefix + p, "seen in /proc", failures.get(p, "")) for p in promises]


_NAMESPACES = ("user", "pid", "mnt", "net", "ipc", "uts")
_NAMESPACES_OF_GVISOR = ("user", "mnt", "net", "ipc", "uts")


def _visible_namespaces(pid: int) -> tuple[str, ...]:
    """The namespaces of gVisor; none if it runs as another user, whose processes only root sees."""
    try:
        os.readlink(f"/proc/{pid}/ns/net")
    except PermissionError:
        return ()
    return _NAMESPACES_OF_GVISOR


def _process_state(pid: int, namespaces: Iterable[str]) -> Iterator[tuple[str, str]]:
    process = Path(f"/proc/{pid}")
    lines = (line.split(":", 1) for line in (process / "status").read_text().splitlines())
    status = {key: value.strip() for key, value in lines}
    sets = ["CapInh", "CapPrm", "CapEff", "CapAmb"]
    if namespaces:  # an ordinary user of the host cannot empty this set
        sets.append("CapBnd")
    if kept := {name: status[name] for name in sets if int(status[name], 16)}:
        yield "capabilities", str(kept)
    if status["NoNewPrivs"] != "1":
        yield "no new privileges", status["NoNewPrivs"]
    if status["Seccomp"] != "2":
        yield "seccomp", f"mode {status['Seccomp']}"
    if "0" in status["Uid"].split():
        yield "root", "the interpreter is root to the kernel"
    for kind in namespaces:
        if os.readlink(process / "ns" / kind) == os.readlink(f"/proc/self/ns/{kind}"):
            yield f"{kind} namespace", "is the host's"


def _summary(result: RunResult) -> str:
    last_line = result.stderr.strip().splitlines()[-1:]
    return f"{result.outcome}: {result.value or ' '.join(last_line) or result.stdout[-100:]}"

r"""A Python sandbox that fails closed: stateful sessions, live forks, typed outcomes.

    async with create_sandbox(SandboxConfig()) as sandbox:
        async with sandbox.session() as python:
            result = await python.run("x = 6\nprint(x * 7)", limits=Limits(wall_s=3))
            branch = await python.fork()

From the caller down to the program: `sessions` (state, limits, outcomes), `interpreters` (one
interpreter seen from the host), `backends` (how a jail is built), `jail` (what runs inside it).
`probes` attacks a sandbox before it is used, `machine` measures and shares out the host's
resources, `service` offers a sandbox over HTTP. docs/sandbox_internals.md explains how they work
together.
"""

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.base import Sandbox, Session
from tir_alp.tools.sandbox.blocking import BlockingSandbox, BlockingSession, shared_sandbox
from tir_alp.tools.sandbox.config import DockerConfig, Limits, SandboxConfig
from tir_alp.tools.sandbox.create import create_sandbox
from tir_alp.tools.sandbox.result import RunResult, SandboxError, SandboxRefused, SandboxReport

__all__ = [
    "BlockingSandbox",
    "BlockingSession",
    "DockerConfig",
    "Limits",
    "Outcome",
    "RunResult",
    "Sandbox",
    "SandboxConfig",
    "SandboxError",
    "SandboxRefused",
    "SandboxReport",
    "Session",
    "create_sandbox",
    "shared_sandbox",
]

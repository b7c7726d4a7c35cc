"""Containers with a kernel of their own (gVisor), one for each session and its branches.

What keeps a program from the host is gVisor: a kernel in user space that answers every system call
itself, and is itself locked in. So there is no Landlock inside, and nothing to hide: the files are
the image's and the session's own. Our filter, limits and keeper hold in there as elsewhere.
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.backends import jail_protocol as jails
from tir_alp.tools.sandbox.backends.container_engine import engine_at, remove_container
from tir_alp.tools.sandbox.endings import Lost
from tir_alp.tools.sandbox.jail.spec import JailSpec
from tir_alp.tools.sandbox.result import SandboxError

_EVENTS_S = 120
"""How far back the engine is asked why a container ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestJail:
    """A container with a kernel of its own; what `jails.Jail` is for a fork server."""

    name = "docker"
    locks = frozenset({"seccomp", "rlimit", "keeper", "launcher", "container", "gVisor"})
    one_session = True
    max_threads = None

    address: str
    """Of the engine."""
    options: dict[str, Any]
    """What the engine is asked for, in the words of the SDK."""
    spec: JailSpec
    environment: dict[str, str] = field(default_factory=lambda: dict(jails.ENVIRONMENT))

    def open(self) -> OpenContainer:
        """Start a container.

        Raises:
            SandboxError: The engine does not start it.
        """
        from docker.errors import DockerException

        variables = [f"{name}={value}" for name, value in self.environment.items()]
        command = jails.python_command("/sandbox", "gvisor_relay", python="/sandbox/python")
        try:
            with engine_at(self.address) as engine:
                container = engine.containers.create(
                    entrypoint=["/usr/bin/env", "-i", *variables],
                    command=command,
                    stdin_open=True,
                    **self.options,
                )
                identity = str(container.id)
                try:
                    return self._attach(engine, identity)
                except BaseException:
                    remove_container(engine, identity)
                    raise
        except (DockerException, OSError, ValueError) as error:
            raise SandboxError(f"the container does not start: {error}") from error

    def _attach(self, engine: Any, identity: str) -> OpenContainer:
        streams = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
        attached = engine.api.attach_socket(identity, params=streams)
        # The SDK gives a file upon the connection, which would otherwise wait to be collected.
        stream: socket.socket = attached._sock.dup()
        attached._sock.close()
        attached.close()
        try:
            engine.api.start(identity)
            stream.setblocking(False)
            pid = engine.api.inspect_container(identity)["State"]["Pid"]
        except BaseException:
            stream.close()
            raise
        return OpenContainer(self.address, identity, stream, pid)


AnyJail = jails.Jail | GuestJail
"""What a sandbox is built on."""


@dataclass(frozen=True, slots=True)
class OpenContainer:
    """A container that runs, and the stream to it."""

    address: str
    container_id: str
    stream: socket.socket
    """To its stdin; from its stdout and stderr, in the engine's pieces. Its end ends the container.

    Does not block."""
    pid: int
    """Of its kernel, as the host numbers it; 0 if that has ended already."""

    def close_stream(self) -> None:
        """Give the descriptor back."""
        self.stream.close()

    def remove(self) -> None:
        """Kill and remove it; wait until it is gone."""
        from docker.errors import DockerException

        # If the engine is gone, the container ends all the same: the host has closed its stream.
        with contextlib.suppress(DockerException, OSError), engine_at(self.address) as engine:
            remove_container(engine, self.container_id)

    def cause_of_end(self) -> Lost:
        """Why it ended by itself, by the engine's word."""
        from docker.errors import DockerException

        now = int(time.time())
        try:
            with engine_at(self.address) as engine:
                events = engine.events(
                    since=now - _EVENTS_S,
                    until=now + 1,
                    decode=True,
                    filters={"container": self.container_id},
                )
                actions = {event["Action"] for event in events}
        except (DockerException, OSError) as error:
            return Lost(Outcome.INFRA_ERROR, f"its container is gone, and the engine too: {error}")
        if "kill" in actions and "oom" not in actions:
            return Lost(Outcome.INFRA_ERROR, "its container was killed from outside")
        return Lost(Outcome.RESOURCE_LIMIT, "its container ended: out of memory or of processes")

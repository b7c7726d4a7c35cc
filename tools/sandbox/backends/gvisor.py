"""Containers with a kernel of their own (gVisor), one for each session and its branches.

gVisor keeps a program from the host: it is a kernel in user space that answers every system call
itself and is itself confined. So there is no Landlock inside, and nothing to hide: the files are
those of the image and of the session. The filter, the limits and the keeper work as elsewhere.
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.backends import jail_protocol as jails
from tir_alp.tools.sandbox.backends.container_engine import connect, remove_container
from tir_alp.tools.sandbox.endings import Lost
from tir_alp.tools.sandbox.interpreters.in_gvisor import GuestHost
from tir_alp.tools.sandbox.jail.spec import JailSpec
from tir_alp.tools.sandbox.result import SandboxError

_EVENTS_S = 120
"""How far back the container engine is asked why a container ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GvisorJail:
    """Containers with a kernel of their own; see `jails.Jail`."""

    name = "docker"
    locks = frozenset({"seccomp", "rlimit", "keeper", "launcher", "container", "gVisor"})
    one_session = True

    address: str
    """Address of the container engine."""
    options: dict[str, Any]
    """Options of a container, as the SDK takes them."""
    spec: JailSpec
    environment: dict[str, str] = field(default_factory=lambda: dict(jails.ENVIRONMENT))
    """Environment of the fork server; nothing else reaches it."""

    @property
    def image(self) -> str:
        """See `GuestJail`."""
        return self.options["image"]

    def new_host(self) -> GuestHost:
        """See `jails.Jail`."""
        return GuestHost(self)

    def open(self) -> RunningGuest:
        """See `GuestJail`."""
        from docker.errors import DockerException

        variables = [f"{name}={value}" for name, value in self.environment.items()]
        command = jails.python_command("/sandbox", "gvisor_relay", python="/sandbox/python")
        try:
            with connect(self.address) as engine:
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

    def _attach(self, engine: Any, identity: str) -> RunningGuest:
        streams = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
        attached = engine.api.attach_socket(identity, params=streams)
        # The SDK wraps the connection in a file, which would stay open until it is collected.
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
        return RunningGuest(self.address, identity, stream, pid)


@dataclass(frozen=True, slots=True)
class RunningGuest:
    """A container that runs, and the stream to it; see `OpenContainer`."""

    address: str
    """Address of the container engine."""
    container_id: str
    stream: socket.socket
    pid: int

    def remove(self) -> None:
        """See `OpenContainer`."""
        from docker.errors import DockerException

        # If the engine is gone, the container ends anyway: the host has closed its stream.
        with contextlib.suppress(DockerException, OSError), connect(self.address) as engine:
            remove_container(engine, self.container_id)

    def cause_of_end(self) -> Lost:
        """See `OpenContainer`."""
        from docker.errors import DockerException

        now = int(time.time())
        try:
            with connect(self.address) as engine:
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

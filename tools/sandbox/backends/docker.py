"""Backend `docker`: the fork server in a container, or one such container per session.

The container has no network, no privileges, a read-only image and a bounded /tmp. Inside, sessions
are kept apart as in backend `landlock`. Only the container engine can start a container, so the
fork server is not a child of the host: it calls the host on a socket in a folder that is bound into
the container, and receives there the descriptors that other fork servers inherit. From then on pids
and descriptors work as usual, because the kernel is the same. An engine on another machine, or in a
virtual machine, is refused.

When the host dies, its sockets close, the fork server ends, and the engine removes the container.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import select
import socket
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tir_alp.tools.sandbox.backends import jail_protocol as jails
from tir_alp.tools.sandbox.backends.container_engine import connect, remove_container
from tir_alp.tools.sandbox.backends.container_profile import container_profile
from tir_alp.tools.sandbox.backends.gvisor import GvisorJail
from tir_alp.tools.sandbox.backends.landlock import demand_landlock
from tir_alp.tools.sandbox.backends.seccomp import compile_filter
from tir_alp.tools.sandbox.config import SandboxConfig
from tir_alp.tools.sandbox.interpreters.container_stream import ContainerStream, last_line
from tir_alp.tools.sandbox.interpreters.forked import ForkServerHost
from tir_alp.tools.sandbox.jail import container_entry as entry
from tir_alp.tools.sandbox.jail import kernel
from tir_alp.tools.sandbox.jail.spec import JailSpec
from tir_alp.tools.sandbox.result import SandboxError, SandboxRefused

if TYPE_CHECKING:
    import docker
    from docker.models.containers import Container

_LOCAL = "unix://"
_USUAL_ADDRESS = "unix:///var/run/docker.sock"
_CALL_TIMEOUT_S = 60.0
_NOBODY = 65534
_MIN_OPEN_FILES = 1024
"""Open files of a container: a fork server holds descriptors on their way to many sessions."""
_OWN_FILES = 16
"""Number of folders in /tmp that do not belong to a program."""
_MAX_MESSAGE = 1 << 16
_MAX_NPROC = 32_768
"""Processes of a user; what Podman gives its own service on a machine with as many pids."""
_GVISOR = "runsc"
"""Name of gVisor's program."""
_BUILD = "docker build -f docker/sandbox.Dockerfile --target sandbox -t {image} ."


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerJail:
    """Fork servers in containers; see `jails.Jail`."""

    name = "docker"
    locks = frozenset({"seccomp", "Landlock", "rlimit", "keeper", "host", "launcher", "container"})

    address: str
    """Address of the container engine."""
    options: dict[str, Any]
    """Options of a container, as the SDK takes them."""
    one_session: bool
    reads_profiles: bool
    """Whether the engine wants the path of a system call profile, as Podman does."""
    max_threads: int
    spec: JailSpec
    environment: dict[str, str] = field(default_factory=lambda: dict(jails.ENVIRONMENT))
    """Environment of the fork server; nothing that the image or the engine sets reaches it."""

    def new_host(self) -> ForkServerHost:
        """See `jails.Jail`."""
        return ForkServerHost(self)

    async def launch(
        self, requests: socket.socket, obituaries: socket.socket, errors: IO[bytes]
    ) -> RunningContainer:
        """Start a container and, when it calls, hand it what it needs."""
        return await asyncio.to_thread(self._launch, requests, obituaries, errors)

    def _launch(
        self, requests: socket.socket, obituaries: socket.socket, errors: IO[bytes]
    ) -> RunningContainer:
        from docker.errors import DockerException

        try:
            with connect(self.address) as client, _Door(self.options["user"]) as door:
                container = self._create(client, door)
                try:
                    _let_in(door, container, requests, obituaries, errors)
                finally:
                    if not door.was_opened:
                        remove_container(client, str(container.id))
                return RunningContainer(self.address, str(container.id))
        except (DockerException, OSError, ValueError) as error:
            raise SandboxError(f"the container does not start: {error}") from error

    def _create(self, client: docker.DockerClient, door: _Door) -> Container:
        from docker.types import Mount

        options = dict(self.options)
        if self.reads_profiles:
            options["security_opt"] = door.store(options["security_opt"])
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        folder = Mount(os.path.dirname(entry.DOOR), door.folder, type="bind", read_only=True)
        return client.containers.create(
            entrypoint=["/usr/bin/env", "-i", *variables],
            command=jails.python_command("/sandbox", "container_entry", python="/sandbox/python"),
            mounts=[folder],
            **options,
        )


@dataclass(frozen=True, slots=True)
class RunningContainer:
    """A container in which a fork server runs; see `Launched`."""

    address: str
    container_id: str

    async def end(self) -> None:
        """Kill and remove it."""
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        from docker.errors import DockerException

        # If the engine is gone, the container ends anyway: the host has closed its sockets.
        with contextlib.suppress(DockerException, OSError), connect(self.address) as client:
            remove_container(client, self.container_id)


def plan_docker(config: SandboxConfig) -> ContainerJail | GvisorJail:
    """Find the container engine, and plan containers that contain nothing unnecessary.

    Raises:
        SandboxRefused: No engine can be used, or it lacks the image or the runtime; or the kernel
            or libseccomp is not sufficient, as for backend `landlock`.
    """
    chosen = config.docker
    address = chosen.address or os.environ.get("DOCKER_HOST") or _USUAL_ADDRESS
    engine = _examine_engine(config, address)
    one_session = chosen.container_per == "session"
    tmp_mb = config.tmp_mb if one_session else chosen.memory_mb // 2
    tmp_files = _OWN_FILES + config.tmp_files * (1 if one_session else config.max_sessions)
    tmp_options = f"rw,noexec,nosuid,nodev,mode=1777,size={tmp_mb}m"
    if not engine.is_podman:  # Podman has no such option; the keepers count files as well
        tmp_options += f",nr_inodes={tmp_files}"
    options: dict[str, Any] = {
        "image": chosen.image,
        "runtime": chosen.runtime,
        "user": "{}:{}".format(*_user()),
        "network_mode": "none",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": _security_options(),
        "ipc_mode": "none",
        "hostname": "sandbox",
        "pids_limit": chosen.processes,
        "mem_limit": f"{chosen.memory_mb}m",
        "memswap_limit": f"{chosen.memory_mb}m",
        "nano_cpus": int(chosen.cpus * 1e9),
        "tmpfs": {"/tmp": tmp_options},
        "ulimits": _ulimits(config, engine),
        "log_config": {"Type": "none"},
        "auto_remove": True,
    }
    if engine.has_own_kernels:
        if not one_session:
            raise SandboxRefused(
                f"docker.runtime {chosen.runtime!r} has no Landlock, which keeps the sessions of "
                'one container apart: set docker.container_per = "session"'
            )
        return GvisorJail(address=address, options=options, spec=_gvisor_spec(config))
    demand_landlock()
    return ContainerJail(
        address=address,
        options=options,
        one_session=one_session,
        reads_profiles=engine.is_podman,
        max_threads=config.max_processes,
        spec=JailSpec(
            room="folder",
            seccomp=compile_filter(kernel.BRANCH_IN_PLACE, ask_for_threads=True).hex(),
            rlimits=jails.session_limits(config),
            **_spec(config),
        ),
    )


def _spec(config: SandboxConfig) -> dict[str, Any]:
    return {
        "preload": config.preload,
        "import_paths": (),
        "readable": (),  # the container knows where its Python is
        "scratch_mb": config.tmp_mb,
        "scratch_files": config.tmp_files,
    }


def _gvisor_spec(config: SandboxConfig) -> JailSpec:
    limits = jails.session_limits(config)
    del limits["RLIMIT_MSGQUEUE"]  # gVisor does not let it be set, and has no such queues
    return JailSpec(
        room="gvisor",
        landlock=False,
        seccomp=compile_filter(kernel.BRANCH_IN_PLACE, asks_host=False).hex(),
        asks_host=False,
        rlimits=limits,
        max_threads=config.max_processes,
        **_spec(config),
    )


def _security_options() -> list[str]:
    return ["no-new-privileges", f"seccomp={json.dumps(container_profile())}"]


def _ulimits(config: SandboxConfig, engine: _EngineTraits) -> list[dict[str, Any]]:
    limits = {
        "nofile": max(_MIN_OPEN_FILES, config.open_files),
        "fsize": config.tmp_mb << 20,
        "core": 0,
    }
    if engine.is_podman:  # on some machines its own default is more than it may set
        _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        limits["nproc"] = min(_MAX_NPROC, hard) if hard > 0 else _MAX_NPROC
    return [{"Name": name, "Soft": value, "Hard": value} for name, value in limits.items()]


def _user() -> tuple[int, int]:
    """The user and group that a container runs as: one that this process may signal, never root."""
    return (_NOBODY, _NOBODY) if os.geteuid() == 0 else (os.geteuid(), os.getegid())


@dataclass(frozen=True, slots=True)
class _EngineTraits:
    """What is particular about a container engine."""

    is_podman: bool
    has_own_kernels: bool
    """Whether the runtime gives each container a kernel of its own, as gVisor does."""


def _examine_engine(config: SandboxConfig, address: str) -> _EngineTraits:
    """Check that the engine has what the config asks for, and find out what kind it is."""
    if not address.startswith(_LOCAL):
        raise SandboxRefused(
            f"the container engine at {address!r} (DOCKER_HOST or docker.address) may be on "
            "another machine, and sessions share descriptors with the host: give a local socket, "
            "unix:///..., or run the service over there and use backend 'remote'"
        )
    try:
        from docker.errors import DockerException, ImageNotFound
    except ImportError as error:
        raise SandboxRefused(f"{error}; `docker` needs: pip install 'tir_alp[docker]'") from error
    image, runtime = config.docker.image, config.docker.runtime
    try:
        with connect(address) as client:
            info = client.info()
            runtimes = info.get("Runtimes") or {}
            client.images.get(image)
            components = client.version().get("Components") or []
    except ImageNotFound as error:
        fix = _BUILD.format(image=image)
        raise SandboxRefused(f"no image {image!r} at {address}: {fix}") from error
    except DockerException as error:
        raise SandboxRefused(
            f"no container engine answers at {address} ({error}): start it, join its group, or "
            "set DOCKER_HOST or docker.address"
        ) from error
    if runtime is not None and runtime not in runtimes:
        raise SandboxRefused(
            f"the container engine at {address} has no runtime {runtime!r}, only "
            f"{sorted(runtimes)}: add it to the engine's configuration"
        )
    name = runtime or info.get("DefaultRuntime") or ""
    path = (runtimes.get(name) or {}).get("path") or name
    return _EngineTraits(
        is_podman=any("podman" in component["Name"].lower() for component in components),
        has_own_kernels=os.path.basename(path).startswith(_GVISOR),
    )


class _Door:
    """A socket in a folder of its own, on which one container calls once."""

    def __init__(self, user: str) -> None:
        self.was_opened = False
        self._temporary = tempfile.TemporaryDirectory(prefix="container-")
        self.folder = self._temporary.name
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = os.path.join(self.folder, os.path.basename(entry.DOOR))
        self._listener.bind(path)
        self._listener.listen(1)
        if os.geteuid() == 0:
            for name in (self.folder, path):
                os.chown(name, *map(int, user.split(":")))

    def __enter__(self) -> _Door:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listener.close()
        self._temporary.cleanup()

    def store(self, security_options: list[str]) -> list[str]:
        """Write system call profiles to files, and return the options with the files' paths."""
        paths = []
        for option in security_options:
            name, _, profile = option.partition("=")
            if profile.startswith("{"):
                path = Path(self.folder, f"{name}.json")
                path.write_text(profile)
                option = f"{name}={path}"
            paths.append(option)
        return paths

    def wait(self, output: int) -> socket.socket:
        """Wait for the call.

        Args:
            output: Descriptor from which the container's stderr is read until the container ends.

        Raises:
            SandboxError: The container ended, or did not call in time.
        """
        words, pieces = b"", ContainerStream()
        deadline = time.monotonic() + _CALL_TIMEOUT_S
        events = select.poll()  # not `select`, which takes no descriptor above 1023
        for source in (self._listener.fileno(), output):
            events.register(source, select.POLLIN)
        while (left_s := deadline - time.monotonic()) > 0:
            ready = [source for source, _ in events.poll(1000 * left_s)]
            if self._listener.fileno() in ready:
                return self._listener.accept()[0]
            if ready:
                data = os.read(output, _MAX_MESSAGE)
                if not data:
                    raise SandboxError(
                        f"the container ended: {last_line(words)} (was its image built from "
                        "docker/sandbox.Dockerfile?)"
                    )
                words += b"".join(piece for _, piece in pieces.feed(data))
        raise SandboxError(
            f"the container did not call within {_CALL_TIMEOUT_S:g} s: does the container engine "
            f"see {self.folder}, and this host's kernel?"
        )


def _let_in(
    door: _Door,
    container: Container,
    requests: socket.socket,
    obituaries: socket.socket,
    errors: IO[bytes],
) -> None:
    """Start a container, check what it reports when it calls, and send it the descriptors."""
    attached: Any = container.attach_socket(params={"stderr": 1, "stream": 1})
    # The SDK wraps the connection in a file, which would stay open until it is collected.
    with contextlib.closing(attached._sock), contextlib.closing(attached):
        container.start()
        with door.wait(attached.fileno()) as call:
            call.settimeout(_CALL_TIMEOUT_S)
            message = call.recv(_MAX_MESSAGE)
            if not message:  # the container has ended, and this raises its last words
                door.wait(attached.fileno())
            hello = json.loads(message)
            if hello["code"] != entry.fingerprint():
                image = container.image.tags if container.image else "?"
                raise SandboxRefused(
                    f"the image {image} was built from another version of this code: build it again"
                )
            shared = {
                f"{kind} namespace": "is the host's"
                for kind, name in hello["namespaces"].items()
                if name == os.readlink(f"/proc/self/ns/{kind}")
            }
            if breaches := hello["breaches"] | shared:
                listing = "; ".join(f"{promise} ({got})" for promise, got in breaches.items())
                raise SandboxRefused(f"the container does not hold: {listing}")
            descriptors = [requests.fileno(), obituaries.fileno(), errors.fileno()]
            socket.send_fds(call, [b"\0"], descriptors)
            door.was_opened = True

"""The settings of a sandbox. Every field here is enforced by something."""

from __future__ import annotations

from typing import Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

TOKEN_VARIABLE = "TIR_ALP_SANDBOX_TOKEN"
"""The environment variable that holds the token of the service, on both sides."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Limits(_Section):
    """What one call may use."""

    wall_s: float = Field(default=10.0, gt=0)
    """Seconds on the host's clock; the interpreter is killed at the end of them."""
    cpu_s: float | None = Field(default=None, gt=0)
    """Processor seconds, all threads together; unlike `wall_s`, not spent by a busy machine."""
    output_chars: int = Field(default=16_384, gt=0, le=1_000_000)
    """How much of stdout, of stderr and of the value is kept, each: half head, half tail."""
    output_bytes: int = Field(default=8 << 20, gt=0)
    """A program that prints more than this is killed."""


class DockerConfig(_Section):
    """The containers of backend `docker`."""

    address: str | None = None
    """The engine's own socket, such as "unix:///run/podman/podman.sock". None: DOCKER_HOST, or
    Docker's usual place."""
    image: str = "tir-alp-sandbox"
    """Built from docker/sandbox.Dockerfile by the version that uses it."""
    container_per: Literal["sandbox", "session"] = "sandbox"
    """`sandbox`: one container for all sessions. `session`: each session and its branches have one
    of their own, which takes about a second to start."""
    runtime: str | None = None
    """Such as "runc" or "runsc", one that the engine knows. None: the one that it takes itself."""
    cpus: float = Field(default=2.0, gt=0)
    """Of a container; its processes get no more than that together."""
    memory_mb: int = Field(default=4096, ge=256)
    """Of a container, its sessions' files included."""
    processes: int = Field(default=4096, ge=16)
    """Of a container, threads included."""


class Growth(Protocol):
    """What ages: a process, a container."""

    @property
    def age_s(self) -> float:
        """Seconds since it was first seen."""
        ...

    @property
    def grown_mb(self) -> float:
        """The memory that it has taken since then."""
        ...


class Lifetime(_Section):
    """How long something is used before a fresh one takes its place. A bound of None is none."""

    max_uses: int | None = Field(default=None, gt=0)
    """Calls of an interpreter; sessions of a fork server."""
    max_age_s: float | None = Field(default=None, gt=0)
    max_grown_mb: float | None = Field(default=None, gt=0)
    """Memory taken since its birth."""

    def exceeded(self, uses: int, unit: str, status: Growth) -> str:
        """Which bound it has come to, in words; empty if none."""
        if self.max_uses is not None and uses >= self.max_uses:
            return f"it has served {uses} {unit}"
        if self.max_age_s is not None and status.age_s >= self.max_age_s:
            return f"it is older than {self.max_age_s:g} s"
        if self.max_grown_mb is not None and status.grown_mb > self.max_grown_mb:
            return f"it has grown by more than {self.max_grown_mb:g} MB"
        return ""


class SandboxConfig(_Section):
    """One sandbox: a warm fork server, and the sessions that it forks.

    The bounds below `limits` hold for a session as long as it lives.
    """

    backend: Literal["auto", "namespaces", "landlock", "docker", "remote", "unsafe"] = "auto"
    """`auto`: the first of `namespaces` and `landlock` whose probes all pass on this machine, or
    none. `docker`: containers, as `docker` says. `remote`: the services at `hosts`. `unsafe`: no
    protection."""
    docker: DockerConfig = DockerConfig()
    """Of backend `docker`."""
    hosts: tuple[str, ...] = ()
    """Of `remote`: addresses such as "http://10.0.0.7:8080"; the token comes from the environment,
    as TIR_ALP_SANDBOX_TOKEN. The rest of this config is what each service was started with, but for
    `limits` and `max_wait_s`."""
    preload: tuple[str, ...] = ("numpy", "sympy")
    """Modules that every session has already imported. Empty: a session starts much faster."""
    limits: Limits = Limits()
    """Of a call that names none of its own."""
    max_sessions: int = Field(default=256, gt=0)
    """Live interpreters at once; who asks for more waits."""
    memory_budget_mb: int | None = Field(default=None, gt=0)
    """Memory for all sessions together: each call that runs counts with the whole of `memory_mb`,
    each idle interpreter with what it has grown by; a call that does not fit waits. None: three
    quarters of what the machine has free when the sandbox starts."""
    process_budget: int | None = Field(default=None, gt=0)
    """Processes and threads for all sessions together: each call that runs, and each birth, counts
    with the whole of `max_processes`, each idle interpreter with the threads that it keeps and with
    its keeper; what does not fit waits. None: three quarters of what the kernel, the limit of the
    user and the control groups leave when the sandbox starts."""
    max_wait_s: float = Field(default=600.0, gt=0)
    """How long a session or a call waits for its turn before it is an error."""
    ready_sessions: int = Field(default=2, ge=0)
    """Idle interpreters that wait, beside `max_sessions`, for a session to open: it gets one at
    once, and the next is forked in the background."""
    interpreter_lifetime: Lifetime = Lifetime(max_uses=10_000, max_age_s=86_400, max_grown_mb=512)
    """Checked after each call. The variables end with it, and the note of the call says so."""
    fork_server_lifetime: Lifetime = Lifetime(max_uses=10_000, max_age_s=86_400, max_grown_mb=256)
    """Checked when a session opens. Open ones stay with the old one, which ends with the last."""
    memory_mb: int = Field(default=1024, ge=64)
    """Address space of a session, the interpreter and its libraries included."""
    max_processes: int = Field(default=64, ge=4)
    """Threads of a session and of its branches, interpreters and keeper included.

    There are no subprocesses."""
    tmp_mb: int = Field(default=64, ge=1)
    """Size of a session's own /tmp, which lies in memory."""
    tmp_files: int = Field(default=4096, ge=16)
    """Files and folders in it."""
    open_files: int = Field(default=128, ge=16)
    """Open files of a session."""

    @model_validator(mode="after")
    def _hosts_belong_to_remote(self) -> Self:
        if (self.backend == "remote") != bool(self.hosts):
            raise ValueError('`hosts` and backend "remote" go together')
        return self

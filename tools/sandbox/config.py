"""The settings of a sandbox. Every field is enforced."""

from __future__ import annotations

from typing import Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

TOKEN_VARIABLE = "TIR_ALP_SANDBOX_TOKEN"
"""Environment variable that holds the token of the service, for server and client."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Limits(_Section):
    """What one call may use."""

    wall_s: float = Field(default=10.0, gt=0)
    """Seconds on the host's clock, after which the interpreter is killed."""
    cpu_s: float | None = Field(default=None, gt=0)
    """Processor seconds of all threads together; unlike `wall_s`, a busy machine does not use them
    up."""
    output_chars: int = Field(default=16_384, gt=0, le=1_000_000)
    """Characters that are kept of stdout, of stderr and of the value each: half head, half tail."""
    output_bytes: int = Field(default=8 << 20, gt=0)
    """Bytes that a program may print; it is killed if it prints more."""


class DockerConfig(_Section):
    """The containers of backend `docker`."""

    address: str | None = None
    """Socket of the container engine, such as "unix:///run/podman/podman.sock". None means
    DOCKER_HOST, or else Docker's usual socket."""
    image: str = "tir-alp-sandbox"
    """Name of an image that was built from docker/sandbox.Dockerfile of this version."""
    container_per: Literal["sandbox", "session"] = "sandbox"
    """`sandbox`: one container for all sessions. `session`: each session and its branches have a
    container of their own, which takes about a second to start."""
    runtime: str | None = None
    """Runtime of the container engine, such as "runc" or "runsc"; None means its default."""
    cpus: float = Field(default=2.0, gt=0)
    """Processors that all processes of a container may use together."""
    memory_mb: int = Field(default=4096, ge=256)
    """Memory of a container, the files of its sessions included."""
    processes: int = Field(default=4096, ge=16)
    """Processes and threads of a container."""


class Growth(Protocol):
    """What is known about something that ages: a process or a container."""

    @property
    def age_s(self) -> float:
        """Seconds since it was first measured."""
        ...

    @property
    def grown_mb(self) -> float:
        """Memory taken since then."""
        ...


class Lifetime(_Section):
    """How long something is used before a fresh one replaces it. None means no bound."""

    max_uses: int | None = Field(default=None, gt=0)
    """Calls of an interpreter, or sessions of a fork server."""
    max_age_s: float | None = Field(default=None, gt=0)
    max_grown_mb: float | None = Field(default=None, gt=0)
    """Memory taken since its birth."""

    def exceeded(self, uses: int, unit: str, growth: Growth) -> str:
        """Which bound has been reached, in words; empty if none has."""
        if self.max_uses is not None and uses >= self.max_uses:
            return f"it has served {uses} {unit}"
        if self.max_age_s is not None and growth.age_s >= self.max_age_s:
            return f"it is older than {self.max_age_s:g} s"
        if self.max_grown_mb is not None and growth.grown_mb > self.max_grown_mb:
            return f"it has grown by more than {self.max_grown_mb:g} MB"
        return ""


class SandboxConfig(_Section):
    """One sandbox: a warm fork server, and the sessions that it forks.

    The fields from `memory_mb` on bound each session while it lives.
    """

    backend: Literal["auto", "namespaces", "landlock", "docker", "remote", "unsafe"] = "auto"
    """`auto`: the first of `namespaces` and `landlock` whose probes all pass on this machine; if
    there is none, the sandbox does not start. `docker`: containers, configured by `docker`.
    `remote`: the services at `hosts`. `unsafe`: no protection."""
    docker: DockerConfig = DockerConfig()
    """The containers of backend `docker`."""
    hosts: tuple[str, ...] = ()
    """Services of backend `remote`: addresses such as "http://10.0.0.7:8080". The environment
    variable TIR_ALP_SANDBOX_TOKEN holds the token. Of this config only `limits` and `max_wait_s`
    apply; each service was started with its own values of the other fields."""
    preload: tuple[str, ...] = ("numpy", "sympy")
    """Modules that are imported in every session from the start. Sessions without any start much
    faster."""
    limits: Limits = Limits()
    """Limits of a call that names none of its own."""
    max_sessions: int = Field(default=256, gt=0)
    """Number of live interpreters; further sessions wait."""
    memory_budget_mb: int | None = Field(default=None, gt=0)
    """Memory for all sessions together. A running call counts with the whole of `memory_mb`, an
    idle interpreter with the memory that it has taken; a call that does not fit waits. None means
    three quarters of the memory that is free when the sandbox starts."""
    process_budget: int | None = Field(default=None, gt=0)
    """Processes and threads for all sessions together. A running call, or a birth, counts with the
    whole of `max_processes`, an idle interpreter with its keeper and the threads that it keeps;
    what does not fit waits. None means three quarters of what the kernel, the user's limit and the
    control groups leave when the sandbox starts."""
    max_wait_s: float = Field(default=600.0, gt=0)
    """Seconds that a session or a call waits for its turn before it is an error."""
    ready_sessions: int = Field(default=2, ge=0)
    """Number of idle interpreters kept ready, in addition to `max_sessions`. A session that opens
    takes one at once, and the next is forked in the background."""
    interpreter_lifetime: Lifetime = Lifetime(max_uses=10_000, max_age_s=86_400, max_grown_mb=512)
    """Checked after each call. An interpreter that ends loses its variables; the call's note says
    so."""
    fork_server_lifetime: Lifetime = Lifetime(max_uses=10_000, max_age_s=86_400, max_grown_mb=256)
    """Checked when a session opens. Open sessions stay with the old fork server, which ends with
    the last of them."""
    memory_mb: int = Field(default=1024, ge=64)
    """Address space of a session, the interpreter and its libraries included."""
    max_processes: int = Field(default=64, ge=4)
    """Threads of a session and of its branches, interpreters and keeper included. There are no
    subprocesses."""
    tmp_mb: int = Field(default=64, ge=1)
    """Size of a session's own /tmp, which lies in memory."""
    tmp_files: int = Field(default=4096, ge=16)
    """Number of files and folders in it."""
    open_files: int = Field(default=128, ge=16)
    """Number of open files of a session."""

    @model_validator(mode="after")
    def _hosts_belong_to_remote(self) -> Self:
        if (self.backend == "remote") != bool(self.hosts):
            raise ValueError('`hosts` and backend "remote" go together')
        return self

"""Runs one agent in a container of its own, through the engine of Docker or Podman.

Files go in and out through the engine, so that nothing of this machine is mounted. The container
shares the network of this machine, where it finds the model on the loopback interface. It is
removed when `run_container` returns; if this process is killed before that, the next process that
runs agents in containers removes it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import platform
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tir_alp.envs.agent_process import ANSWER_FILE, FOLDER, MAX_CHARS, TASK, TASK_FILE, Report
from tir_alp.tools.sandbox import SandboxError
from tir_alp.tools.sandbox.backends.container_engine import connect, remove_container

if TYPE_CHECKING:
    import docker
    from docker.models.containers import Container

HOME = "/episode"
"""Folder in the container with `task.json`, in which the agent may write its answer and files."""
LABEL = "tir_alp.agent"
"""Label of the containers: which process made them."""

_MAX_FILE_BYTES = 64 << 20  # of a file that is read; larger ones are left out
_LOG_BYTES = 8 << 20  # of output that the engine keeps
_POLL_S = 0.1
_USUAL_ADDRESS = "unix:///var/run/docker.sock"
_DEFAULTS: Mapping[str, Any] = {
    "network_mode": "host",
    "init": True,
    "security_opt": ["no-new-privileges"],
    "pids_limit": 1024,
    "mem_limit": "4g",
}


@dataclass(frozen=True, slots=True)
class ContainerPlace:
    """Where the containers of agents run."""

    image: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `containers.create` of Docker's Python SDK, in addition to the defaults."""

    @property
    def address(self) -> str:
        """Address of the engine."""
        return os.environ.get("DOCKER_HOST") or _USUAL_ADDRESS


def run_container(
    place: ContainerPlace,
    command: Sequence[str],
    task: Mapping[str, Any],
    variables: Mapping[str, str],
    timeout_s: float,
    is_stopped: Callable[[], bool] = lambda: False,
    files: Sequence[str] = (),
) -> Report:
    """Run a command in a new container to its end; for the arguments see `run_command`.

    Args:
        place: The image, and how its container is made.
        command: Words of the command; none: that of the image.
        task: The task, which it finds in `TASK` and in `HOME`.
        variables: Environment variables by which it finds the model.
        timeout_s: Deadline in seconds.
        is_stopped: Whether it has to end before that.
        files: Names of files in `HOME` that the report is to contain.
    """
    from docker.errors import DockerException

    try:
        with connect(place.address) as client:
            _remove_orphans(place.address)
            with _created(client, place, command, task, variables) as container:
                return _run(container, timeout_s, is_stopped, files)
    except (DockerException, SandboxError, OSError) as error:
        where = f"image {place.image!r} at {place.address}"
        return Report(end="infrastructure", errors=f"{where}: {error}")


@contextlib.contextmanager
def _created(
    client: docker.DockerClient,
    place: ContainerPlace,
    command: Sequence[str],
    task: Mapping[str, Any],
    variables: Mapping[str, str],
) -> Iterator[Container]:
    from docker.types import LogConfig

    text = json.dumps(task, ensure_ascii=False)
    log = LogConfig(type="json-file", config={"max-size": str(_LOG_BYTES), "max-file": "1"})
    container = client.containers.create(
        place.image,
        [*command] or None,
        environment={**variables, TASK: text, FOLDER: HOME},
        labels={LABEL: _owner(os.getpid())},
        log_config=log,
        **{**_DEFAULTS, **place.options},
    )
    try:
        container.put_archive("/", _folder_with(text))
        yield container
    finally:
        remove_container(client, str(container.id))


def _run(
    container: Container, timeout_s: float, is_stopped: Callable[[], bool], files: Sequence[str]
) -> Report:
    container.start()
    deadline = time.monotonic() + timeout_s
    code: int | None = None
    while code is None and time.monotonic() < deadline and not is_stopped():
        container.reload()
        state = container.attrs["State"]
        if state["Status"] in ("exited", "dead"):
            code = int(state["ExitCode"])
        else:
            time.sleep(_POLL_S)
    if code is None:
        container.kill()
    output = _logs(container, stdout=True)
    answer = _read(container, ANSWER_FILE)
    if answer is None:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        answer = lines[-1] if lines else None
    found = {name: _read(container, name) for name in files}
    return Report(
        end="timeout" if code is None else "failed" if code else "exited",
        exit_code=code,
        answer=None if answer is None else answer.strip(),
        output=output,
        errors=_logs(container, stderr=True),
        files={name: text for name, text in found.items() if text is not None},
    )


def _logs(container: Container, *, stdout: bool = False, stderr: bool = False) -> str:
    written = container.logs(stdout=stdout, stderr=stderr)
    return written.decode(errors="replace")[-MAX_CHARS:]


def _folder_with(task: str) -> bytes:
    """Return an archive of the agent's folder, which every user of the container may write to."""
    data = task.encode(errors="surrogatepass")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        folder = tarfile.TarInfo(HOME[1:])
        folder.type, folder.mode = tarfile.DIRTYPE, 0o777
        tar.addfile(folder)
        file = tarfile.TarInfo(f"{HOME[1:]}/{TASK_FILE}")
        file.size, file.mode = len(data), 0o644
        tar.addfile(file, io.BytesIO(data))
    return archive.getvalue()


def _read(container: Container, name: str) -> str | None:
    """Return the end of a file in the agent's folder; None if there is no regular one."""
    from docker.errors import NotFound

    try:
        chunks, _ = container.get_archive(str(PurePosixPath(HOME) / name))
    except NotFound:
        return None
    archive = io.BytesIO()
    for chunk in chunks:
        archive.write(chunk)
        if archive.tell() > _MAX_FILE_BYTES:
            return None
    archive.seek(0)
    with tarfile.open(fileobj=archive) as tar:
        first = tar.next()
        file = tar.extractfile(first) if first is not None and first.isreg() else None
        return None if file is None else file.read().decode(errors="replace")[-MAX_CHARS:]


@functools.lru_cache(8)
def _remove_orphans(address: str) -> None:
    """Remove the containers of processes of this machine that have been killed."""
    here, _, _ = _owner(os.getpid()).rpartition("/")
    with connect(address) as client:
        for container in client.containers.list(all=True, filters={"label": LABEL}):
            place, _, identity = container.labels[LABEL].rpartition("/")
            pid = identity.partition(".")[0]
            if place == here and _owner(int(pid)) != container.labels[LABEL]:
                with contextlib.suppress(SandboxError):
                    remove_container(client, str(container.id))


def _owner(pid: int) -> str:
    """Return a name for a process that no other one gets: machine, namespace, id and start."""
    namespace = os.readlink("/proc/self/ns/pid")
    try:
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        start = "gone"
    return f"{platform.node()}/{namespace}/{pid}.{start}"

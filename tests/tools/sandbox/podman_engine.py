"""A Podman service with Docker's API for the tests alone, with a folder and a socket of its own.

    with podman_engine() as address:     # ContainerEngineUnavailable if there cannot be one

Nothing is left of it: no process, no mount, no control group that did not exist before.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import docker.errors
import requests.exceptions

from tests.tools.sandbox.docker_engine import ContainerEngineUnavailable

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 60.0
_SIZE_GB = 2
# The limits of a machine on which even root may not raise them.
_SETTINGS = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""
_NO_ANSWER = (docker.errors.DockerException, requests.exceptions.RequestException)
_CGROUPS = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def podman_engine() -> Iterator[str]:
    """The address of a service, which ends with its containers after the block.

    Raises:
        ContainerEngineUnavailable: It is not installed, or does not start here.
    """
    if os.geteuid() != 0:
        raise ContainerEngineUnavailable("only root can start this service")
    for program in ("podman", "runc"):
        if shutil.which(program) is None:
            raise ContainerEngineUnavailable(f"{program} is not installed")
    folder = Path(tempfile.mkdtemp(prefix="podman-"))
    groups_before = _groups()
    options = f"mode=0711,size={_SIZE_GB}g"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "podman", str(folder)], check=True)
    (folder / "containers.conf").write_text(_SETTINGS)
    address = f"unix://{folder}/podman.sock"
    options = ["--root", f"{folder}/data", "--runroot", f"{folder}/run", "--tmpdir"]
    options += [f"{folder}/tmp", "--storage-driver", "overlay"]
    with open(folder / "log", "wb") as log:
        service = subprocess.Popen(
            ["podman", *options, "system", "service", "--time=0", address],
            env=os.environ | {"CONTAINERS_CONF": f"{folder}/containers.conf"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait_until_it_answers(service, address, folder / "log")
        yield address
    finally:
        _end(service, address, folder)
        for group in sorted(_groups() - groups_before, reverse=True):
            with contextlib.suppress(OSError):
                group.rmdir()


def _client(address: str) -> contextlib.closing[docker.DockerClient]:
    return contextlib.closing(docker.DockerClient(base_url=address))


def _wait_until_it_answers(service: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while service.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(
            docker.errors.DockerException, requests.exceptions.RequestException
        ):
            with contextlib.closing(docker.DockerClient(base_url=address)) as client:
                client.ping()
            return
        time.sleep(0.1)
    words = log.read_text(errors="replace").splitlines()
    raise ContainerEngineUnavailable(f"podman does not come up: {' | '.join(words[-3:])}")


def _end(service: subprocess.Popen[bytes], address: str, folder: Path) -> None:
    with contextlib.suppress(*_NO_ANSWER), _client(address) as client:
        for container in client.containers.list(all=True):
            with contextlib.suppress(docker.errors.NotFound):
                container.remove(force=True)
    service.terminate()
    try:
        service.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        service.kill()
        service.wait()
    for pid in _processes_in(folder):  # the monitors of containers, which end soon after these
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in sorted((m for m in mounts if f"{m}/".startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False)
    folder.rmdir()


def _processes_in(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{folder}/".encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def _groups() -> set[Path]:
    """Control groups with Podman's name, in one hierarchy (v2) or in several (v1)."""
    tops = [*_CGROUPS.glob("libpod_parent"), *_CGROUPS.glob("*/libpod_parent")]
    return {group for top in tops for group in (top, *top.rglob("*")) if group.is_dir()}

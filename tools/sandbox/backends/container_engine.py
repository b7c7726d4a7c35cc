"""The container engine (Docker's or Podman's), through its Python SDK."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tir_alp.tools.sandbox.result import SandboxError

if TYPE_CHECKING:
    import docker

_REQUEST_TIMEOUT_S = 60
_REMOVAL_TIMEOUT_S = 20.0


@contextlib.contextmanager
def connect(address: str) -> Iterator[docker.DockerClient]:
    """A client of the container engine at this address, for one thread."""
    import docker  # optional, and slow to import

    client = docker.DockerClient(base_url=address, version="auto", timeout=_REQUEST_TIMEOUT_S)
    try:
        yield client
    finally:
        client.close()


def remove_container(client: docker.DockerClient, container_id: str) -> None:
    """Kill and remove a container, which may be ending by itself; wait until it is gone.

    Raises:
        SandboxError: It is still there after 20 s.
    """
    from docker.errors import APIError, NotFound

    deadline = time.monotonic() + _REMOVAL_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            client.api.remove_container(container_id, force=True)
        except NotFound:
            return
        except APIError:  # it is being removed already
            time.sleep(0.02)
    raise SandboxError(f"the container {container_id[:12]} cannot be removed")

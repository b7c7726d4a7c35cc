"""An MCP server that speaks HTTP, in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tests.tools.sandbox.processes import wait_until


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def http_server(
    command: Callable[[int], Sequence[str]], port: int | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The server's address and process; it gets its port in the command and as PORT."""
    port = port or free_port()
    environment = os.environ | {"PORT": str(port)}
    process = subprocess.Popen(command(port), env=environment, stderr=subprocess.DEVNULL)
    try:

        def is_up() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_until(is_up)
        yield f"http://127.0.0.1:{port}/mcp", process
    finally:
        process.kill()
        process.wait()

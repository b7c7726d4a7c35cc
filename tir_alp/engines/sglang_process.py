"""An SGLang server's process: our entry module, a free port, and the stages of its start."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tir_alp.engines.server_process import ServerProcess
from tir_alp.engines.sglang_server import KEY_VARIABLE

_STAGES = (
    ("", "importing SGLang"),
    ("Load weight begin", "loading weights"),
    ("Load weight end", "allocating the cache"),
    ("Memory pool end", "starting to listen"),
    ("Uvicorn running", "answering"),
)


class SGLangProcess(ServerProcess):
    """One SGLang server that we start and end.

    Args:
        name: To people.
        arguments: Of `sglang.launch_server`, without host, port and key.
        environment: What is added to ours.
        log: File that gets what it prints.
        api_key: What it asks of its clients.
        say: Told of its progress.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        api_key: str,
        say: Callable[[str], None],
    ) -> None:
        command = [sys.executable, "-m", "tir_alp.engines.sglang_server", *arguments]
        super().__init__(
            name, command, {**environment, KEY_VARIABLE: api_key}, log, say, stages=_STAGES
        )

    async def listen(self) -> str:
        """Start the process; returns the address at which it is going to listen."""
        port = _free_port()
        await self.start("--host", "127.0.0.1", "--port", str(port))
        return f"http://127.0.0.1:{port}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

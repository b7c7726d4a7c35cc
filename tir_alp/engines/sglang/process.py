"""An SGLang server's process: its command line, its environment, the stages of its start."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tir_alp.config import SGLangConfig
from tir_alp.engines.base import Log
from tir_alp.engines.servers.process import (
    ServerProcess,
    arguments_of,
    free_port,
    num_threads,
)
from tir_alp.engines.servers.sglang_main import KEY_VARIABLE
from tir_alp.engines.sglang.client import label

_STAGES = (
    ("", "importing SGLang"),
    ("Load weight begin", "loading weights"),
    ("Load weight end", "allocating the cache"),
    ("Memory pool end", "starting to listen"),
    ("Uvicorn running", "answering"),
)


class SGLangProcess(ServerProcess):
    """One SGLang server that the run starts and ends.

    Args:
        name: Name for messages.
        arguments: Arguments of `sglang.launch_server`, without host, port and key.
        environment: Variables added to those of this process.
        log_path: File for what it prints.
        api_key: The key that it asks its clients for.
        log: Receives its progress.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        api_key: str,
        log: Log,
    ) -> None:
        command = [sys.executable, "-m", "tir_alp.engines.servers.sglang_main", *arguments]
        environment = {**environment, KEY_VARIABLE: api_key}
        leaves = "sglang_loads_"  # where its scheduler publishes its load
        super().__init__(name, command, environment, log_path, log, stages=_STAGES, leaves=leaves)

    async def listen(self) -> str:
        """Start the process; returns the address on which it will listen."""
        port = free_port()
        ranks = ("--nccl-port", str(free_port()))  # where the ranks of this server meet
        await self.start("--host", "127.0.0.1", "--port", str(port), *ranks)
        return f"http://127.0.0.1:{port}"


def server_arguments(
    config: SGLangConfig,
    model_path: str,
    version: int,
    seed: int,
    index: int,
    adapters: Sequence[str] = (),
) -> list[str]:
    """Arguments of `sglang.launch_server` for the server with this index.

    Args:
        config: Settings of the servers.
        model_path: Folder or Hugging Face id that it starts from.
        version: Policy version of the weights there.
        seed: Seed of the run.
        index: Index of the server in its fleet.
        adapters: More arguments, for a server that gets adapters.
    """
    options: dict[str, object] = {
        "--model-path": model_path,
        "--weight-version": label(version, index),
        "--device": config.device,
        "--dtype": config.dtype,
        "--max-running-requests": config.max_running,
        "--tp-size": config.tensor_parallel,
        "--random-seed": (seed + index) % (1 << 30),
    }
    flags = ["--skip-tokenizer-init", "--incremental-streaming-output", "--skip-server-warmup"]
    if config.cache_tokens is not None:
        options["--max-total-tokens"] = config.cache_tokens
    if config.device == "cpu":
        options["--attention-backend"] = "torch_native"
        flags += ["--disable-overlap-schedule", "--sleep-on-idle"]  # others use the cores, too
    else:
        options["--base-gpu-id"] = config.first_gpu + index * config.tensor_parallel
        if config.release_memory:
            flags.append("--enable-memory-saver")
    return [*arguments_of(options), *flags, *adapters, *config.arguments]


def server_environment(config: SGLangConfig, model_path: str) -> dict[str, str]:
    """Variables that are added to this process's own for a server."""
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if config.device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment["OMP_NUM_THREADS"] = num_threads()
    if Path(model_path).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    return environment

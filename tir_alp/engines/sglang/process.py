"""An SGLang server's process: its command line, our entry module, and the stages of its start."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tir_alp.config import SGLangConfig
from tir_alp.engines.servers.process import ServerProcess, free_port
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
    """One SGLang server that we start and end.

    Args:
        name: To people.
        arguments: Of `sglang.launch_server`, without host, port and key.
        environment: What is added to ours.
        log_path: File that gets what it prints.
        api_key: What it asks of its clients.
        log: Told of its progress.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        api_key: str,
        log: Callable[[str], None],
    ) -> None:
        command = [sys.executable, "-m", "tir_alp.engines.servers.sglang_main", *arguments]
        environment = {**environment, KEY_VARIABLE: api_key}
        leaves = "sglang_loads_"  # what its scheduler says of its load
        super().__init__(name, command, environment, log_path, log, stages=_STAGES, leaves=leaves)

    async def listen(self) -> str:
        """Start the process; returns the address at which it is going to listen."""
        port = free_port()
        ranks = ("--nccl-port", str(free_port()))  # where the ranks of a server meet
        await self.start("--host", "127.0.0.1", "--port", str(port), *ranks)
        return f"http://127.0.0.1:{port}"


def server_arguments(
    config: SGLangConfig, model_path: str, version: int, seed: int, index: int
) -> list[str]:
    """Words of the command line of the server number `index`."""
    words = {
        "--model-path": model_path,
        "--weight-version": label(version, index),
        "--device": config.device,
        "--dtype": config.dtype,
        "--max-running-requests": config.max_running,
        "--tp-size": config.tensor_parallel,
        "--random-seed": (seed + index) % (1 << 30),
    }
    flags = ["--skip-tokenizer-init", "--incremental-streaming-output", "--skip-server-warmup"]
    if config.max_cache_tokens is not None:
        words["--max-total-tokens"] = config.max_cache_tokens
    if config.device == "cpu":
        words["--attention-backend"] = "torch_native"
        flags += ["--disable-overlap-schedule", "--sleep-on-idle"]  # cores are shared with others
    else:
        words["--base-gpu-id"] = config.first_gpu + index * config.tensor_parallel
        if config.release_memory:
            flags.append("--enable-memory-saver")
    pairs = [str(word) for pair in words.items() for word in pair]
    return [*pairs, *flags, *config.arguments]


def server_environment(config: SGLangConfig, model_path: str) -> dict[str, str]:
    """What a server's environment has beside ours."""
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if config.device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        # A thread that waits for another one by spinning costs the trainer a core.
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    if Path(model_path).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    return environment

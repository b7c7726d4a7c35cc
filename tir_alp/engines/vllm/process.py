"""A vLLM server's process: the folder that it starts from, its command line, the stages."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tir_alp.config import LoraConfig, VLLMConfig
from tir_alp.engines.base import Log
from tir_alp.engines.servers.process import ServerProcess, arguments_of, num_threads
from tir_alp.engines.servers.weights import snapshot_tensors

SOCKET = "socket"
"""Name of the server's socket in its folder."""

_MAIN = Path(__file__).parents[1] / "servers" / "vllm_main.py"
_CACHE_BLOCK = 32  # tokens
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_STAGES = (
    ("", "importing vLLM"),
    ("Initializing a V1 LLM engine", "starting its processes"),
    ("Loading weights took", "allocating the cache"),
    ("Started server process", "answering"),
)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def with_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give weights a head of their own if it is tied to the embedding and so has no name."""
    if HEAD in tensors or EMBEDDING not in tensors:
        return dict(tensors)
    return {**tensors, HEAD: tensors[EMBEDDING].clone()}


def write_start(
    folder: Path, outline: Any, weights: Mapping[str, Tensor] | Path, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Write the folder that a server starts from; returns the tensors that are in it.

    A head that is tied to the embedding is written, and served, as a tensor of its own: when a tied
    model gets new weights, vLLM's CPU build keeps using the head that it packed at its start.

    Args:
        folder: The folder to make.
        outline: A model of the same architecture; its own weights do not matter.
        weights: Tensors, or a folder in the Hugging Face format.
        dtype: The server's dtype.

    Raises:
        ValueError: If a tensor of the model is missing.
    """
    names = set(outline.state_dict())
    if outline.config.get_text_config().tie_word_embeddings:
        names.discard(HEAD)  # the file may have one all the same, which nobody reads
    own = snapshot_tensors(weights, dtype, every_name=True)
    if missing := sorted(names - own.keys()):
        raise ValueError(
            f"the weights that vLLM is to start with lack {len(missing)} tensors of the model, "
            f"the first is {missing[0]!r}"
        )
    tensors = with_head({name: each for name, each in own.items() if name in names})
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = outline.config.to_dict() | {
        "architectures": [type(outline).__name__],
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return tensors


def server_process(
    config: VLLMConfig, folder: Path, seed: int, log: Log, adapters: LoraConfig | None = None
) -> ServerProcess:
    """The process of a server, not yet started.

    Args:
        config: Settings of the server.
        folder: A folder in which `write_start` has written the folder `start`.
        seed: Seed of the server's draws.
        log: Receives its progress.
        adapters: Rank and scale of the adapters that it gets in place of weights.

    Raises:
        ValueError: If there is no such Python, or the rank is too large.
    """
    if not os.access(config.python, os.X_OK):
        raise ValueError(
            f"engine.python = {str(config.python)!r} is no program: give the Python of an "
            "environment with vLLM, made as docs/engines.md says"
        )
    options: dict[str, object] = {
        "--model": folder / "start",
        "--uds": folder / SOCKET,
        "--dtype": config.dtype,
        "--max-num-seqs": config.max_running,
        "--tensor-parallel-size": config.tensor_parallel,
        "--seed": seed % (1 << 30),
        "--logprobs-mode": "processed_logprobs",  # those of the distribution that is sampled from
    }
    flags = ["--skip-tokenizer-init", "--enable-scale-out"]  # token ids in, token ids out
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",  # to accept new weights
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # so that its processes die with it
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if adapters is not None:
        options |= {"--max-loras": 1, "--max-lora-rank": _rank_for(adapters.rank)}
        flags.append("--enable-lora")
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if config.cache_tokens is not None:
        options["--block-size"] = _CACHE_BLOCK
        options["--num-gpu-blocks-override"] = -(-config.cache_tokens // _CACHE_BLOCK)
        # GiB that have to be free: without it, 92 % of the memory. The size of the cache follows
        # from the number of blocks above.
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
    if config.device == "cpu":
        flags.append("--enforce-eager")
        environment["OMP_NUM_THREADS"] = num_threads()
    else:
        environment["CUDA_VISIBLE_DEVICES"] = gpus(config.first_gpu, config.tensor_parallel)
    python = [str(config.python), "-P", str(_MAIN)]
    return ServerProcess(
        "vLLM server",
        [*python, *arguments_of(options), *flags, *config.arguments],
        environment,
        folder / "server.log",
        log,
        stages=_STAGES,
    )


def _rank_for(rank: int) -> int:
    """The smallest rank that vLLM has room for adapters of, and that is large enough."""
    for each in _RANKS:
        if each >= rank:
            return each
    raise ValueError(f"trainer.lora.rank is {rank}, and vLLM's largest rank is {_RANKS[-1]}")


def gpus(first: int, count: int) -> str:
    """Value of CUDA_VISIBLE_DEVICES for a server.

    Args:
        first: Index of its first GPU among those that this process sees.
        count: Number of its GPUs.

    Raises:
        ValueError: If this process is known to see too few.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is None:
        return ",".join(map(str, range(first, first + count)))
    names = [name for name in seen.split(",") if name]
    if first + count > len(names):
        raise ValueError(
            f"the server takes {count} GPUs, from engine.first_gpu = {first} on, but "
            f"CUDA_VISIBLE_DEVICES is {seen!r}"
        )
    return ",".join(names[first : first + count])

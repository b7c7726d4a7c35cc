"""Estimates from the model's shape whether this machine has the memory and disk for a run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from tir_alp.config import Config
from tir_alp.doctor.check_result import CheckResult
from tir_alp.training.structure import load_outline

_FLOAT = 4  # bytes: weights, gradients and both moments of AdamW are float32
_KEPT_PER_LAYER = (16, 4)  # hidden and inner vectors kept per token and layer for backward
_LOGIT_COPIES = 3  # logits, their log-softmax, and its gradient


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that determine a model's memory."""

    num_parameters: int
    num_layers: int
    hidden: int
    inner: int
    vocabulary: int
    cache_width: int
    """Numbers per token in the cache of one layer: keys and values of all key-value heads."""


def shape_of(path: str) -> Shape:
    """Read a model's shape without loading its weights.

    Args:
        path: Path or hub id of the model.

    Raises:
        ValueError: If there is no such model.
    """
    model = load_outline(path)
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        cache_width=2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim,
    )


def memory_needed(config: Config, shape: Shape, device: str) -> dict[str, int]:
    """Return the peak memory of a trainer and the engine beside it, in bytes by purpose.

    Args:
        config: Config of the run.
        shape: Shape of the run's model.
        device: Device type of the trainer, "cpu" or "cuda"; the latter means the first GPU.
    """
    rollout, trainer = config.rollout, config.trainer
    num_episodes = (rollout.max_staleness + 1) * rollout.groups_per_step * rollout.group_size
    most = max(trainer.micro_batch_tokens, rollout.max_context_tokens)
    packed = min(most, num_episodes * rollout.max_context_tokens)
    of_hidden, of_inner = _KEPT_PER_LAYER
    per_layer = of_hidden * shape.hidden + of_inner * shape.inner
    kept = per_layer * shape.num_layers
    if trainer.gradient_checkpointing:
        kept = per_layer + shape.hidden * shape.num_layers
    weights = _FLOAT * shape.num_parameters
    engine = config.engine.memory_beside_trainer(
        device,
        num_parameters=shape.num_parameters,
        num_tokens=num_episodes * rollout.max_context_tokens,
        numbers_per_token=shape.cache_width * shape.num_layers,
    )
    frozen = weights if trainer.dtype == "float32" else weights // 2
    return {
        "weights, gradients, optimizer": 4 * weights if trainer.lora is None else frozen,
        "the engine's weights": engine.weights,
        "cache": engine.cache,
        "reference weights": weights if config.algorithm.needs_reference else 0,
        "activations": _FLOAT * packed * kept,
        "logits": _FLOAT * _LOGIT_COPIES * trainer.logprob_chunk_tokens * shape.vocabulary,
    }


def check_memory(needed: dict[str, int], available: int) -> CheckResult:
    """Compare the needed memory with the available memory.

    Args:
        needed: Bytes by purpose; see `memory_needed`.
        available: Bytes that are free; see `free_memory`.
    """
    total = sum(needed.values())
    largest = max(needed, key=lambda name: needed[name])
    return CheckResult(
        "memory",
        total <= available,
        f"needs {_gb(total)} ({largest} {_gb(needed[largest])}), {_gb(available)} are free",
        "lower trainer.micro_batch_tokens, engine.max_cache_tokens or rollout.groups_per_step, set "
        "trainer.gradient_checkpointing, or use a smaller model",
    )


def check_disk(config: Config, shape: Shape, folder: Path) -> CheckResult:
    """Check that `checkpoint.keep` + 1 checkpoints of weights and both moments fit on the disk.

    The additional one is being saved before the oldest is deleted.
    """
    needed = (config.checkpoint.keep + 1) * 3 * _FLOAT * shape.num_parameters
    existing = next(each for each in (folder, *folder.resolve().parents) if each.exists())
    free = shutil.disk_usage(existing).free
    return CheckResult(
        "disk",
        needed <= free,
        f"{config.checkpoint.keep + 1} checkpoints need {_gb(needed)}, {_gb(free)} are free",
        f"free some space below {existing}, or lower checkpoint.keep",
    )


def free_memory(device: str) -> int:
    """Return the free memory in bytes.

    Args:
        device: "cuda" for the GPU; "cpu" for this machine, or this process's control group if that
            has less.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return min(free, limit - int((group / "memory.current").read_text()))
    except (FileNotFoundError, ValueError):  # no limit is set
        return free


def _gb(number: int) -> str:
    return f"{number / 1e9:.3g} GB"

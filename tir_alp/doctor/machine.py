"""What this machine has, the memory and the disk, and the shape of a model."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import torch

from tir_alp.config import Config
from tir_alp.doctor.check_result import CheckResult
from tir_alp.doctor.memory import MACHINE, Shape, gigabytes
from tir_alp.training.structure import load_outline

_FLOAT = 4  # bytes: weights and both moments of AdamW are float32


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
        num_heads=heads,
    )


def check_disk(config: Config, shape: Shape, folder: Path) -> CheckResult:
    """Check that the run's checkpoints of weights and both moments fit on the disk.

    Weights of earlier versions are saved too, and a state to which the trainer may have to go back.
    """
    number = num_checkpoints(config)
    accepted = 0 if config.algorithm.acceptance is None else 3
    num_tensors = 3 + config.num_kept_versions + accepted
    needed = number * num_tensors * _FLOAT * shape.num_parameters
    existing = next(each for each in (folder, *folder.resolve().parents) if each.exists())
    free = shutil.disk_usage(existing).free
    return CheckResult(
        "disk",
        needed <= free,
        f"{number} checkpoint{'s need' if number > 1 else ' needs'} {gigabytes(needed)}, "
        f"{gigabytes(free)} are free",
        f"free some space below {existing}, or lower checkpoint.keep",
    )


def num_checkpoints(config: Config) -> int:
    """Return the largest number of checkpoints that a run has on the disk at one time.

    `checkpoint.keep` of them are kept, and the best; another is being saved before the oldest is
    deleted. A run of few steps writes fewer.
    """
    steps, every, keep = config.steps, config.checkpoint.every, config.checkpoint.keep
    saved = -(-steps // every) if every else 1
    evaluated = max(0, steps - 1) // config.eval.every if config.eval.every else 0
    best = evaluated if config.checkpoint.best else 0
    return max(1, min(saved + best, keep + 1 + min(best, 1)))


def free_memory() -> dict[str, int]:
    """Return the free memory in bytes: of this machine, and of each GPU that torch sees.

    If this process's control group has less than the machine, that counts.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(FileNotFoundError, ValueError):  # no limit is set
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    gpus = {f"gpu {n}": torch.cuda.mem_get_info(n)[0] for n in range(torch.cuda.device_count())}
    return {MACHINE: free} | gpus

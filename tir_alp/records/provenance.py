"""Where the numbers of a run come from: `provenance.json` in its folder.

A run can have several starts. The file has the command, the commit of the code, the versions of the
packages and the machine of the first one, and the same of each later one; and of each its times,
its core seconds and the most memory that its process used at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PROVENANCE = "provenance.json"
"""Name of the file."""

_PACKAGES = (
    *("tir_alp", "torch", "transformers", "tokenizers", "safetensors", "numpy", "gymnasium"),
    *("sympy", "math-verify", "reasoning-gym", "pydantic", "ray", "sglang", "vllm", "peft"),
)
_GIT_TIMEOUT_S = 5.0


def note_start(folder: Path) -> None:
    """Write down a start of the run in a folder."""
    file = folder / PROVENANCE
    saved = _read(file)
    if saved is None:
        record = {**describe_start(), "times": [_times()]}
    else:
        later = [*saved.get("resumed", ()), describe_start()]
        record = {**saved, "times": [*saved.get("times", ()), _times()], "resumed": later}
    _write(file, record)


def note_end(folder: Path) -> None:
    """Write down when the newest start ended, and what it has used.

    It can be called again later. A full disk is no reason to fail at the end.
    """
    file = folder / PROVENANCE
    saved = _read(file)
    if saved is None or not saved.get("times"):
        return
    *earlier, last = saved["times"]
    with contextlib.suppress(OSError):
        _write(file, {**saved, "times": [*earlier, {**last, "ended": _now(), **_used(last)}]})


def describe_start() -> dict[str, Any]:
    """Return the command, commit, versions and hardware of this process."""
    return {
        "command": shlex.join(sys.orig_argv),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": _hardware(),
    }


def _commit() -> str | None:
    """The commit of the checkout that the code is in, with " (changed)"; None: it is in none."""
    package = Path(__file__).resolve().parents[1]
    if not (package.parent / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(package.parent), *words]
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
        )
        return found.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" (changed)" if changed else "")
    except (OSError, subprocess.SubprocessError):  # no git, or a repository of somebody else
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _hardware() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "gpus": _gpus(),
    }


def _gpus() -> list[str]:
    """Names of the GPUs. PyTorch is not imported for it: what uses one has it loaded."""
    torch = sys.modules.get("torch")
    if torch is None:
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _times() -> dict[str, Any]:
    return {"started": _now(), "ended": None, "cpu_s_before": _cpu_s()}


def _used(times: Mapping[str, Any]) -> dict[str, Any]:
    """What this process has used: core seconds since the start, and the most memory at a time."""
    own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    before = times.get("cpu_s_before")
    return {
        "cpu_s": round(_cpu_s() - (before if isinstance(before, int | float) else 0.0), 1),
        "peak_memory_gb": round(own.ru_maxrss * 1024 / 1e9, 3),
        "peak_memory_of_a_child_gb": round(children.ru_maxrss * 1024 / 1e9, 3),
        "peak_gpu_memory_gb": _peak_gpu_memory_gb(),
    }


def _cpu_s() -> float:
    """Core seconds of this process and of its children that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(sum(each.ru_utime + each.ru_stime for each in used), 1)


def _peak_gpu_memory_gb() -> list[float]:
    """The most that PyTorch has reserved at a time in this process, of each GPU that it uses."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    count = torch.cuda.device_count()
    return [round(torch.cuda.max_memory_reserved(index) / 1e9, 3) for index in range(count)]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(file: Path) -> dict[str, Any] | None:
    """The file's content; None if there is none, or none that can be read."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(file: Path, record: Mapping[str, Any]) -> None:
    aside = file.with_name(f".{file.name}.part")
    aside.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(aside, file)

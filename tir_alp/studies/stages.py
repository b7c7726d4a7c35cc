"""Studies that are a chain of commands, each of which is made once."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Stage:
    """One command."""

    title: str
    done: Path
    """Exists when the stage is done."""
    words: Sequence[str]
    """The command and its arguments."""
    stdin: str = ""
    run_folder: Path | None = None
    """Folder of the run that it makes; None if it makes none, or goes on where it ended."""


def perform(stage: Stage, log: Callable[[str], None]) -> float:
    """Execute a stage unless it is done; return its seconds. Raises SystemExit if it fails."""
    if stage.done.exists():
        log(f"{stage.title}: done before")
        return 0.0
    if stage.run_folder is not None and stage.run_folder.exists():
        kept = _unused(stage.run_folder)
        stage.run_folder.rename(kept)
        log(f"{stage.title}: an earlier try did not end, and is kept as {kept}")
    log(f"{stage.title}: python -m tir_alp.{' '.join(stage.words)}")
    began = time.monotonic()
    command = [sys.executable, "-m", f"tir_alp.{stage.words[0]}", *stage.words[1:]]
    ended = subprocess.run(command, input=stage.stdin or None, text=True, env=os.environ)
    if ended.returncode:
        raise SystemExit(f"{stage.title} failed with exit code {ended.returncode}")
    return time.monotonic() - began


def audit(folder: Path, log: Callable[[str], None]) -> None:
    """Audit a run or an evaluation. Raises subprocess.CalledProcessError if it finds anything."""
    log(f"auditing {folder}")
    subprocess.run([sys.executable, "-m", "tir_alp.audit", str(folder)], check=True)


def logger() -> Callable[[str], None]:
    """Return a function that prints a line after the seconds since now."""
    began = time.monotonic()

    def log(line: str) -> None:
        print(f"\n[{time.monotonic() - began:5.0f} s] {line}", flush=True)

    return log


def _unused(run_folder: Path) -> Path:
    """A name beside a run that no folder has."""
    names = (
        run_folder.with_name(f"{run_folder.name}-unfinished-{number}")
        for number in itertools.count(1)
    )
    return next(name for name in names if not name.exists())

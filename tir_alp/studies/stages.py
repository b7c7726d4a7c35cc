"""Studies that are a chain of commands, each of which is made once."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tir_alp.process import EXIT_CODE


@dataclass(frozen=True, slots=True)
class Stage:
    """One command."""

    title: str
    done: Path
    """Exists when the stage is done."""
    words: Sequence[str]
    """The command and its arguments."""
    stdin: str = ""
    run: Path | None = None
    """Folder of the run that it makes; None if it makes none."""


def training(title: str, command: str, run: Path, num_steps: int, *words: str) -> Stage:
    """Return the stage that makes a run, or goes on with it from its newest checkpoint.

    Args:
        title: Title of the stage.
        command: `sft` or `train`.
        run: Folder of the run, below `runs/`.
        num_steps: Number of its steps.
        words: Other arguments of a new run.
    """
    done = run / "checkpoints" / f"step_{num_steps}" / "manifest.json"
    if _has_checkpoint(run):
        return Stage(title, done, (command, "--resume", str(run)), run=run)
    name = str(run.relative_to("runs"))
    return Stage(title, done, (command, "--name", name, "--steps", str(num_steps), *words), run=run)


def perform(stage: Stage, log: Callable[[str], None]) -> float:
    """Execute a stage unless it is done; return its seconds. Raises SystemExit if it fails."""
    if stage.done.exists():
        log(f"{stage.title}: done before")
        return 0.0
    if stage.run is not None and stage.run.exists() and not _has_checkpoint(stage.run):
        kept = _unused(stage.run)
        stage.run.rename(kept)
        log(f"{stage.title}: an earlier attempt made no checkpoint, and is kept as {kept}")
    log(f"{stage.title}: python -m tir_alp.{' '.join(stage.words)}")
    began = time.monotonic()
    call(stage.words, stage.title, stage.stdin)
    return time.monotonic() - began


def audit(folder: Path, log: Callable[[str], None]) -> None:
    """Audit a run or an evaluation. Raises SystemExit if it finds anything."""
    log(f"auditing {folder}")
    call(("audit", str(folder)), f"auditing {folder}")


def call(words: Sequence[str], title: str, stdin: str = "") -> None:
    """Run a command of ours to its own end, at Ctrl-C as well, which a terminal sends to both.

    Raises:
        SystemExit: With the command's exit code, if that is not 0.
    """
    command = [sys.executable, "-m", f"tir_alp.{words[0]}", *words[1:]]
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        code = subprocess.run(command, input=stdin or None, text=True).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    if code:
        ended = "was interrupted" if code == EXIT_CODE else f"failed with exit code {code}"
        print(f"{title} {ended}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(code)


def logger() -> Callable[[str], None]:
    """Return a function that prints a line after the seconds since now."""
    began = time.monotonic()

    def log(line: str) -> None:
        print(f"\n[{time.monotonic() - began:5.0f} s] {line}", flush=True)

    return log


def _has_checkpoint(run: Path) -> bool:
    return any((run / "checkpoints").glob("step_*/manifest.json"))


def _unused(run: Path) -> Path:
    """A name beside a run that no folder has."""
    names = (run.with_name(f"{run.name}-unfinished-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())

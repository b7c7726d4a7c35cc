"""The folder of a checkpoint: which files are in it, and whether they are all whole.

A checkpoint is written aside and renamed once it is complete. `manifest.json` is written last and
lists every file with its digest; a folder that does not match its manifest is refused. Reading the
tensors is left to `checkpoint`, so nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_FORMAT = "tir_alp checkpoint 3"


class CheckpointError(ValueError):
    """A checkpoint cannot be used: it is incomplete, of another format or of another model."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a run has come.

    Example: after `Position(step=40, group=640)`, the next step is number 40 and its first group is
    number 640.
    """

    step: int
    """Number of steps that the run has made, which is also the policy version of the weights."""
    group: int
    """The first group that is not finished; the next task follows from it."""


def publish(aside: Path, final: Path, position: Position) -> None:
    """Write the manifest, and rename the complete folder to its final name."""
    files = [path for path in sorted(aside.rglob("*")) if path.is_file()]
    manifest = {
        "format": _FORMAT,
        "position": asdict(position),
        "files": {str(path.relative_to(aside)): _digest(path) for path in files},
    }
    (aside / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for path in aside.rglob("*"):
        _sync(path)
    _sync(aside)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _sync(final.parent)


def newest(folder: Path) -> tuple[Path, Position, list[str]]:
    """Find the newest complete checkpoint.

    Returns:
        Its folder, the position of the run, and for each newer folder why it was refused.

    Raises:
        CheckpointError: If there is no complete checkpoint.
    """
    refused: list[str] = []
    for path in newest_first(folder):
        try:
            return path, verify(path), refused
        except CheckpointError as error:
            refused.append(str(error))
    reasons = "".join(f"\n  {reason}" for reason in refused)
    raise CheckpointError(f"there is no checkpoint in {folder}{reasons}")


def verify(path: Path) -> Position:
    """Check a checkpoint against its manifest. Raises CheckpointError with the first mismatch."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != _FORMAT:
            raise CheckpointError(f"{path} has the format {manifest['format']!r}, not {_FORMAT!r}")
        position = Position(**manifest["position"])
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} has no readable manifest ({error!r})") from error
    for name, digest in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is torn: {name} is missing")
        if _digest(file) != digest:
            raise CheckpointError(f"{path} is torn: {name} is not what was saved")
    return position


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation of a run so far."""

    step: int
    """Number of steps that had been made; 0: the model that the run began with."""
    score: float
    """Higher is better."""


_BEST = "best.json"


def read_best(folder: Path) -> Best | None:
    """Read which evaluation was the best; None if there was none yet."""
    try:
        return Best(**json.loads((folder / _BEST).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def is_best(folder: Path, score: float) -> bool:
    """Whether a score is higher than that of every evaluation before."""
    best = read_best(folder)
    return best is None or score > best.score


def write_best(folder: Path, best: Best) -> None:
    """Record the best evaluation; the checkpoint of its step is kept from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{_BEST}.part"
    aside.write_text(json.dumps(asdict(best)) + "\n")
    os.replace(aside, folder / _BEST)


@dataclass(frozen=True, slots=True)
class Found:
    """A whole checkpoint of a run."""

    path: Path | None
    """None: the model that the run began with, which is not saved."""
    step: int
    """Number of steps that made its weights."""
    refused: tuple[str, ...] = ()
    """For each newer checkpoint, why it cannot be used."""


def find(folder: Path, which: str) -> Found:
    """Find the checkpoint that a user means.

    Args:
        folder: The run's folder of checkpoints.
        which: `last`, the newest that is whole; `best`, see `read_best`; or a number of steps.

    Raises:
        CheckpointError: There is none, or it is not whole.
    """
    if which == "last":
        newest_path, position, refused = newest(folder)
        return Found(newest_path, position.step, tuple(refused))
    if which == "best":
        best = read_best(folder)
        if best is None:
            raise CheckpointError(
                f"{folder.parent} has no best step: it was not evaluated while it trained "
                "(eval.every), or checkpoint.best was off"
            )
        step = best.step
    elif which.isdecimal():
        step = int(which)
    else:
        raise CheckpointError(f"--checkpoint {which}: give best, last or a number of steps")
    path = folder / f"step_{step}"
    if path.is_dir():
        verify(path)
        return Found(path, step)
    if step == 0:
        return Found(None, 0)
    there = ", ".join(each.name for each in newest_first(folder)) or "none"
    raise CheckpointError(f"{folder.parent} has no checkpoint of step {step}; there are {there}")


def prune(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the `keep` newest and the best one."""
    best = read_best(folder)
    for old in newest_first(folder)[keep:]:
        if best is None or old.name != f"step_{best.step}":
            shutil.rmtree(old)


def load_rollouts(path: Path) -> dict[str, Any]:
    """Read the state of the rollouts that `save` was given."""
    return json.loads((path / "rollouts.json").read_text())


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first, whole or not."""
    found = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints: written aside and renamed, so that one either is there whole or is not there.

`checkpoints/step_N/` is a Hugging Face folder (weights, tokenizer, config) with the optimizer,
sigma and position of the run beside it. `manifest.json` is written last and names every file with
its digest; a folder that does not match its manifest is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_FORMAT = "tir_alp checkpoint 1"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: torn, foreign, or of another model."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands.

    Example: `Position(step=40, group=640, policy_version=40)`: the next step is number 40, its
    first group is number 640, and the weights have 40 steps behind them.
    """

    step: int
    group: int
    """Groups that the queue has handed out; tasks follow from it."""
    policy_version: int


def save(
    folder: Path,
    model: Any,
    tokenizer: Any,
    state: Mapping[str, Any],
    position: Position,
    keep: int,
) -> Path:
    """Write `folder/step_N` and delete all but the `keep` newest checkpoints.

    Args:
        folder: The run's `checkpoints`.
        model: Saved in Hugging Face format.
        tokenizer: Likewise.
        state: `Trainer.state_dict()`.
        position: Where the run stands.
        keep: So many stay.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step_{position.step}"
    aside = folder / f".step_{position.step}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    torch.save(state, aside / "trainer.pt")
    manifest = {
        "format": _FORMAT,
        "position": asdict(position),
        "files": {path.name: _digest(path) for path in sorted(aside.iterdir())},
    }
    (aside / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for path in aside.iterdir():
        _sync(path)
    _sync(aside)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _sync(folder)
    for old in _newest_first(folder)[keep:]:
        shutil.rmtree(old)
    return final


def newest(folder: Path) -> tuple[Path, Position, list[str]]:
    """Find the newest checkpoint that is whole.

    Returns:
        Its folder, where its run stood, and why each newer one was refused.

    Raises:
        CheckpointError: If there is none.
    """
    refused: list[str] = []
    for path in _newest_first(folder):
        try:
            return path, verify(path), refused
        except CheckpointError as error:
            refused.append(str(error))
    reasons = "".join(f"\n  {reason}" for reason in refused)
    raise CheckpointError(f"there is no checkpoint to resume from in {folder}{reasons}")


def verify(path: Path) -> Position:
    """Check a checkpoint against its manifest. Raises CheckpointError saying what is wrong."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != _FORMAT:
            raise CheckpointError(
                f"{path} is of the format {manifest['format']!r}, not {_FORMAT!r}"
            )
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


def load_state(path: Path) -> dict[str, Any]:
    """Read what `Trainer.load_state_dict` takes, which moves it to where the model is."""
    return torch.load(path / "trainer.pt", weights_only=True, map_location="cpu")


def _newest_first(folder: Path) -> list[Path]:
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

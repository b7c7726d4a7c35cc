"""Checkpoints: written aside and renamed, so that one either is there whole or is not there.

`checkpoints/step_N/` is a Hugging Face folder (weights, tokenizer, config) for others to use. What
a run resumes from is `trainer/` in it: weights, optimizer and sigma as torch.distributed.checkpoint
writes them, each rank its share, so that any number of ranks can read them; and `rollouts.json`:
the pending groups. `manifest.json` is written last and names every file with its digest; a folder
that does not match it is refused.

All ranks must see the same file system.
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

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tir_alp.training.trainer import Trainer

_FORMAT = "tir_alp checkpoint 3"
_STATE = "trainer"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: torn, foreign, or of another model."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands.

    Example: after `Position(step=40, group=640)`, the next step is number 40 and its first group is
    number 640.
    """

    step: int
    """Number of steps that produced the weights, which is also their policy version."""
    group: int
    """The first group that is not finished; the next task follows from it."""


def save(
    folder: Path,
    trainer: Trainer,
    tokenizer: Any,
    position: Position,
    rollouts: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step_N` and delete all but the `keep` newest checkpoints; on every rank.

    Args:
        folder: The run's `checkpoints`.
        trainer: Whose weights and state are saved.
        tokenizer: Saved beside the weights.
        position: Where the run stands.
        rollouts: What of the rollouts goes on, for JSON; `load_rollouts` gives it back.
        keep: So many stay.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step_{position.step}"
    aside = folder / f".step_{position.step}.part"
    ranks = trainer.ranks
    with ranks.together(f"saving {final}"):
        if ranks.is_first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        ranks.meet()
        trainer.save_model(aside)
        try:
            state_dict_saver.save(trainer.state_dict(), checkpoint_id=aside / _STATE)
        except CheckpointException as error:  # no Exception by its class
            raise OSError(f"cannot write {aside}: {_reasons(error)}") from error
        if ranks.is_first:
            tokenizer.save_pretrained(aside)
            (aside / "rollouts.json").write_text(json.dumps(rollouts))
            _publish(aside, final, position)
            for old in _newest_first(folder)[keep:]:
                shutil.rmtree(old)
        ranks.meet()
    return final


def load(path: Path, trainer: Trainer) -> None:
    """Give a trainer the weights, optimizer and sigma of a checkpoint; on every rank.

    They need not be as many ranks as saved it.

    Raises:
        CheckpointError: If it is of another model, or of another objective or kind of training.
    """
    with trainer.ranks.together(f"loading {path}"):
        state = trainer.state_dict()
        _check_fits(path, state)
        try:
            state_dict_loader.load(state, checkpoint_id=path / _STATE)
        except CheckpointException as error:
            raise CheckpointError(f"cannot read {path}: {_reasons(error)}") from error
        trainer.finish_loading(state)


def _check_fits(path: Path, state: Mapping[str, Tensor]) -> None:
    saved = {
        name: each.size if isinstance(each, TensorStorageMetadata) else None
        for name, each in FileSystemReader(path / _STATE)
        .read_metadata()
        .state_dict_metadata.items()
    }
    own = {name: tensor.shape for name, tensor in state.items()}
    wrong = sorted(name for name in saved | own if saved.get(name) != own.get(name))
    if wrong:
        raise CheckpointError(
            f"{path} does not fit this run: {len(wrong)} tensors are missing, unknown or of "
            f"another shape, the first is {wrong[0]!r}; resume it with the config it was saved with"
        )


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {each[0]!r}" for rank, each in error.failures.items())


def _publish(aside: Path, final: Path, position: Position) -> None:
    """Write the manifest, and let the checkpoint appear whole."""
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


def load_rollouts(path: Path) -> dict[str, Any]:
    """Read what the rollouts go on with."""
    return json.loads((path / "rollouts.json").read_text())


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

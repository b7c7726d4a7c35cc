"""Where a run begins, or goes on: its folder, its checkpoint, and the model that it began with.

Runs of reinforcement learning and of supervised fine-tuning begin in the same way. Nothing is
written here, and each mistake of a user is a ValueError that says what to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tir_alp.models.resolve import resolve
from tir_alp.records.folder import RunFolder, read_origin
from tir_alp.run.data_fingerprint import Fingerprints, check_fingerprints
from tir_alp.training import checkpoint_folder
from tir_alp.training.checkpoint_folder import Position
from tir_alp.training.model_folder import check_model_folder
from tir_alp.training.policy import load_tokenizer
from tir_alp.training.structure import local_path, new_origin
from tir_alp.types import Origin


@dataclass(frozen=True, slots=True)
class Beginning:
    """The folder of a run, and how far it has come."""

    folder: RunFolder
    position: Position
    checkpoint: Path | None
    """The folder of the checkpoint that it goes on from; None: a new run."""


def beginning(name: str, resume: Path | None, log: Callable[[str], None]) -> Beginning:
    """Find the folder of a run and its newest whole checkpoint.

    Args:
        name: Name of a new run.
        resume: Folder of a run to go on with; None: a new run.
        log: Called with a line for people.

    Raises:
        ValueError: The name is taken, another process writes to the folder, or there is no
            checkpoint.
    """
    if resume is None:
        folder = RunFolder(Path("runs") / name)
        folder.check_is_new()
        return Beginning(folder, Position(0, 0), None)
    folder = RunFolder(resume)
    folder.check_is_free()
    found, position, refused = checkpoint_folder.newest(resume / "checkpoints")
    log("".join(f"refused: {reason}\n" for reason in refused) + f"from {found}")
    return Beginning(folder, position, found)


def check_steps(begin: Beginning, steps: int) -> None:
    """Raise ValueError if a run has made all of its steps."""
    if begin.checkpoint is not None and begin.position.step >= steps:
        raise ValueError(
            f"{begin.folder.path} has made its {begin.position.step} steps: give --steps more to "
            "go on"
        )


def check_files(begin: Beginning, files: Fingerprints) -> None:
    """Raise ValueError if the data has changed since the run began."""
    if begin.checkpoint is not None:
        check_fingerprints(begin.folder.path, files)


@dataclass(frozen=True, slots=True)
class FirstWeights:
    """The model that a run began with."""

    initial: str
    """Its folder or id."""
    origin: Origin
    """What the run takes from the time and the model that it was created with."""
    tokenizer: Any
    """That of the weights with which the run goes on."""


def first_weights(path: str, begin: Beginning, log: Callable[[str], None]) -> FirstWeights:
    """Find the model of a run, and load its tokenizer.

    Args:
        path: Path or id of the model, as the user gave it.
        begin: Where the run begins.
        log: Called with a line for people.

    Raises:
        ValueError: There is no such model, or its folder lacks a part.
    """
    initial = resolve(path, log)
    if begin.checkpoint is not None:
        origin, tokenizer = read_origin(begin.folder.path), str(begin.checkpoint)
    else:
        check_model_folder(local_path(initial))
        origin, tokenizer = new_origin(initial), initial
    return FirstWeights(initial, origin, load_tokenizer(tokenizer))


def run_name(name: str | None, kind: str, seed: int) -> str:
    """The run's folder below `runs/`.

    Args:
        name: As the user gave it; None: one is made.
        kind: The first part of a name that is made.
        seed: Seed of the run.
    """
    return name or f"{kind}-seed{seed}-{time.strftime('%Y%m%d-%H%M%S')}"

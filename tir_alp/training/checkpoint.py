"""Checkpoints, written aside and then renamed, so that a checkpoint is either complete or absent.

`checkpoints/step_N/` is a Hugging Face folder (weights, tokenizer, config) that other programs can
load. A run resumes from two more entries in it. `trainer/` holds weights, optimizer and sigma as
torch.distributed.checkpoint writes them: each rank writes its share, and any number of ranks can
read them. `rollouts.json` holds the pending groups. `manifest.json` is written last and lists every
file with its digest; a folder that does not match its manifest is refused.

All ranks must see the same file system.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tir_alp.training.checkpoint_folder import (
    CheckpointError,
    Position,
    prune,
    publish,
)
from tir_alp.training.trainer import Trainer

_STATE = "trainer"
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


def save(
    folder: Path,
    trainer: Trainer,
    tokenizer: Any,
    position: Position,
    rollouts: Mapping[str, Any],
    keep: int,
    end_token_ids: frozenset[int] = frozenset(),
) -> Path:
    """Write `folder/step_N`, and delete checkpoints as in `prune`; call on every rank.

    Args:
        folder: The folder `checkpoints` of the run.
        trainer: The trainer whose weights and state are saved.
        tokenizer: Saved beside the weights.
        position: How far the run has come; `position.step` is N.
        rollouts: State of the rollouts, for JSON; `load_rollouts` returns it.
        keep: Number of newest checkpoints to keep.
        end_token_ids: Tokens that end a completion in the run, for the saved generation config; if
            empty, those of the model stay in it.

    Returns:
        The folder of the checkpoint.
    """
    final = folder / f"step_{position.step}"
    aside = folder / f".step_{position.step}.part"
    ranks = trainer.ranks
    with ranks.together(f"saving {final}"), _cleaned(aside, ranks.is_first):
        if ranks.is_first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        ranks.meet()
        trainer.save_model(aside, end_token_ids)
        state_dict_saver.save(trainer.state_dict(), checkpoint_id=aside / _STATE)
        if ranks.is_first:
            tokenizer.save_pretrained(aside)
            (aside / "rollouts.json").write_text(json.dumps(rollouts))
            publish(aside, final, position)
            prune(folder, keep)
        ranks.meet()
    return final


@contextmanager
def _cleaned(aside: Path, is_first: bool) -> Iterator[None]:
    """Delete the unfinished folder of a checkpoint that cannot be written; it fills the disk.

    Raises:
        OSError: The disk was full, or could not be written; whatever the library called it.
    """
    folder = aside.parent
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        found = _system_error(error) or _refusal_of(folder)
        if is_first:
            shutil.rmtree(aside, ignore_errors=True)
        if found is not None:
            raise OSError(found, os.strerror(found), str(folder)) from error
        if isinstance(error, CheckpointException):
            raise OSError(f"cannot write {aside}: {_reasons(error)}") from error
        raise


def _system_error(error: BaseException) -> int | None:
    """Return the number of the system's error that caused another one; None if none did.

    Libraries written in Rust (safetensors, tokenizers) name it in the text of an exception of their
    own.
    """
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, CheckpointException):
        found = (_system_error(each[0]) for each in error.failures.values())
        return next((each for each in found if each is not None), None)
    named = _RUST_ERROR.search(str(error))
    return int(named.group(1)) if named else None


def _refusal_of(folder: Path) -> int | None:
    """Write a megabyte; return the number of the error if the system refuses. torch hides it."""
    probe = folder / ".probe"
    try:
        probe.write_bytes(bytes(1 << 20))
    except OSError as error:
        return error.errno
    finally:
        probe.unlink(missing_ok=True)
    return None


def load(path: Path, trainer: Trainer) -> None:
    """Load the weights, optimizer and sigma of a checkpoint into a trainer; call on every rank.

    The number of ranks may differ from that which saved it.

    Raises:
        CheckpointError: If it is of another model, objective or kind of training.
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

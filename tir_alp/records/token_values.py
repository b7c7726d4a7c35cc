"""`tokens/step_NNNNNN.safetensors`: what the loss of a step saw of each loss token, and back.

One array per column over the loss tokens of all sequences, one sequence after the other, so that a
reader gets those of a single trajectory without reading the file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tir_alp.training.token_values import CLIPPED, FLOATS, TokenValues

TOKEN_VALUES = "tokens"
"""Subfolder of a run."""


def values_file(path: Path, step: int) -> Path:
    """Return the file of a step, which need not exist.

    Args:
        path: The run folder.
        step: Number of the step, from 1.
    """
    return path / TOKEN_VALUES / f"step_{step:06d}.safetensors"


def write_values(path: Path, step: int, values: Sequence[TokenValues]) -> None:
    """Write what the loss of a step saw, atomically; no file if there is nothing.

    A column that only some of the sequences have is NaN for the others.

    Args:
        path: The run folder.
        step: Number of training steps made, this one included.
        values: The sequences.
    """
    if not values:
        return
    names = [name for name in FLOATS if any(name in each.columns for each in values)]
    arrays: dict[str, NDArray] = {
        name: np.concatenate(
            [each.columns.get(name, np.full(len(each), np.nan)) for each in values]
        ).astype(np.float32)
        for name in names
    }
    arrays[CLIPPED] = np.concatenate([each.columns[CLIPPED] for each in values])
    arrays["uids"] = np.array([each.uid for each in values], np.int64)
    arrays["updates"] = np.array([each.update for each in values], np.int64)
    arrays["stops"] = np.cumsum([len(each) for each in values], dtype=np.int64)
    file = values_file(path, step)
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_name(".part")
    save_file(arrays, temporary, metadata={"clip_sides": ",".join(values[0].clip_sides)})
    os.replace(temporary, file)


def read_values(path: Path, step: int, uid: int) -> TokenValues | None:
    """Read what the loss saw of one sequence; None if that is not recorded.

    Args:
        path: The run folder.
        step: Number of the step, from 1.
        uid: Identity of the sequence.
    """
    try:
        with safe_open(values_file(path, step), "np") as file:
            uids = file.get_tensor("uids")
            (where,) = np.nonzero(uids == uid)
            if not len(where):
                return None
            row = int(where[0])
            stops = file.get_tensor("stops")
            start, stop = int(stops[row - 1]) if row else 0, int(stops[row])
            names = [name for name in (*FLOATS, CLIPPED) if name in file.keys()]  # noqa: SIM118
            columns = {name: file.get_slice(name)[start:stop] for name in names}
            sides = tuple(filter(None, file.metadata()["clip_sides"].split(",")))
            return TokenValues(uid, int(file.get_tensor("updates")[row]), columns, sides)
    except (OSError, SafetensorError, KeyError):
        return None

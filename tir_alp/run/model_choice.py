"""Which weights a command works with: a model, or a checkpoint of a run with the run's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tir_alp.config import SFTConfig
from tir_alp.models.resolve import resolve
from tir_alp.models.tiny import SHIPPED, TRAIN_CONFIG
from tir_alp.records.folder import read_command, read_run_config
from tir_alp.run.command_line import parse_as, read_toml
from tir_alp.training import checkpoint_folder

MODEL_OPTIONS = MappingProxyType(
    {
        "model PATH": "folder or Hugging Face id of the model",
        "run RUN": "a checkpoint of this run, with the run's settings",
        "checkpoint WHICH": "best, last or a number of steps (default: last)",
        "config FILE": "TOML file with settings (default: those of the run or the embedded model)",
    }
)
"""Options of a command, with their descriptions."""


@dataclass(frozen=True, slots=True)
class Model:
    """Weights."""

    path: str
    """Folder or Hugging Face id."""
    version: int = 0
    """Number of training steps that produced them."""


def choose_model(options: Mapping[str, str]) -> tuple[dict[str, Any], Model]:
    """Find the weights that `MODEL_OPTIONS` name, and the settings that come with them.

    Args:
        options: Options of the command line.

    Returns:
        Settings as nested mappings, over which the command line is laid; and the weights.

    Raises:
        ValueError: There are no such weights, or not one of `model` and `run` is given.
    """
    if ("run" in options) == ("model" in options):
        raise ValueError("give either --model PATH or --run RUN")
    if "run" not in options:
        if "checkpoint" in options:
            raise ValueError("--checkpoint names a checkpoint of a run: give --run RUN")
        below: dict[str, Any] = {}
        if "config" in options:
            below = read_toml(Path(options["config"]))
        elif options["model"] in SHIPPED:
            below = read_toml(TRAIN_CONFIG)
        below.pop("steps", None)
        return below, Model(resolve(options["model"]))
    run = Path(options["run"])
    below = settings_of(run)
    if "config" in options:
        below = read_toml(Path(options["config"]))
    return below, checkpoint_of(run, options.get("checkpoint", "last"))


def settings_of(run: Path) -> dict[str, Any]:
    """Return the settings of a run, as those of a run of reinforcement learning.

    Raises:
        ValueError: The folder is not that of a run.
    """
    saved = read_run_config(run)
    if read_command(run) != "sft":
        return saved
    return parse_as(SFTConfig, saved).as_run().model_dump(mode="json")


def checkpoint_of(run: Path, which: str) -> Model:
    """Return the weights of a checkpoint, and the number of steps that made them.

    Args:
        run: Folder of the run.
        which: `best`, `last`, or a number of steps.

    Raises:
        ValueError: There is no such checkpoint.
    """
    found = checkpoint_folder.find(run / "checkpoints", which)
    if found.path is None:  # the model that the run began with
        return Model(resolve(read_run_config(run)["model"]["path"]))
    return Model(str(found.path), found.step)

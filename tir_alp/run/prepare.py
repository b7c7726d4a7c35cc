"""The first stage of a run: what it needs and what it goes on with, before any process starts.

Everything that a user can get wrong about model folder, tokenizer, environment, tasks and the name
of the run is found here. Each mistake is a ValueError that says what to do; nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tir_alp.config import Config
from tir_alp.models.resolve import resolve
from tir_alp.process import missing_extra
from tir_alp.records.folder import RunFolder, read_origin
from tir_alp.records.trackers import check_trackers
from tir_alp.records.trajectories import state_from_record
from tir_alp.rollouts.data import (
    EvalSet,
    Order,
    left_out,
    load_eval_sets,
    load_order,
    overlap,
)
from tir_alp.rollouts.environment import make_environment
from tir_alp.rollouts.queue import QueueState
from tir_alp.rollouts.renderer import Renderer, make_renderer
from tir_alp.run.data_fingerprint import Fingerprints, check_fingerprints, fingerprints
from tir_alp.training import checkpoint_folder
from tir_alp.training.checkpoint_folder import Position
from tir_alp.training.model_folder import check_model_folder
from tir_alp.training.policy import load_tokenizer
from tir_alp.training.structure import local_path, new_origin
from tir_alp.types import Origin

_SERVERS = ("sglang", "vllm")  # engines that are reached over HTTP
_NUM_NAMED = 20  # rows that were left out


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run goes on; the defaults are those of a new run."""

    position: Position = field(default_factory=lambda: Position(0, 0))
    checkpoint: Path | None = None
    """The folder of the checkpoint that it goes on from."""
    pending: QueueState = field(default_factory=QueueState)
    """Groups that were in flight."""
    attempts: Sequence[Mapping[str, Any]] = ()
    """The ledger's records of the episodes of `pending`."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run whose inputs are all there."""

    config: Config
    folder: RunFolder
    progress: Progress
    initial_model: str
    """Folder or id of the model that the run began with."""
    origin: Origin
    """What the run takes from the time and the model that it was created with."""
    tokenizer: Any
    renderer: Renderer
    tasks: Order
    eval_sets: Sequence[EvalSet]
    left_out: Sequence[str]
    """Sentences about the rows of the data that were left out."""
    files: Fingerprints
    """The files that the tasks come from."""

    @property
    def model_path(self) -> str:
        """Folder or id of the weights that the run goes on with."""
        found = self.progress.checkpoint
        return self.initial_model if found is None else str(found)


def prepare(config: Config, resume: Path | None, log: Callable[[str], None]) -> Prepared:
    """Read all inputs of a run; it blocks, and takes seconds.

    Args:
        config: Config of the run.
        resume: Folder of a run to go on with; None: a new run.
        log: Called with a line for people.

    Raises:
        ValueError: For what a user can fix.
    """
    _check_extras(config)
    check_trackers(config.trackers)
    folder = RunFolder(resume or Path("runs") / run_name(config))
    if resume is None:
        folder.check_is_new()
        progress = Progress()
    else:
        folder.check_is_free()
        progress = read_progress(config, resume, log)
    initial = resolve(config.model.path, log)
    found = progress.checkpoint
    if resume is None:
        check_model_folder(local_path(initial))
        origin = new_origin(initial)
    else:
        origin = read_origin(resume)
    tokenizer = load_tokenizer(initial if found is None else str(found))
    with closing(make_environment(config)) as env:
        renderer = make_renderer(config, tokenizer, env, origin)
    sources = (*config.data.sources, *config.eval.data)
    tasks = load_order(config.data, config.seed, whole=bool(config.eval.data))
    files = fingerprints(each.path for each in sources if each.path is not None)
    if resume is not None:
        check_fingerprints(resume, files)
    eval_sets = load_eval_sets(config.data, config.eval)
    for sentence in overlap(config.data, eval_sets):
        log(f"warning: {sentence}")
    sentences = left_out(sources)
    if sentences:
        log(describe_left_out(sentences))
    return Prepared(
        config=config,
        folder=folder,
        progress=progress,
        initial_model=initial,
        tokenizer=tokenizer,
        origin=origin,
        renderer=renderer,
        tasks=tasks,
        eval_sets=eval_sets,
        left_out=sentences,
        files=files,
    )


def _check_extras(config: Config) -> None:
    """Refuse a config that needs an optional library which is missing."""
    needed = {
        "peft": config.trainer.lora is not None and "trainer.lora",
        "aiohttp": config.engine.type in ("sglang", "vllm")
        and f"engine.type = {config.engine.type}",
    }
    for module, key in needed.items():
        if key and find_spec(module) is None:
            raise ValueError(f"{key} needs {module}, and {missing_extra(module)}")


def read_progress(config: Config, resume: Path, log: Callable[[str], None]) -> Progress:
    """Read the newest whole checkpoint of a run.

    Raises:
        ValueError: There is none, or the run has made all of its steps.
    """
    found, position, refused = checkpoint_folder.newest(resume / "checkpoints")
    log("".join(f"refused: {reason}\n" for reason in refused) + f"from {found}")
    if position.step >= config.steps:
        raise ValueError(f"{resume} has made its {position.step} steps: give --steps more to go on")
    kept = checkpoint_folder.load_rollouts(found)
    return Progress(position, found, state_from_record(kept["queue"]), kept["attempts"])


def describe_left_out(sentences: Sequence[str]) -> str:
    """Name the rows of the data that were left out, or at least say how many there are."""
    some = "".join(f"  {sentence}\n" for sentence in sentences[:_NUM_NAMED])
    more = len(sentences) - _NUM_NAMED
    return f"left out of the data:\n{some}" + (
        f"  and {more} more, in left_out.txt\n" if more > 0 else ""
    )


def run_name(config: Config) -> str:
    """The run's folder below `runs/`."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return config.name or f"{config.algorithm.name}-seed{config.seed}-{stamp}"

"""The first stage of a run: what it needs and what it goes on with, before any process starts.

Everything that a user can get wrong about model folder, tokenizer, environment, tasks and the name
of the run is found here. Each mistake is a ValueError that says what to do; nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tir_alp.algorithm.advantage import ADVANTAGES, Advantage
from tir_alp.algorithm.lookup import find
from tir_alp.config import Config
from tir_alp.process import missing_extra
from tir_alp.records.folder import RunFolder
from tir_alp.records.trackers import check_trackers
from tir_alp.records.trajectories import state_from_record
from tir_alp.rollouts.data import (
    EvalSet,
    Order,
    digests,
    left_out,
    load_eval_sets,
    load_order,
    overlap,
)
from tir_alp.rollouts.environment import has_agents, make_environment
from tir_alp.rollouts.queue import QueueState
from tir_alp.rollouts.renderer import Renderer, make_renderer
from tir_alp.run.beginning import beginning, check_files, check_steps, first_weights, run_name
from tir_alp.run.data_fingerprint import Fingerprints, fingerprints
from tir_alp.training import checkpoint_folder
from tir_alp.training.checkpoint_folder import Position
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
    _check_agents(config)
    begin = beginning(run_name(config.name, config.algorithm.name, config.seed), resume, log)
    check_steps(begin, config.steps)
    progress = Progress(begin.position)
    if begin.checkpoint is not None:
        kept = checkpoint_folder.load_rollouts(begin.checkpoint)
        pending = state_from_record(kept["queue"])
        progress = Progress(begin.position, begin.checkpoint, pending, kept["attempts"])
    weights = first_weights(config.model.path, begin, log)
    with closing(make_environment(config)) as env:
        renderer = make_renderer(config, weights.tokenizer, env, weights.origin)
    sources = (*config.data.sources, *config.eval.data)
    tasks = load_order(config.data, config.seed, whole=bool(config.eval.data))
    files = {
        **fingerprints(each.path for each in sources if each.path is not None),
        **digests(sources),
    }
    check_files(begin, files)
    eval_sets = load_eval_sets(config.data, config.eval)
    for sentence in overlap(config.data, eval_sets):
        log(f"warning: {sentence}")
    sentences = left_out(sources)
    if sentences:
        log(describe_left_out(sentences))
    return Prepared(
        config=config,
        folder=begin.folder,
        progress=progress,
        initial_model=weights.initial,
        tokenizer=weights.tokenizer,
        origin=weights.origin,
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
        "aiohttp": config.engine.type in _SERVERS and f"engine.type = {config.engine.type}",
        "openai": has_agents(config) and f"env.id = {config.env.id}",
    }
    for module, key in needed.items():
        if key and find_spec(module) is None:
            raise ValueError(f"{key} needs {module}, and {missing_extra(module)}")


def _check_agents(config: Config) -> None:
    """Refuse what cannot be done with whole agents."""
    if not has_agents(config):
        return
    if config.deterministic:
        raise ValueError(
            f"deterministic needs an environment whose turns can be put in order, and the agents "
            f"of {config.env.id!r} ask for completions whenever they like: leave it out"
        )
    if find(config.algorithm.advantage, ADVANTAGES, Advantage).by_turn is not None:
        raise ValueError(
            f"algorithm.advantage = {config.algorithm.advantage!r} compares turns that begin in "
            f"the same state, but an agent of {config.env.id!r} may have several conversations: "
            'take another one, such as "grpo"'
        )
    if config.cluster.is_used:
        raise ValueError(
            f"the agents of {config.env.id!r} reach the model by the loopback interface of this "
            'machine, so they cannot run as actors of a cluster: set cluster.address to "none"'
        )


def describe_left_out(sentences: Sequence[str]) -> str:
    """Name the rows of the data that were left out, or at least say how many there are."""
    some = "".join(f"  {sentence}\n" for sentence in sentences[:_NUM_NAMED])
    more = len(sentences) - _NUM_NAMED
    return f"left out of the data:\n{some}" + (
        f"  and {more} more, in left_out.txt\n" if more > 0 else ""
    )

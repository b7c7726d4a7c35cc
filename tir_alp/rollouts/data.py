"""Tasks for training and evaluation: loaded, filtered, mixed, shuffled, resumed at a position.

The order of an epoch is a function of (seed, epoch), and a source computes or reads each task from
its index. The task at any position is therefore available without reading the ones before it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tir_alp.config import (
    FILE_SOURCES,
    SOURCES,
    DataConfig,
    EvalConfig,
    SourceConfig,
    TrainingSource,
)
from tir_alp.rollouts.data_files import Opened, open_rows
from tir_alp.tools.held_out import Split

_KEYS = ("task_id", "question", "answer")
_BLOCK = 1024  # positions over which a mixture has exactly its weights


class TaskSource(Protocol):
    """Tasks by index; a list of dicts is one. Each has `task_id`, `question` and `answer`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Task:
    """One row of a data set: a question and its answer.

    Example: `Task("arithmetic/train/0/7", question="What is 37*48+112?", answer="1888")`.
    """

    task_id: str
    question: str
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns."""
    seed: int | None = None
    """Seed by which the environment draws the task itself, with `metadata` as its options; None if
    the task is given to the environment."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Task:
        """Make a task from a row; columns other than id, question and answer become metadata."""
        metadata = dict(row)
        required = {name: metadata.pop(name) for name in _KEYS}
        return cls(**required, metadata=metadata, seed=metadata.pop(EnvTasks.SEED, None))

    def to_options(self) -> dict[str, Any]:
        """Return the `options` of `env.reset`: the original row, unless the environment draws."""
        if self.seed is not None:
            return dict(self.metadata)
        row = {"task_id": self.task_id, "question": self.question, "answer": self.answer}
        return {"task": {**self.metadata, **row}}


@dataclass(frozen=True, slots=True)
class EvalSet:
    """Tasks that are evaluated together."""

    name: str
    """Name of its metrics, `eval/<name>/...`; empty if there is only this set."""
    tasks: Sequence[Task]


@dataclass(frozen=True, slots=True)
class EnvTasks:
    """Tasks that an environment draws itself, by seed; the two splits share no seed.

    In environments that know the option `split`, as every `ToolEnv` does, they share no question
    either.
    """

    SEED = "_env_seed"

    seed: int
    size: int
    split: Split = "train"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        draw = (self.seed * 1_000_003 + index) % 2**30
        return {
            "task_id": f"env/{self.split}/{self.seed}/{index}",
            "question": "",
            "answer": "",
            "split": self.split,
            self.SEED: 2 * draw + (self.split == "held_out"),
        }


class Order(Protocol):
    """An endless sequence of tasks, indexed by position."""

    def __getitem__(self, position: int, /) -> Task: ...


def load_order(config: DataConfig, seed: int, whole: bool = False) -> Order:
    """Return the training tasks in the order in which a run uses them.

    Args:
        config: The tasks of the run.
        seed: Seed of the order.
        whole: Whether all rows of files are trained on, because the run is evaluated on other data.

    Raises:
        ValueError: A source has no tasks or a broken one; the message says which, and what to do.
    """

    def order(source: TrainingSource) -> TaskOrder:
        return TaskOrder(load_source(source, whole=whole), seed)

    if not config.mix:
        return order(config)
    orders = [order(source) for source in config.mix]
    return MixedOrder(orders, [source.weight for source in config.mix], seed)


def load_source(
    config: SourceConfig, split: Split = "train", size: int | None = None, whole: bool = False
) -> TaskSource:
    """Return the tasks of one source, by index.

    Args:
        config: Names the source and holds its settings.
        split: Which of its two splits to return.
        size: Number of tasks to generate, which files ignore; None: that of a training source.
        whole: For files, return all rows in place of a split.

    Raises:
        ValueError: The source has no tasks or a broken one; the message says which, and what to do.
    """
    if config.source in FILE_SOURCES:
        opened = open_rows(config)
        tasks = opened.whole if whole else opened.splits[split]
        if not len(tasks):
            raise ValueError(
                f"{tasks.rows.name}: no tasks are left for the {split} split, which gets "
                f"{'one' if split == 'held_out' else 'seven'} in eight; add some more, or name "
                "data to evaluate on in eval.data"
            )
        return tasks
    if size is None:
        assert isinstance(config, TrainingSource)
        size = config.num_tasks
    if config.source == "env":
        return EnvTasks(config.seed, size, split)
    return _open_entry_point(config, split, size)


def _open_entry_point(config: SourceConfig, split: Split, size: int) -> TaskSource:
    """Import a source and call it: `MyTasks(seed=..., size=..., split=...)`.

    It gets `dataset` as well if the config has one.
    """
    name = SOURCES.get(config.source, config.source)
    module, _, attribute = name.partition(":")
    arguments: dict[str, Any] = {"seed": config.seed, "size": size, "split": split}
    if config.dataset is not None:
        arguments["dataset"] = config.dataset
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import the task source {name!r}: {error}") from error
    try:
        source = make(**arguments)
    except TypeError as error:
        raise ValueError(
            f"cannot open the task source {name!r} with {', '.join(arguments)}: {error}"
        ) from error
    if len(source):
        missing = [key for key in _KEYS if key not in source[0]]
        if missing:
            raise ValueError(f"a task of {name!r} has no {' and no '.join(map(repr, missing))}")
    return source


def load_held_out(config: DataConfig, num_tasks: int) -> list[Task]:
    """Return `num_tasks` tasks whose questions are in no training source.

    The sources of a mixture contribute by their weights.

    Raises:
        ValueError: A source has fewer held-out tasks than its share.
    """
    sources: Sequence[TrainingSource] = config.sources
    shares = _shares([getattr(each, "weight", 1.0) for each in sources], num_tasks)
    tasks = []
    for source, share in zip(sources, shares, strict=True):
        if not share:
            continue
        held_out = load_source(source, "held_out", share)
        if len(held_out) < share:
            raise ValueError(
                f"{source.path or source.dataset or source.source} has {len(held_out)} held-out "
                f"tasks (one in eight), not {share}: evaluate on at most {len(held_out)}, add "
                "tasks, or name data to evaluate on in eval.data"
            )
        tasks += [Task.from_row(held_out[index]) for index in range(share)]
    return tasks


def load_eval_sets(data: DataConfig | None, config: EvalConfig) -> list[EvalSet]:
    """Return what a run is evaluated on.

    Args:
        data: The tasks of the run, from which some are held out where the config names no others;
            None: the run has no tasks.
        config: Settings of the evaluation.

    Raises:
        ValueError: There are too few tasks, or a source is broken.
    """
    if not config.data:
        return [] if data is None else [EvalSet("", load_held_out(data, config.num_tasks))]
    sets = []
    for source in config.data:
        size = config.num_tasks if source.limit is None else source.limit
        rows = load_source(source, "held_out", size, whole=True)
        count = len(rows) if source.limit is None else min(source.limit, len(rows))
        sets.append(EvalSet(source.label, [Task.from_row(rows[index]) for index in range(count)]))
    return sets


def overlap(data: DataConfig, sets: Sequence[EvalSet]) -> list[str]:
    """Warn of questions that are evaluated and are also in a file that is trained on.

    Returns:
        One sentence per set that shares questions with a file.
    """
    files = [each for each in data.sources if each.source in FILE_SOURCES]
    wanted = {task.question for each in sets if each.name for task in each.tasks}
    if not files or not wanted:
        return []
    shared: set[str] = set()
    for source in files:
        rows = open_rows(source).whole
        shared |= {rows[index]["question"] for index in range(len(rows))} & wanted
    sentences = []
    for each in sets:
        common = [task for task in each.tasks if task.question in shared]
        if common:
            sentences.append(
                f"{len(common)} of the {len(each.tasks)} questions of eval.data {each.name!r} are "
                f"also trained on, the first is {common[0].task_id}: its accuracy says little"
            )
    return sentences


def left_out(sources: Sequence[SourceConfig]) -> list[str]:
    """List the rows of files that were left out: one sentence per row, then one on lengths."""
    sentences = []
    for source in sources:
        if source.source in FILE_SOURCES:
            opened: Opened = open_rows(source)
            sentences += opened.broken
            if opened.num_filtered:
                sentences.append(
                    f"{source.path or source.dataset}: {opened.num_filtered} rows left out by the "
                    "length of their question"
                )
    return sentences


def digests(sources: Sequence[SourceConfig]) -> dict[str, dict[str, Any]]:
    """Return the number of rows and the digest of each data set of the hub that is used."""
    found = {}
    for source in sources:
        if source.source == "hub":
            opened = open_rows(source)
            name = f"{opened.whole.rows.name} ({source.question_column}, {source.answer_column})"
            num_rows = len(opened.whole) + opened.num_filtered
            found[name] = {"rows": num_rows, "sha256": opened.sha256}
    return found


class Shuffled:
    """Endless indices by position: every epoch contains all of them, in an order of its own.

    The index at a position is a function of (size, seed, position), so a run resumes from a single
    number.

    Args:
        size: Number of indices; positive.
        seed: Together with the number of the epoch, determines the order.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __getitem__(self, position: int, /) -> int:
        epoch, offset = divmod(position, self._size)
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._epoch, self._order = epoch, rng.permutation(self._size)
        return int(self._order[offset])


class TaskOrder:
    """Endless tasks by position, in the order of `Shuffled`.

    Args:
        source: The tasks.
        seed: Determines the order.

    Raises:
        ValueError: The source has no tasks.
    """

    def __init__(self, source: TaskSource, seed: int) -> None:
        if not len(source):
            raise ValueError("there are no tasks to train on")
        self._source, self._order = source, Shuffled(len(source), seed)

    def __getitem__(self, position: int, /) -> Task:
        return Task.from_row(self._source[self._order[position]])


class MixedOrder:
    """Endless tasks of several orders, by weight; each block of 1024 positions has the weights.

    As with `TaskOrder`, a run resumes from a position alone.

    Args:
        orders: One order per source.
        weights: One positive weight per source.
        seed: Determines the order in which the sources take turns.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int) -> None:
        self._orders, self._seed = orders, seed
        self._shares = _shares(weights, _BLOCK)
        self._block = -1
        self._sources = np.empty(0, np.int64)

    def __getitem__(self, position: int, /) -> Task:
        block, offset = divmod(position, _BLOCK)
        if block != self._block:
            rng = np.random.default_rng((self._seed, block, 1))
            once = np.repeat(np.arange(len(self._shares)), self._shares)
            self._block, self._sources = block, rng.permutation(once)
        source = int(self._sources[offset])
        before = int((self._sources[:offset] == source).sum())
        return self._orders[source][block * self._shares[source] + before]


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Divide `total` by weight into whole numbers; the largest remainders get what is left."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(each) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares

"""Tasks for training and evaluation: loaded, filtered, mixed, shuffled, resumed at a position.

The order of an epoch follows from (seed, epoch), and a source makes or finds each task from its
index, so the task at any position can be had without those before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tir_alp.config import DataConfig, SourceConfig
from tir_alp.envs.code_tasks import CodeTasks
from tir_alp.envs.tasks import ArithmeticTasks, ReasoningGymTasks, Split, TaskSource
from tir_alp.rollouts.data_files import Opened, open_rows

_FILES = ("jsonl", "parquet", "hub")
_BLOCK = 1024  # positions over which a mixture has its weights


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
    """Where the environment draws the task itself: by this seed, with `metadata` as options."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Task:
        """Make a task from a row, whose columns beside the three become metadata."""
        metadata = dict(row)
        three = {name: metadata.pop(name) for name in ("task_id", "question", "answer")}
        return cls(**three, metadata=metadata, seed=metadata.pop(EnvTasks.SEED, None))

    def to_options(self) -> dict[str, Any]:
        """Return the `options` of `env.reset`, beside `seed`: the row as it was, if it is ours."""
        if self.seed is not None:
            return dict(self.metadata)
        row = {"task_id": self.task_id, "question": self.question, "answer": self.answer}
        return {"task": {**self.metadata, **row}}


@dataclass(frozen=True, slots=True)
class EnvTasks:
    """Tasks that an environment draws itself, by seed: no seed is in both splits.

    Environments that know the option `split`, as all of ours do, then share no question either.
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
    """Endless tasks by position."""

    def __getitem__(self, position: int, /) -> Task: ...


def load_order(config: DataConfig, seed: int) -> Order:
    """Return the training tasks in the order of a run.

    Raises:
        ValueError: there are none, or one of them is broken; it says which, and what to do.
    """
    if not config.mix:
        return TaskOrder(load_source(config), seed)
    orders = [TaskOrder(load_source(source), seed) for source in config.mix]
    return MixedOrder(orders, [source.weight for source in config.mix], seed)


def load_source(
    config: SourceConfig, split: Split = "train", size: int | None = None
) -> TaskSource:
    """Return the tasks of one source, by index.

    Args:
        config: Which source.
        split: Which of its two halves.
        size: Instead of the config's number of tasks, where they are generated.

    Raises:
        ValueError: there are none, or one of them is broken; it says which, and what to do.
    """
    seed, size = config.seed, config.num_tasks if size is None else size
    match config.source:
        case "arithmetic":
            return ArithmeticTasks(seed, size, split)
        case "code":
            return CodeTasks(seed, size, split)
        case "env":
            return EnvTasks(seed, size, split)
        case "reasoning_gym":
            assert config.dataset is not None
            return ReasoningGymTasks(config.dataset, seed=seed, size=size, split=split)
        case _:
            tasks = open_rows(config).splits[split]
            if not len(tasks):
                raise ValueError(
                    f"{tasks.rows.name}: no tasks are left for the {split} split, which has "
                    f"{'one' if split == 'held_out' else 'seven'} in eight; add some more"
                )
            return tasks


def load_held_out(config: DataConfig, num_tasks: int) -> list[Task]:
    """Return `num_tasks` tasks whose questions are in no training source; of a mixture by weight.

    Raises:
        ValueError: there are not so many.
    """
    sources: Sequence[SourceConfig] = config.mix or (config,)
    shares = _shares([getattr(each, "weight", 1.0) for each in sources], num_tasks)
    tasks = []
    for source, share in zip(sources, shares, strict=True):
        if not share:
            continue
        held_out = load_source(source, "held_out", share)
        if len(held_out) < share:
            raise ValueError(
                f"{source.path or source.dataset} has {len(held_out)} held-out tasks (one in "
                f"eight), not {share}: evaluate on at most {len(held_out)}, or add tasks"
            )
        tasks += [Task.from_row(held_out[index]) for index in range(share)]
    return tasks


def left_out(config: DataConfig) -> list[str]:
    """Say which rows of the files were left out: a sentence each, then one about their lengths."""
    sentences = []
    for source in config.mix or (config,):
        if source.source in _FILES:
            opened: Opened = open_rows(source)
            sentences += opened.broken
            if opened.num_filtered:
                sentences.append(
                    f"{source.path or source.dataset}: {opened.num_filtered} rows left out by the "
                    "length of their question"
                )
    return sentences


class TaskOrder:
    """Endless tasks by position: every epoch has all of them, in an order of its own.

    The task at a position is a function of (source, seed, position), so to resume is to remember a
    number.

    Args:
        source: The tasks.
        seed: Decides the order, together with the number of the epoch.

    Raises:
        ValueError: If there are none.
    """

    def __init__(self, source: TaskSource, seed: int) -> None:
        if not len(source):
            raise ValueError("there are no tasks to train on")
        self._source, self._seed = source, seed
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __getitem__(self, position: int, /) -> Task:
        epoch, place = divmod(position, len(self._source))
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._epoch, self._order = epoch, rng.permutation(len(self._source))
        return Task.from_row(self._source[int(self._order[place])])


class MixedOrder:
    """Endless tasks of several orders, by weight: any 1024 from a multiple of it have the weights.

    As with `TaskOrder`, a position is all that a resume needs.

    Args:
        orders: One a source.
        weights: Positive, one a source.
        seed: Decides the order of the sources.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int) -> None:
        self._orders, self._seed = orders, seed
        self._shares = _shares(weights, _BLOCK)
        self._block = -1
        self._sources = np.empty(0, np.int64)

    def __getitem__(self, position: int, /) -> Task:
        block, place = divmod(position, _BLOCK)
        if block != self._block:
            rng = np.random.default_rng((self._seed, block, 1))
            once = np.repeat(np.arange(len(self._shares)), self._shares)
            self._block, self._sources = block, rng.permutation(once)
        source = int(self._sources[place])
        before = int((self._sources[:place] == source).sum())
        return self._orders[source][block * self._shares[source] + before]


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Divide `total` by weight into whole numbers; what is left goes to the largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(each) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares

"""Tasks for training and evaluation: loaded, filtered, shuffled, and resumed where a run stopped.

The order of an epoch follows from (seed, epoch), and a source makes or finds each task from its
index, so the task at any position can be had without those before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tir_alp.config import DataConfig
from tir_alp.envs.tasks import (
    ArithmeticTasks,
    ReasoningGymTasks,
    Split,
    TaskSource,
    is_held_out,
)


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

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Task:
        """Make a task from a row, whose columns beside the three become metadata."""
        metadata = dict(row)
        three = {name: metadata.pop(name) for name in ("task_id", "question", "answer")}
        return cls(**three, metadata=metadata)

    def to_options(self) -> dict[str, Any]:
        """Return the `options` of `env.reset`: the row, as it was."""
        row = {"task_id": self.task_id, "question": self.question, "answer": self.answer}
        return {"task": {**self.metadata, **row}}


def load_source(config: DataConfig) -> TaskSource:
    """Return the training tasks, by index.

    Raises:
        ValueError: there are none, or one of them is broken; it says which, and what to do.
    """
    match config.source:
        case "arithmetic":
            return ArithmeticTasks(config.seed, config.num_tasks)
        case "reasoning_gym":
            assert config.dataset is not None
            return ReasoningGymTasks(config.dataset, seed=config.seed, size=config.num_tasks)
        case "jsonl":
            assert config.path is not None
            rows = _split_rows(read_jsonl(config.path), "train")
            if not rows:
                raise ValueError(f"{config.path}: all tasks are held out; add some more")
            return rows


def load_held_out(config: DataConfig, num_tasks: int) -> list[Task]:
    """Return `num_tasks` tasks whose questions are in no training source.

    Raises:
        ValueError: there are not so many.
    """
    match config.source:
        case "arithmetic":
            source: TaskSource = ArithmeticTasks(config.seed, num_tasks, "held_out")
        case "reasoning_gym":
            assert config.dataset is not None
            source = ReasoningGymTasks(
                config.dataset, seed=config.seed, size=num_tasks, split="held_out"
            )
        case "jsonl":
            assert config.path is not None
            source = _split_rows(read_jsonl(config.path), "held_out")
            if len(source) < num_tasks:
                raise ValueError(
                    f"{config.path} has {len(source)} held-out tasks (one in eight), not "
                    f"{num_tasks}: evaluate on at most {len(source)}, or add tasks"
                )
    return [Task.from_row(source[index]) for index in range(num_tasks)]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of tasks: one JSON object a line; blank lines are skipped.

    `question` is a text, `answer` a text or a number. `task_id` may be left out: it becomes the
    file's name and the number of the line.

    Raises:
        ValueError: the file cannot be read, is empty, or has a broken line, which is named.
    """
    try:
        with path.open("rb") as file:
            rows = [
                _parse_row(line, path, number)
                for number, line in enumerate(file, start=1)
                if line.strip()
            ]
    except OSError as error:
        raise ValueError(f"cannot read the tasks in {path}: {error.strerror}") from None
    if not rows:
        raise ValueError(f"{path} holds no tasks: it needs one JSON object a line")
    return rows


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


def _split_rows(rows: list[dict[str, Any]], split: Split) -> list[dict[str, Any]]:
    return [row for row in rows if is_held_out(row["question"]) == (split == "held_out")]


def _parse_row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    place = f"{path}:{number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error}): mend or delete the line") from None
    if not isinstance(row, dict):
        raise ValueError(f'{place}: not an object: write {{"question": ..., "answer": ...}}')
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{place}: 'question' must be a text that is not empty, not {question!r}")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"{place}: 'answer' must be a text or a number, not {answer!r}")
    task_id = str(row.get("task_id", f"{path.name}:{number}"))
    return row | {"task_id": task_id, "question": question, "answer": answer}

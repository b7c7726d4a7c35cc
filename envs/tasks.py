"""Generated tasks: arithmetic, and the data sets of reasoning-gym by name.

A task is a dict with `task_id`, `question` and `answer`, all strings; tasks of reasoning-gym also
have `dataset` and `metadata`, for its scorers. Every source is a pure function of its arguments and
an index: nothing is stored, and any task can be computed again from its index.

One rule divides every source into two splits: `tir_alp.tools.held_out.is_held_out(question)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from tir_alp.tools.held_out import Split, is_held_out, stable_hash

_MAX_DRAWS = 256  # (1 - 1/8)^256 < 1e-14: only a source with very few questions can fail


Row = TypeVar("Row", bound=Mapping[str, Any])


def first_of_split(draw: Callable[[int], Row], split: Split | None) -> Row:
    """Return the first of the draws 0, 1, 2, ... whose question is in a split; None: any split."""
    for number in range(_MAX_DRAWS):
        row = draw(number)
        if split in (None, "held_out" if is_held_out(row["question"]) else "train"):
            return row
    raise AssertionError(f"{_MAX_DRAWS} draws without a {split} question")


class TaskSource(Protocol):
    """Tasks by index; a list of dicts is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def arithmetic_task(seed: int, index: int, split: Split = "train") -> dict[str, str]:
    """Return a question that needs a calculator, e.g. "What is 37*48+112?", and its answer.

    There are 14 million questions. They are short because the smallest models read characters.
    """

    def draw(number: int) -> dict[str, str]:
        bits = stable_hash(f"arithmetic/{seed}/{index}/{number}")
        bits, a = divmod(bits, 89)
        bits, b = divmod(bits, 89)
        bits, c = divmod(bits, 900)
        a, b, c = a + 11, b + 11, c + 100
        sign, answer = ("+", a * b + c) if bits % 2 else ("-", a * b - c)
        return {"question": f"What is {a}*{b}{sign}{c}?", "answer": str(answer)}

    return {"task_id": f"arithmetic/{split}/{seed}/{index}", **first_of_split(draw, split)}


@dataclass(frozen=True, slots=True)
class ArithmeticTasks:
    """The first `size` tasks of `arithmetic_task`."""

    seed: int
    size: int
    split: Split = "train"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> dict[str, str]:
        check_index(index, self.size)
        return arithmetic_task(self.seed, index, self.split)


class ReasoningGymTasks:
    """Tasks of one data set of reasoning-gym, e.g. "gcd" or "basic_arithmetic".

    `ReasoningGym-v0` grades with the data set's own scorer. Other environments grade answers as
    mathematics, so use them only with data sets that have such answers. `split` None is both
    splits.
    """

    def __init__(self, dataset: str, *, seed: int, size: int, split: Split | None = "train"):
        self._dataset, self._seed, self._size, self._split = dataset, seed, size, split
        self._draws = _reasoning_gym(dataset, seed, size)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        check_index(index, self._size)
        # The first of the draws index, index + size, index + 2 size, ... that is in the split.
        for draw in range(index, self._size * _MAX_DRAWS, self._size):
            row = self._draw(draw)
            if self._split in (None, "held_out" if is_held_out(row["question"]) else "train"):
                return {
                    "task_id": f"reasoning_gym/{self._dataset}/{self._seed}/{draw}",
                    "question": row["question"],
                    "answer": str(row["answer"]),
                    "dataset": self._dataset,
                    "metadata": row["metadata"],
                }
        raise ValueError(
            f"reasoning-gym's {self._dataset!r} has too few different questions for a "
            f"{self._split} split: none in {_MAX_DRAWS} draws"
        )

    def _draw(self, draw: int) -> Mapping[str, Any]:
        """Return row `draw` of the data set as if it were endless: seed plus index make a row."""
        try:
            return self._draws[draw]
        except IndexError:  # a data set that makes all its rows at once
            block, offset = divmod(draw, self._size)
            return _reasoning_gym(self._dataset, self._seed + block * self._size, self._size)[
                offset
            ]


@functools.lru_cache(
    maxsize=32
)  # the environments of a run ask for the same sets, and some take seconds
def _reasoning_gym(name: str, seed: int, size: int) -> Any:
    import reasoning_gym  # takes seconds, so only when it is used
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ValueError(
            f"reasoning-gym has no data set {name!r}; it has: {', '.join(sorted(DATASETS))}"
        )
    return reasoning_gym.create_dataset(name, seed=seed, size=size)


def check_index(index: int, size: int) -> None:
    """Raise IndexError for an index outside a source, so that a loop over the source ends."""
    if not 0 <= index < size:
        raise IndexError(f"task {index} of {size}")

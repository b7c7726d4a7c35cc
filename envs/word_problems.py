"""Word problems from templates: a short story with numbers, and one number as the answer."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tir_alp.envs.tasks import check_index, first_of_split
from tir_alp.tools.held_out import Split, stable_hash

_NAMES = ("Ada", "Ben", "Chloe", "Dmitri", "Elif", "Farid", "Grace", "Hana", "Ivan", "Jun")
_THINGS = ("apples", "books", "candles", "eggs", "lamps", "marbles", "pens", "tickets")

_STORIES = (
    (
        "{name} buys {a} boxes with {b} {things} each and gives {c} of the {things} away. How many "
        "{things} are left?",
        "{a} * {b} - {c}",
    ),
    (
        "A shop sells {a} {things} at {b} coins each and pays {c} coins of rent. How many coins "
        "are left?",
        "{a} * {b} - {c}",
    ),
    (
        "{name} saves {a} coins per week for {b} weeks, and then gets {c} coins as a present. How "
        "many coins does {name} have?",
        "{a} * {b} + {c}",
    ),
    (
        "A train makes {a} trips of {b} km and then one of {c} km. How many km is that?",
        "{a} * {b} + {c}",
    ),
    (
        "{name} has {c} {things} and wants to have {a} times {b} of them. How many {things} are "
        "missing?",
        "{a} * {b} - {c}",
    ),
    (
        "In a hall are {a} rows of {b} seats, and {c} more seats stand at the side. Each ticket "
        "costs 3 coins. How many coins does a full hall bring in?",
        "({a} * {b} + {c}) * 3",
    ),
    (
        "{name} reads {a} pages on each of {b} days, and half of {c} pages on the last day. How "
        "many pages are that?",
        "{a} * {b} + {c} // 2",
    ),
)


@dataclass(frozen=True, slots=True)
class WordProblems:
    """The first `size` word problems of a seed. `expression` is the answer as Python."""

    seed: int
    size: int
    split: Split = "train"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> dict[str, str]:
        check_index(index, self.size)
        task = first_of_split(
            lambda number: _story(f"word_problems/{self.seed}/{index}/{number}"), self.split
        )
        return {"task_id": f"word_problems/{self.split}/{self.seed}/{index}", **task}


def _story(key: str) -> dict[str, str]:
    rng = random.Random(stable_hash(key))
    text, expression = rng.choice(_STORIES)
    numbers = {"a": rng.randint(12, 98), "b": rng.randint(12, 98), "c": 2 * rng.randint(5, 70)}
    names = {"name": rng.choice(_NAMES), "things": rng.choice(_THINGS)}
    expression = expression.format(**numbers)
    return {
        "question": text.format(**numbers, **names),
        "answer": str(eval(expression, {"__builtins__": {}})),  # generated numbers and operators
        "expression": expression,
    }

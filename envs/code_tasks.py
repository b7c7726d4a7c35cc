"""Generated tasks about small functions: a question, a reference solution, hidden tests."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from tir_alp.envs.tasks import check_index, first_of_split
from tir_alp.tools.held_out import Split

_NUM_TESTS = 6
_KINDS: tuple[tuple[str, str], ...] = (
    ("the sum of those numbers in the list that {condition}", "sum(x for x in xs if {test})"),
    ("how many numbers in the list {condition}", "sum(1 for x in xs if {test})"),
    ("a list of those numbers that {condition}, in order", "[x for x in xs if {test}]"),
    (
        "a list of those numbers that {condition}, from the largest to the smallest",
        "sorted((x for x in xs if {test}), reverse=True)",
    ),
    (
        "the first number in the list that {condition_one}, or None",
        "next((x for x in xs if {test}), None)",
    ),
    (
        "the largest of those numbers that {condition}, or 0",
        "max((x for x in xs if {test}), default=0)",
    ),
)
_CONDITIONS: tuple[tuple[str, str, str], ...] = (
    ("leave {a} when divided by {m}", "leaves {a} when divided by {m}", "x % {m} == {a}"),
    ("are greater than {t}", "is greater than {t}", "x > {t}"),
    ("are smaller than {t}", "is smaller than {t}", "x < {t}"),
    ("differ from {t} by at most {m}", "differs from {t} by at most {m}", "abs(x - {t}) <= {m}"),
)


@dataclass(frozen=True, slots=True)
class CodeTasks:
    """The first `size` tasks of a seed; `split` None is both splits."""

    seed: int
    size: int
    split: Split | None = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        check_index(index, self.size)
        task = first_of_split(
            lambda number: _task(random.Random(f"code/{self.seed}/{index}/{number}")), self.split
        )
        return {"task_id": f"code/{self.split or 'all'}/{self.seed}/{index}", **task}


def _task(rng: random.Random) -> dict[str, Any]:
    modulus = rng.randint(2, 12)
    values = {"m": modulus, "a": rng.randrange(modulus), "t": rng.randint(-40, 40)}
    result, expression = rng.choice(_KINDS)
    conditions = [text.format(**values) for text in rng.choice(_CONDITIONS)]
    result = result.format(condition=conditions[0], condition_one=conditions[1])
    source = f"def f(xs):\n    return {expression.format(test=conditions[2])}\n"
    space: dict[str, Any] = {}
    exec(source, space)  # generated above, no model's text
    lists = [[], *([rng.randint(-60, 60) for _ in range(rng.randint(1, 12))] for _ in range(5))]
    tests = [{"args": [xs], "expected": space["f"](xs)} for xs in lists[:_NUM_TESTS]]
    question = f"Write a function f(xs) that takes a list of whole numbers and returns {result}."
    return {"question": question, "answer": source, "entry_point": "f", "tests": tests}

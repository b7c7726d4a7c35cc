"""`ReasoningGym-v0`: tasks of reasoning-gym by the name of a data set, with the set's own scorer.

Nine of the scorers evaluate the answer as Python (`EVALUATING`). An answer that could do more than
compute is never passed to one of these: it scores 0. The other scorers only compare. All of them
run in processes that can be killed. An answer that a scorer cannot evaluate is wrong if the scorer
has a verdict on the task's own answer.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Unpack

from tir_alp.envs.grader_pool import GaveUp, GraderError, GraderPool
from tir_alp.envs.grading import Grade
from tir_alp.envs.tasks import ReasoningGymTasks, TaskSource
from tir_alp.envs.tool_env import EnvSettings, ToolEnv
from tir_alp.tools.calls import prose
from tir_alp.tools.outcome import Outcome
from tir_alp.tools.python_tool import PythonTool

EVALUATING = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
"""Data sets whose scorers evaluate the answer as Python."""

_FUNCTIONS = frozenset(
    {
        *("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
        *("asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "erf"),
        *("Abs", "Rational", "Integer"),
    }
)
_MOST_CHARS = 10_000  # length of an answer that may be evaluated
_MAY_PRECEDE = frozenset("+-*/^%,([{=<>:|&~")  # what may stand before a parenthesis that is no call
_NAME = re.compile(r"[^\W\d]\w*$")
_PROGRAM = re.compile(r"__|[\\#;]|\.\s*[^\W\d]")

_pool = GraderPool(
    num_workers=min(4, os.cpu_count() or 1),
    judge_file=Path(__file__).with_name("reasoning_gym_judge.py"),
)


def _replace_pool() -> None:
    global _pool
    _pool.abandon()
    _pool = GraderPool(num_workers=_pool.num_workers, judge_file=_pool.judge_file)


# A forked child must not use its parent's graders: the two would read each other's verdicts.
os.register_at_fork(after_in_child=_replace_pool)
atexit.register(lambda: _pool.close())


class ReasoningGymEnv(ToolEnv):
    """A task of reasoning-gym, and a Python tool; the reward is the score of the set's scorer.

    A task needs `dataset`, the name of its data set, and `metadata`, as in the rows of that set.

    Args:
        dataset: Data set that `reset` draws from if it is not given a task.
        seed: Seed of the data set.
        sandbox: Settings of the sandbox that runs code; None for the defaults.
        tasks: Tasks that `reset` draws from, in place of `dataset`.
        settings: Settings of `ToolEnv`.
    """

    instruction: ClassVar[str] = """\
Solve the problem step by step. You may write Python code in a block that begins with a line \
```python and ends with a line ```. The block is run as soon as it is complete, and you are shown \
what it prints; then go on. When you know the answer, write it between <answer> and </answer>, and \
nothing else between them."""
    task_keys: ClassVar[tuple[str, ...]] = ("question", "answer", "dataset", "metadata")

    def __init__(
        self,
        *,
        dataset: str = "chain_sum",
        seed: int = 0,
        sandbox: Mapping[str, Any] | None = None,
        tasks: TaskSource | None = None,
        **settings: Unpack[EnvSettings],
    ):
        if tasks is None:
            tasks = ReasoningGymTasks(dataset, seed=seed, size=1000, split=None)
        super().__init__(tools=[PythonTool(sandbox=sandbox)], tasks=tasks, **settings)

    def answer_in(self, action: str) -> str | None:
        """Return the text between the last pair of answer tags in the model's own prose."""
        tagged = [
            each for each in map(_tagged, prose(action, self.call_format)) if each is not None
        ]
        return tagged[-1] if tagged else None

    def grade(self, task: Mapping[str, Any], answer: str) -> Grade:
        """Ask the data set's own scorer. A full score is correct; a lower one is the reward."""
        name = str(task["dataset"])
        if name in EVALUATING and is_program(answer):
            return Grade(correct=False, error="the answer is a program")
        entry = {key: task[key] for key in ("question", "answer", "metadata")}
        try:
            score = _pool.verify(name, answer, entry)
        except GaveUp as error:
            return _without_verdict(name, entry, error)
        except GraderError as error:
            return Grade(correct=None, outcome=Outcome.GRADER_ERROR, error=str(error))
        return Grade(correct=score >= 1.0, score=score)

    def gold_action(self, task: Mapping[str, Any]) -> str:
        """Return a turn with the data set's own answer."""
        return f"<answer>{task['answer']}</answer>"

    def wrong_action(self, task: Mapping[str, Any]) -> str:
        """Return a turn without an answer: some scorers give a score for any answer at all."""
        return "I do not know."


def _without_verdict(name: str, entry: Mapping[str, Any], failure: GaveUp) -> Grade:
    """Return the grade of an answer on which the scorer gave up: wrong, if the task is fine."""
    gold = "" if entry["answer"] is None else str(entry["answer"])
    try:
        _pool.verify(name, gold, entry)
    except GraderError as error:
        fault = f"the task cannot be graded even with its own answer: {error}"
        return Grade(correct=None, outcome=Outcome.GRADER_ERROR, error=fault)
    return Grade(correct=False, error=f"the answer cannot be evaluated: {failure}")


def is_program(answer: str) -> bool:
    """Whether evaluating an answer could call or access anything but mathematical functions.

    Example:
        >>> is_program("(x + 1)*sin(x)"), is_program("[exec][0]('...')")
        (False, True)
    """
    if len(answer) > _MOST_CHARS or _PROGRAM.search(answer):
        return True
    for opening in re.finditer(r"\(", answer):
        before = answer[: opening.start()].rstrip()
        name = _NAME.search(before)
        if name is not None and name[0] not in _FUNCTIONS:
            return True
        if name is None and before and before[-1] not in _MAY_PRECEDE:
            return True
    return False


def _tagged(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return None if start < 0 else text[start + len("<answer>") : end].strip()

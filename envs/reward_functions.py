"""Reward functions of a user: `env.kwargs.rewards` in place of an environment's own grading.

A function is called once per episode, in a process that can be killed, with the last text that the
model wrote. What it gets wrong is a failure of the grader, never a reward: the message names the
function and the task.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tir_alp.envs.grader_pool import GraderError, GraderPool
from tir_alp.envs.grading import Grade
from tir_alp.tools.outcome import Outcome

_KEY = "env.kwargs.rewards"
_DEADLINE_S = 10.0  # of processor time; the wall-clock limit of a grader is ten times that


def _new_pool() -> GraderPool:
    return GraderPool(
        num_workers=min(4, os.cpu_count() or 1),
        judge_file=Path(__file__).with_name("reward_judge.py"),
        deadline_s=_DEADLINE_S,
    )


_pool = _new_pool()


def _replace_pool() -> None:
    global _pool
    _pool = _new_pool()


# A forked child must not use its parent's graders: the two would read each other's verdicts.
os.register_at_fork(after_in_child=_replace_pool)
atexit.register(lambda: _pool.close())


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """One function and its weight in the sum."""

    name: str
    """As the user wrote it, `module:function`."""
    weight: float = 1.0


def read_rewards(settings: Sequence[str | Mapping[str, Any]]) -> tuple[RewardFunction, ...]:
    """Read the setting `rewards`, and import each function once to see that it is there.

    Args:
        settings: `"module:function"`, or `{"function": "module:function", "weight": 0.5}`, each.

    Raises:
        ValueError: A setting is wrong, or there is no such function.
    """
    if isinstance(settings, str | Mapping):
        raise ValueError(f'{_KEY} is a list, such as ["my_module:function"], not {settings!r}')
    functions = []
    for index, each in enumerate(settings):
        place = f"{_KEY}[{index}]"
        entry = {"function": each} if isinstance(each, str) else dict(each)
        name, weight = entry.pop("function", None), entry.pop("weight", 1.0)
        if entry or not isinstance(name, str):
            raise ValueError(
                f'{place} is {each!r}; write "module:function", or '
                '{ function = "module:function", weight = 0.5 }'
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"{place}: the weight is {weight!r}, which is not a number")
        _check_exists(place, name)
        functions.append(RewardFunction(name, float(weight)))
    if len({each.name for each in functions}) < len(functions):
        raise ValueError(f"{_KEY} names a function twice: {[each.name for each in functions]}")
    return tuple(functions)


def _check_exists(place: str, name: str) -> None:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"{place} is {name!r}, which is not of the form module:function")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # it is the user's code, which may raise anything
        raise ValueError(f"{place}: cannot import {module!r}: {error!r}") from error
    if not callable(getattr(found, attribute, None)):
        raise ValueError(f"{place}: the module {module!r} has no function {attribute!r}")


def grade_by(
    functions: Sequence[RewardFunction],
    task: Mapping[str, Any],
    completion: str,
    final_answer: str | None,
) -> Grade:
    """Return the weighted sum of the functions as the score; it is correct from 1 on.

    Args:
        functions: The functions.
        task: The task; its `question` and `answer` are the functions' first arguments.
        completion: The model's last turn, which has no tool call.
        final_answer: The answer in it, in the environment's own form; None if there is none.
    """
    terms: dict[str, float] = {}
    for each in functions:
        try:
            value = _pool.verify(sys.path, each.name, dict(task), completion, final_answer)
        except GraderError as error:
            failure = f"the reward function {each.name} on task {task.get('task_id')!r}: {error}"
            return Grade(correct=None, outcome=Outcome.GRADER_ERROR, error=failure)
        terms[each.name] = each.weight * value
    score = sum(terms.values())
    return Grade(correct=score >= 1.0, score=score, terms=terms)

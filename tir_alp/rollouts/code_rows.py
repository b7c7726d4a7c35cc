"""Rows of public data sets of programs as coding tasks: a question, an answer, and hidden tests.

The forms are those of HumanEval, MBPP, APPS (and TACO), and LiveCodeBench. What the tests are is
read later, by `tools.code_forms`; here columns get their names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tir_alp.rollouts.packed_tests import read_packed

_CALLED = re.compile(r"[^\W\d]\w*(?=\s*\()")
_DEFINED = re.compile(r"^def\s+([^\W\d]\w*)", re.MULTILINE)
_PACKED = ("public_test_cases", "private_test_cases")


def as_coding_task(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row with `question`, `answer` and `tests` if it has a known form.

    The forms are that of HumanEval (`prompt`, `entry_point`, `test`), those of MBPP (`prompt` or
    `text`, `code`, `test_list`), that of APPS (`question`, `input_output`, `solutions`) and that of
    LiveCodeBench (`question_content`, `public_test_cases`, `private_test_cases`). Any other row is
    returned as it is.

    Raises:
        ValueError: The row has one of these forms, and its tests cannot be read.
    """
    if isinstance(raw.get("question_content"), str) and any(map(raw.__contains__, _PACKED)):
        return _of_livecodebench(raw)
    if "question" in raw:
        is_apps = "input_output" in raw and not {"answer", "tests"} & raw.keys()
        return _of_apps(raw) if is_apps else raw
    prompt = raw.get("prompt", raw.get("text"))
    if not isinstance(prompt, str):
        return raw
    if isinstance(raw.get("test"), str) and isinstance(raw.get("entry_point"), str):
        question = f"Complete this function:\n\n{prompt.strip()}"
        return {
            **raw,
            "question": question,
            "answer": raw["entry_point"],
            "tests": raw["test"],
        }
    tests, code = raw.get("test_list"), raw.get("code")
    if not isinstance(tests, list) or not isinstance(code, str) or not tests:
        return raw
    defined = _DEFINED.findall(code)
    called = [name for name in _CALLED.findall(str(tests[0])) if name in defined]
    if not called:
        return raw
    shown = "\n".join(map(str, tests))
    return {
        **raw,
        "question": f"{prompt.strip()}\nYour function has to pass these tests:\n{shown}",
        "answer": called[0],
        "entry_point": called[0],
        "tests": tests,
    }


def _of_livecodebench(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Public and private tests together; the packed columns are left out of the row."""
    tests = []
    for column in _PACKED:
        try:
            tests += read_packed(raw.get(column))
        except ValueError as error:
            raise ValueError(f"{column!r} {error}") from None
    if not tests:
        raise ValueError(f"there are no tests in {' and '.join(map(repr, _PACKED))}")
    metadata = _object(raw, "metadata")
    name = metadata.get("func_name")
    row = {key: value for key, value in raw.items() if key not in _PACKED}
    if isinstance(raw.get("question_id"), str):
        row.setdefault("task_id", raw["question_id"])
    return {
        **row,
        "question": _with_starter(raw["question_content"], raw),
        "answer": name or raw.get("question_id") or raw.get("question_title"),
        "tests": tests,
        **({"entry_point": name} if name else {}),
    }


def _of_apps(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs and outputs as tests, and the first solution as the answer."""
    tests = _object(raw, "input_output")
    if not tests.get("inputs"):
        raise ValueError("'input_output' has no inputs, so a solution cannot be tested")
    solutions = raw.get("solutions")
    if isinstance(solutions, str) and solutions.strip():
        solutions = _json(solutions, "solutions")
    first = solutions[0] if isinstance(solutions, list) and solutions else None
    row = {key: value for key, value in raw.items() if key not in ("input_output", "solutions")}
    return {
        **row,
        "question": _with_starter(raw["question"], raw),
        "answer": first or tests.get("fn_name") or "a program",
        "tests": tests,
    }


def _with_starter(question: Any, raw: Mapping[str, Any]) -> Any:
    starter = raw.get("starter_code")
    if not isinstance(question, str) or not isinstance(starter, str) or not starter.strip():
        return question
    return f"{question.strip()}\n\nBegin with this code:\n\n{starter.rstrip()}"


def _object(raw: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """Return a column that holds an object or its JSON text; empty if there is none."""
    value = raw.get(column)
    if isinstance(value, str):
        value = _json(value, column) if value.strip() else None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{column!r} must be an object, not {value!r:.100}")
    return value


def _json(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{column!r} is not JSON ({error}): {text[:60]!r}") from None

"""Rows of HumanEval and MBPP as coding tasks: a question, the function's name, and its tests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_CALLED = re.compile(r"[^\W\d]\w*(?=\s*\()")
_DEFINED = re.compile(r"^def\s+([^\W\d]\w*)", re.MULTILINE)


def as_coding_task(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row with `question`, `answer`, `entry_point` and `tests` if it has a known form.

    The forms are that of HumanEval (`prompt`, `entry_point`, `test`) and those of MBPP (`prompt` or
    `text`, `code`, `test_list`). Any other row is returned as it is.
    """
    if "question" in raw:
        return raw
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

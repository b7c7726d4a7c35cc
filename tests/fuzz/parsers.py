"""Adversarial texts for all code that reads what a model wrote.

`python -m tests.fuzz.parsers --texts 100000` is the long run; a test makes a short one. hypothesis
writes the texts: grammars of fences, calls, boxes and tags, cut anywhere, doubled and nested, with
CRLF and lone surrogates; some with one of their pieces repeated up to a megabyte.

For each text: nothing raises, nothing takes long, and nothing scores without an answer.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.envs.test_tool_env import TASKS, Quiz
from tir_alp.envs.parsing import boxed_answer, parse_action
from tir_alp.envs.reasoning_gym_env import _tagged, is_program
from tir_alp.rollouts.formats import (
    FORMS,
    HERMES,
    TOLD,
    CallForm,
    ParameterTypes,
    canonical,
    read_calls,
    watcher,
)
from tir_alp.rollouts.formats.readers import JsonReader
from tir_alp.tools.boxed import extract_boxed
from tir_alp.tools.calculator import evaluate
from tir_alp.tools.calls import (
    CALL_FORMATS,
    BadCall,
    find_call,
    find_calls,
    has_call,
    read_call,
)

SLOWEST_S = 20.0
"""No parse may take longer, even on a busy machine; a quadratic one takes minutes."""

_PIECES = (
    *("```", "```py\n", "```python\n", "```python\r\n", "```solution\n", "`", "``", "\n", "\r\n"),
    *(
        "\\boxed{7}",
        "\\boxed{",
        "\\boxed {",
        "\\fbox{",
        "{",
        "}",
        "\\{",
        "\\}",
        "\\\\",
        "\\",
        "$",
        " ",
        "x",
        "7",
    ),
    *("<tool_call>", "</tool_call>", "<tool_call", "</tool", "[TOOL_CALLS]", "<answer>"),
    *(
        "</answer>",
        '{"name": "python", "arguments": {"code": "print(1)"}}',
        '{"name": 1}',
        '<tool_call>{"name": 1}</tool_call>',
        '<tool_call>{"name": "python", "arguments": {"code": "print(1)"}}</tool_call>',
        "[",
        "]",
    ),
    *(
        '"',
        "'",
        ":",
        ",",
        "null",
        "NaN",
        "1e999",
        '"\\ud800"',
        "\ud800",
        "\udfff",
        "\x00",
        "π",
        "💡",
    ),
    *("(", ")", "**", "/", "-", "__import__('os')", "#", "<think>", "</think>", "<|im_end|>"),
)
_BOXED_SEVEN = re.compile(r"\\boxed\s*\{\s*7\s*\}")
"""An answer that scores, described without the parsers: no text may score without a match."""

ALL_FORMS = (
    HERMES,
    *FORMS,
    *(form for _, form in TOLD),
    CallForm("json", "[TOOL_CALLS]", "", JsonReader(in_list=True)),
    CallForm("json", "", "", JsonReader(arguments_key="parameters"), starts="{"),
)
_MARKS = sorted({mark for form in ALL_FORMS for mark in form.all_marks})
TYPES = ParameterTypes.of(
    [
        {
            "name": "python",
            "parameters": {"properties": {"code": {"type": "string"}, "n": {"type": "integer"}}},
        }
    ]
)
_LONG = 1000  # characters; a longer text is fed in pieces of as many
_INNER = (
    *("python", "functions.python:0", '{"code": "1"}', "<function=python>", "<parameter=code>"),
    *("</parameter>", "</function>", "<arg_key>code</arg_key>", "<arg_value>1</arg_value>"),
    *('python">', '<parameter name="code">1</parameter>', "[python(code='1')]", "<|start|>"),
    *('[{"name": "python", "arguments": {}}]', "function", "\npython\n", "commentary json"),
)
_texts = st.one_of(
    st.lists(st.sampled_from(_PIECES), max_size=40).map("".join),
    st.lists(st.sampled_from((*_PIECES, *_MARKS, *_INNER)), max_size=40).map("".join),
    st.text(max_size=60),
    st.tuples(
        st.lists(st.sampled_from(_PIECES), max_size=8).map("".join),
        st.text(max_size=20),
        st.lists(st.sampled_from(_PIECES), max_size=8).map("".join),
    ).map("".join),
)


def read(text: str, seen: Counter[str]) -> None:
    """Pass a text to every parser, and check what must hold."""
    for call_format in CALL_FORMATS:
        action = parse_action(text, call_format)
        seen[type(action).__name__] += 1
        call = find_call(text, call_format)
        # The end of a turn ends its last line; generation goes on until one of them is there.
        is_whole = call is not None and not _is_unfinished(call)
        assert has_call(text + "\n", call_format) == is_whole
        assert is_whole or not has_call(text, call_format)
        if call is not None:
            assert action == call
        else:
            answer = boxed_answer(text, call_format)
            assert (answer is None) == (action is None)
            assert answer is None or (re.search(r"\\boxed|\\fbox", text) and answer in text)
    extract_boxed(text)
    read_call(text)
    # A long text is read in a few forms, which differ from text to text.
    some = ALL_FORMS if len(text) < _LONG else ALL_FORMS[len(text) % 7 :: 7]
    for form in some:
        read_in_form(text, form)
    tagged = _tagged(text)
    assert tagged is None or ("<answer>" in text and tagged in text)
    is_program(text)
    try:
        evaluate(text)
    except (ValueError, ZeroDivisionError):
        seen["not arithmetic"] += 1


def read_in_form(text: str, form: CallForm) -> None:
    """Read a text in a form: the stop rule, whole or by pieces, and the environment agree."""
    action = canonical(text, form, TYPES)
    found = find_calls(action, "tool_call")
    calls = read_calls(text, form, TYPES)
    if form != HERMES:
        assert len(found) == len(calls)
        for read, seen in zip(calls, found, strict=True):
            assert isinstance(read.call, BadCall) == isinstance(seen, BadCall)
    for max_calls in (1, 2):
        stops = watcher(form, TYPES, max_calls)(text)
        watch = watcher(form, TYPES, max_calls)
        size = 1 if len(text) < _LONG else _LONG
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert any([watch(piece) for piece in pieces]) == stops
        # If generation stops for a call, the environment must see one, even a bad one.
        assert not stops or found


def _is_unfinished(call: object) -> bool:
    return isinstance(call, BadCall) and call.error.startswith("the call is not complete")


def play(text: str, seen: Counter[str]) -> None:
    """Play a text in an environment: it scores only with the right answer in a box."""
    for call_format in CALL_FORMATS:
        env = Quiz(tools=[], tasks=TASKS, max_turns=3, call_format=call_format)
        env.reset(options={"task": {"question": "q", "answer": "7"}})
        _, reward, terminated, truncated, info = env.step(text)
        assert not (terminated and truncated)
        right = info["answer"] is not None and info["answer"] == "7"
        assert reward == float(right)
        assert not right or _BOXED_SEVEN.search(text)
        seen["scored"] += right


def fuzz(num_texts: int, num_megabytes: int) -> Counter[str]:
    """Read generated texts, and count what was found in them.

    Args:
        num_texts: Number of short texts.
        num_megabytes: Number of texts of a megabyte.

    Raises:
        AssertionError: A property does not hold; hypothesis reports the text.
    """
    seen: Counter[str] = Counter()
    how: Any = {"deadline": None, "database": None, "derandomize": True}
    how |= {"suppress_health_check": list(HealthCheck)}
    how |= {"phases": (Phase.generate, Phase.shrink)}

    @settings(max_examples=num_texts, **how)
    @given(_texts)
    def short(text: str) -> None:
        seen["texts"] += 1
        read(text, seen)
        play(text, seen)

    @settings(max_examples=num_megabytes, **how)
    @given(st.lists(st.sampled_from(_PIECES), min_size=1, max_size=3).map("".join), _texts)
    def long(piece: str, text: str) -> None:
        seen["megabytes"] += 1
        began = time.monotonic()
        read(text + piece * (1_000_000 // len(piece)) + text, seen)
        assert time.monotonic() - began < SLOWEST_S * len(CALL_FORMATS)

    short()
    long()
    return seen


def main() -> int:
    """Run the fuzzer, and print how often each result was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--megabytes", type=int, default=100)
    options = parser.parse_args()
    began = time.monotonic()
    seen = fuzz(options.texts, options.megabytes)
    for name, count in seen.most_common():
        print(f"{count:10d} {name}")
    print(f"{time.monotonic() - began:.0f} s")
    return 0 if seen["texts"] >= options.texts else 1


if __name__ == "__main__":
    sys.exit(main())

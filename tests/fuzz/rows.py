"""Malformed rows for the reader of data sets: each has to be reported by file and line.

`python -m tests.fuzz.rows --rows 10000` is the long run; a test makes a short one. hypothesis
writes the rows: good rows that are cut short or have a required value of the wrong type, in
tir_alp's form and in verl's, and lines that are no rows at all.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tir_alp.config import DataConfig
from tir_alp.rollouts.data import left_out
from tir_alp.rollouts.data_files import open_rows

_words = st.text(min_size=1, max_size=20).filter(lambda text: text.strip())
_blank = st.sampled_from(["", " ", "\t\n", "\u2003"])
_scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
_things = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
_no_text = st.one_of(
    _blank,
    _things.filter(lambda thing: not isinstance(thing, str)),
    st.sampled_from(["\ud800", "half a pair \udfff"]),
)
_no_answer = st.one_of(
    _blank,
    st.sampled_from([None, True, False, float("nan"), float("inf"), "\udc00"]),
    st.lists(_things, max_size=2),
    st.dictionaries(st.text(max_size=5), _things, max_size=2),
)
_DROP = object()


def _row(question: Any, answer: Any) -> str:
    row = {"question": question, "answer": answer, "more": {"level": 3}}
    return json.dumps({key: value for key, value in row.items() if value is not _DROP})


def _verl(prompt: Any, reward_model: Any) -> str:
    return json.dumps({"data_source": "x", "prompt": prompt, "reward_model": reward_model})


def _message(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


_good_prompt = _words.map(lambda text: [_message("user", text)])
_bad_prompt = st.one_of(
    _things.filter(lambda thing: not (isinstance(thing, str) and thing.strip())),
    st.tuples(st.sampled_from(["assistant", "tool", "", None, 3]), _words).map(
        lambda each: [_message(*each)]
    ),
    _no_text.map(lambda content: [_message("user", content)]),
    _words.map(lambda text: [_message("user", text), _message("assistant", text)]),
)
_truths = _words.map(lambda truth: {"ground_truth": truth})
_lines = st.one_of(
    st.tuples(_words, _words, st.floats(0, 1, exclude_max=True)).map(
        lambda each: (text := _row(each[0], each[1]))[: 1 + int((len(text) - 1) * each[2])]
    ),
    st.builds(_row, st.one_of(_no_text, st.just(_DROP)), _words),
    st.builds(_row, _words, st.one_of(_no_answer, st.just(_DROP))),
    st.builds(_verl, _bad_prompt, _truths),
    st.builds(
        _verl,
        _good_prompt,
        st.one_of(_scalars, _no_answer.map(lambda truth: {"ground_truth": truth})),
    ),
    _things.filter(lambda thing: not isinstance(thing, dict)).map(json.dumps),
    st.sampled_from(["{" * 100_000, "[" * 100_000, '{"question": ' * 30_000, "9" * 5000, "nul"]),
).map(str.encode)
_bytes = st.binary(min_size=1, max_size=30).filter(
    lambda line: line.strip() and not set(b"\n") & set(line) and not line.lstrip().startswith(b"{")
)


def fuzz(num_rows: int, folder: Path) -> Counter[str]:
    """Read malformed rows; return how often each kind of complaint was made.

    Args:
        num_rows: Number of rows.
        folder: Folder for the file with the rows.

    Raises:
        AssertionError: A row was not reported, or a broken one was accepted.
    """
    lines: list[bytes] = []

    how: Any = {"deadline": None, "database": None, "derandomize": True}
    how |= {"suppress_health_check": list(HealthCheck), "phases": (Phase.generate,)}

    @settings(max_examples=num_rows, **how)
    @given(st.one_of(_lines, _bytes))
    def collect(line: bytes) -> None:
        lines.append(line)

    collect()
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b'\n{"question": "1+1?", "answer": 2}\n')
    config = DataConfig(source="jsonl", path=path, broken_rows="skip")
    sentences = left_out([config])
    locations = [sentence.split(": ")[0] for sentence in sentences]
    reported = set(locations)
    expected = [f"{path}:{number}" for number in range(1, len(lines) + 1)]
    for location, line in zip(expected, lines, strict=True):
        assert location in reported, f"not reported: {line[:200]!r}"
    assert locations == expected
    assert sum(len(tasks) for tasks in open_rows(config).splits.values()) == 1
    return Counter(re.split(r"[,(;:]", sentence.split(": ", 1)[1])[0] for sentence in sentences)


def main() -> int:
    """Run the fuzzer, and print how often each complaint was made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        seen = fuzz(options.rows, Path(folder))
    for name, count in seen.most_common():
        print(f"{count:10d} {name}")
    print(f"{sum(seen.values())} malformed rows, each reported, {time.monotonic() - began:.0f} s")
    return 0 if sum(seen.values()) >= options.rows else 1


if __name__ == "__main__":
    sys.exit(main())

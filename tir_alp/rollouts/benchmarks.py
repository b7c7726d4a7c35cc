"""Named benchmarks: where they are on the hub, and which columns hold question and answer.

`--data gsm8k` loads one by its id; `--data gsm8k=FILE` reads a copy of it in a file with the same
columns. Other words are sources that generate tasks, or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tir_alp.config import SOURCES

MATH_ENV = "tir_alp.envs:PythonMath-v0"
CODE_ENV = "tir_alp.envs:PythonCode-v0"

WITHOUT_TOOLS = MappingProxyType({MATH_ENV: "tir_alp.envs:SingleTurnMath-v0"})
"""Environments that ask the same tasks and grade them alike, but offer no tool."""

_MATH: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "dataset": "openai/gsm8k",
        "subset": "main",
        "split": "test",
        "answer_pattern": "gsm8k",
    },
    "math500": {
        "dataset": "HuggingFaceH4/MATH-500",
        "split": "test",
        "question_column": "problem",
    },
    "aime24": {
        "dataset": "HuggingFaceH4/aime_2024",
        "split": "train",
        "question_column": "problem",
    },
    "aime25": {"dataset": "math-ai/aime25", "split": "test", "question_column": "problem"},
    "amc23": {"dataset": "math-ai/amc23", "split": "test"},
    "minerva": {"dataset": "math-ai/minervamath", "split": "test"},
    "olympiadbench": {
        "dataset": "math-ai/olympiadbench",
        "split": "test",
        "answer_column": "final_answer",
    },
}
_CODE: dict[str, dict[str, Any]] = {
    # Some of their tests draw random arguments or measure the interpreter, and are not read.
    "humaneval": {
        "dataset": "openai/openai_humaneval",
        "split": "test",
        "broken_rows": "skip",
    },
    "mbpp": {
        "dataset": "google-research-datasets/mbpp",
        "subset": "sanitized",
        "split": "test",
        "broken_rows": "skip",
    },
}
BENCHMARKS: Mapping[str, Mapping[str, Any]] = MappingProxyType(_MATH | _CODE)
"""Settings of each benchmark, as in `SourceConfig`."""

OF_FILES = (
    *("question_column", "answer_column", "answer_pattern", "broken_rows"),
    *("min_question_chars", "max_question_chars"),
)
"""Settings of `data` that say how a file is read; on a command line they hold for its files."""

_BY_SUFFIX = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet"}


def source_of(word: str) -> dict[str, Any]:
    """Return the settings of an `EvalSource` that a word of the command line stands for.

    Args:
        word: Name of a benchmark; `NAME=FILE`, a copy of one; a source that generates tasks, with
            `reasoning_gym:DATASET` for one of its data sets; or a file.

    Raises:
        ValueError: It is none of these.
    """
    name, _, file = word.partition("=")
    if name in BENCHMARKS:
        settings = dict(BENCHMARKS[name])
        if not file:
            return {"name": name, "source": "hub", **settings}
        kept = ("_column", "_pattern", "_rows")
        columns = {key: settings[key] for key in settings if key.endswith(kept)}
        return {"name": name, "source": _kind(Path(file)), "path": file, **columns}
    source, _, dataset = word.partition(":")
    if source == "reasoning_gym" and dataset:
        return {"name": dataset, "source": source, "dataset": dataset}
    if word in SOURCES:
        return {"name": word, "source": word}
    if Path(word.removesuffix(".gz")).suffix in _BY_SUFFIX or Path(word).is_file():
        return {"source": _kind(Path(word)), "path": word}
    raise ValueError(
        f"--data {word}: there is no such benchmark, source or file; benchmarks are "
        f"{', '.join(BENCHMARKS)}; sources are {', '.join(SOURCES)}"
    )


def environment_of(words: list[str]) -> str | None:
    """Return the environment in which named benchmarks are played; None if none is named.

    Raises:
        ValueError: They are played in different ones.
    """
    names = [word.partition("=")[0] for word in words]
    found = {CODE_ENV if name in _CODE else MATH_ENV for name in names if name in BENCHMARKS}
    if len(found) > 1:
        raise ValueError(
            f"{', '.join(names)} are not played in the same environment: evaluate mathematics and "
            "programs one after the other"
        )
    return next(iter(found), None)


def _kind(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return _BY_SUFFIX.get(Path(name).suffix, "jsonl")

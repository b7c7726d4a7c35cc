"""Keeps two habits out of the text: "a X a Y" for "one X per Y", and "behind" for "after"."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNITS = [
    "answer",
    "backend",
    "batch",
    "call",
    "completion",
    "container",
    "core",
    "day",
    "draw",
    "engine",
    "environment",
    "episode",
    "file",
    "GPU",
    "group",
    "host",
    "hour",
    "idea",
    "interpreter",
    "key",
    "kind",
    "layer",
    "line",
    "message",
    "method",
    "micro-batch",
    "minute",
    "model",
    "module",
    "node",
    "package",
    "process",
    "program",
    "prompt",
    "question",
    "rank",
    "request",
    "row",
    "run",
    "runner",
    "second",
    "seed",
    "sequence",
    "server",
    "session",
    "side",
    "step",
    "task",
    "test",
    "token",
    "tool",
    "trajectory",
    "trial",
    "turn",
    "update",
    "word",
    "worker",
]
COUNTED = [
    "%",
    "byte",
    "bytes",
    "calls",
    "column",
    "columns",
    "completions",
    "container",
    "core",
    "cores",
    "digest",
    "entry",
    "episodes",
    "file",
    "files",
    "folder",
    "function",
    "GB",
    "GPU",
    "GPUs",
    "groups",
    "line",
    "lines",
    "MB",
    "ms",
    "nat",
    "nats",
    "numbers",
    "one",
    "page",
    "process",
    "processes",
    "requests",
    "row",
    "rows",
    "runs",
    "scale",
    "seconds",
    "second",
    "sentence",
    "steps",
    "tasks",
    "test",
    "thread",
    "threads",
    "times",
    "token",
    "tokens",
    "TOML",
    "trajectories",
    "word",
]
PER = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, COUNTED))}) an? ({'|'.join(UNITS)})\b")
BEHIND = re.compile(r"\bbehind\b")


def texts() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.toml", "*.sh", "*.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [ROOT / name for name in listed.stdout.splitlines()]
    return [file for file in files if file.is_file() and file != Path(__file__)]


def found(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in texts()
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if pattern.search(line)
    ]


@pytest.mark.parametrize("sentence", ["a row a sequence", "0.1 nats a token", "one task a group"])
def test_the_first_habit_is_recognised(sentence):
    assert PER.search(sentence)


def test_one_x_per_y():
    assert found(PER) == []


def test_after_and_not_behind():
    places = ("behind a proxy", "behind namespaces")  # of place, not of time
    lines = [line for line in found(BEHIND) if not any(place in line for place in places)]
    lines = [line for line in lines if not line.startswith("CONTRIBUTING.md")]
    assert lines == []


def test_markdown_is_wrapped():
    long = []
    for file in texts():
        if file.suffix != ".md":
            continue
        is_code = False
        for number, line in enumerate(file.read_text().splitlines(), 1):
            is_code ^= line.lstrip().startswith("```")
            if len(line) > 100 and not is_code and not line.lstrip().startswith(("|", "```")):
                long.append(f"{file.relative_to(ROOT)}:{number}")
    assert long == []

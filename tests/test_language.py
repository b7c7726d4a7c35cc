"""Keeps two habits out of the text: "a X a Y" for "one X per Y", and "behind" for "after"."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNITS = (
    r"answer|backend|batch|call|completion|container|core|day|draw|engine|environment"
    r"|episode|file|GPU|group|host|hour|idea|interpreter|key|kind|layer|line|message"
    r"|method|micro\-batch|minute|model|module|node|package|process|program|prompt"
    r"|question|rank|request|row|run|runner|second|seed|sequence|server|session|side|step"
    r"|task|test|token|tool|trajectory|trial|turn|update|word|worker"
)
COUNTED = (
    r"%|byte|bytes|calls|column|columns|completions|container|core|cores|digest|entry"
    r"|episodes|file|files|folder|function|GB|GPU|GPUs|groups|line|lines|MB|ms|nat|nats"
    r"|numbers|one|page|process|processes|requests|row|rows|scale|seconds|second"
    r"|sentence|steps|task|tasks|test|thread|threads|times|token|tokens|TOML|trajectories"
    r"|word"
)
PER = re.compile(rf"(?<![\w-])({COUNTED}) an? ({UNITS})\b", re.IGNORECASE)
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
    idioms = ("behind a proxy", "behind namespaces", "behind the scenes", 'not "behind"')
    idioms += ("leaves behind", "leaves nothing behind")
    assert [line for line in found(BEHIND) if not any(each in line for each in idioms)] == []


def test_markdown_is_wrapped():
    long = []
    for file in texts():
        if file.suffix != ".md":
            continue
        is_code = False
        for number, line in enumerate(file.read_text().splitlines(), 1):
            is_code ^= line.lstrip().startswith("```")
            is_text = not is_code and not line.startswith(("|", "```", "    "))
            if len(line) > 100 and is_text:
                long.append(f"{file.relative_to(ROOT)}:{number}")
    assert long == []

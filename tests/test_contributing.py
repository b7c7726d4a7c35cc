"""CONTRIBUTING.md against the tree: the files that it sends a reader to hold what it says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
ANSWERS = {
    "the ratio": "RATIO_LEVELS",
    "the stop rule": "def stop_matcher",
    "the reward": "def step",
    "the order of tasks": "class TaskOrder",
    "the weight sync": "run.engine.load_weights",
}


@pytest.mark.parametrize("wish", ANSWERS)
def test_the_first_file_to_open_holds_the_answer(wish):
    (row,) = [line for line in TEXT.splitlines() if line.startswith(f"| {wish} |")]
    file = re.findall(r"`([\w/]+\.py)`", row)[0]
    assert ANSWERS[wish] in (ROOT / file).read_text()


def test_every_file_that_is_named_exists():
    named = re.findall(r"`((?:tir_alp|envs|tools|tests|docs)/[\w/]+\.\w+)`", TEXT)
    missing = [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    assert len(named) > 8 and missing == []


def test_files_and_functions_stay_short():
    import ast

    folders = ("tir_alp", "envs", "tools", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    files = [file for file in files if not any(each.is_symlink() for each in file.parents)]
    long = [f for f in files if len(f.read_text().splitlines()) > 500 and f.name != "config.py"]
    assert long == []
    functions = [
        (str(file.relative_to(ROOT)), node.name)
        for file in files
        if "tests" not in file.parts
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= 80
    ]
    assert functions == []

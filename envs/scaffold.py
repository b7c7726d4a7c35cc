"""The package that `python -m tir_alp.envs new NAME` writes: one environment and its tests.

The package lies in `src/`. `python -m` puts the working folder first on the path; a package that
lay in a folder of its own name would be shadowed there by that folder, as a namespace package.
"""

from __future__ import annotations

import re
from pathlib import Path

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "0.1.0"
dependencies = ["tir_alp"]

[tool.setuptools.packages.find]
where = ["src"]
"""

_INIT = """\
import gymnasium

gymnasium.register(id="{title}-v0", entry_point="{name}.env:{title}Env")
"""

_ENV = '''\
"""How often does a letter occur in a word? Change the tasks, the instruction and the grading."""

import random

from tir_alp.envs.grading import Grade
from tir_alp.envs.tool_env import ToolEnv
from tir_alp.tools.python_tool import PythonTool


class Tasks:
    def __len__(self):
        return 100_000

    def __getitem__(self, index):
        rng = random.Random(index)
        word = "".join(rng.choices("aeinrst", k=8))
        letter = rng.choice(word)
        question = f"How often does {{letter}} occur in {{word}}?"
        return {{"task_id": str(index), "question": question, "answer": str(word.count(letter))}}


class {title}Env(ToolEnv):
    instruction = "You may run code in a ```python block. Write the answer in \\\\boxed{{}}."

    def __init__(self, *, sandbox=None, **settings):
        super().__init__(tools=[PythonTool(sandbox)], tasks=Tasks(), **settings)

    def grade(self, task, answer):
        return Grade(correct=answer == task["answer"])
'''

_TEST = """\
import gymnasium
from tir_alp.envs.check import check

ID = "{name}:{title}-v0"


def test_the_checks_find_nothing():
    assert [finding for finding in check(ID, range(4)) if not finding.is_note] == []


def test_an_episode_with_the_tool():
    env = gymnasium.make(ID)
    env.reset(options={{"task": {{"question": "a in banana?", "answer": "3"}}}})
    assert env.step("```python\\nprint('banana'.count('a'))\\n```")[0] == "3"
    assert env.step("\\\\boxed{{3}}")[1:3] == (1.0, True)
    env.close()
"""


def write_package(name: str, into: Path) -> tuple[Path, str]:
    """Write a package.

    Args:
        name: Name of the package, and of the folder that is made for it.
        into: Folder in which that folder is made.

    Returns:
        The folder, and the id of the environment as `--env.id` takes it.

    Raises:
        ValueError: The name is not a package name, or the folder exists already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"{name!r} is not a package name: use lower-case letters, digits and underscores"
        )
    folder = into / name
    title = "".join(part.capitalize() for part in name.split("_"))
    files = {
        "pyproject.toml": _PYPROJECT,
        f"src/{name}/__init__.py": _INIT,
        f"src/{name}/env.py": _ENV,
        "tests/test_env.py": _TEST,
    }
    if folder.exists():
        raise ValueError(f"{folder} exists already: use another name, or --into")
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text.format(name=name, title=title))
    return folder, f"{name}:{title}-v0"

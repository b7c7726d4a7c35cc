"""The two commands for authors, as a shell runs them."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest

from tests.envs.test_tool_env import Quiz
from tir_alp.envs.__main__ import main
from tir_alp.envs.check import check
from tir_alp.envs.grading import Grade

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs/examples/letter_count"


def test_a_new_package_has_tests_that_pass_and_is_the_example_of_the_docs(tmp_path, capsys):
    assert main(["new", "letter_count", "--into", str(tmp_path)]) == 0
    assert "--env.id letter_count:LetterCount-v0 --data.source env" in capsys.readouterr().out
    folder = tmp_path / "letter_count"
    for file in ("pyproject.toml", "letter_count/__init__.py", "letter_count/env.py"):
        assert (folder / file).read_text() == (EXAMPLE / file).read_text()
    path = os.pathsep.join([str(ROOT), str(folder)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_the_docs_show_the_example_and_it_is_short():
    code = (EXAMPLE / "letter_count/env.py").read_text()
    assert f"```python\n{code}```" in (ROOT / "docs/environments.md").read_text()
    assert len(code.splitlines()) <= 40


@pytest.mark.parametrize("name", ["Letter", "a-b", "", "../x"])
def test_a_name_that_is_none_is_refused(tmp_path, capsys, name):
    assert main(["new", name, "--into", str(tmp_path)]) == 2
    assert "is no name of a package" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert main(["new", "mine", "--into", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["PythonMath", "SingleTurnMath", "MultiTool", "PythonCode"])
def test_ours_pass(name, capsys):
    assert main(["check", f"tir_alp.envs:{name}-v0", "--seeds", "2"]) == 0
    assert capsys.readouterr().out == "all checks passed\n"


def test_an_environment_that_is_not_there(capsys):
    assert main(["check", "no_such_package:Env-v0"]) == 2
    assert "cannot make the environment 'no_such_package:Env-v0'" in capsys.readouterr().err


TASKS = [{"question": f"q{number}", "answer": str(number)} for number in range(50)]


class Fair(Quiz):
    def __init__(self):
        super().__init__(tools=[], tasks=TASKS, max_turns=3)


class Generous(Fair):
    def grade(self, task, answer):
        return Grade(correct=True)


class Stingy(Fair):
    def grade(self, task, answer):
        return Grade(correct=False)


class Forgetful(Fair):
    count = 0

    def prompt(self, task):
        Forgetful.count += 1
        return f"{Forgetful.count}"


class Fragile(Fair):
    def step(self, action):
        action.encode()
        return super().step(action)


class Undecided(Fair):
    def step(self, action):
        observation, reward, _, _, info = super().step(action)
        return observation, reward, True, True, info


@pytest.mark.parametrize(
    ("kind", "rules"),
    [
        (Fair, set()),
        (Generous, {"wrong_action"}),
        (Stingy, {"gold_action"}),
        (Forgetful, {"seed", "gymnasium"}),
        (Fragile, {"text"}),
        (Undecided, {"end", "gymnasium"}),
    ],
)
def test_each_fault_is_found_by_its_rule(kind, rules):
    name = f"Check{kind.__name__}-v0"
    gymnasium.register(id=name, entry_point=kind)
    try:
        assert {finding.rule for finding in check(name, range(3)) if not finding.is_note} == rules
    finally:
        del gymnasium.registry[name]


def test_an_environment_of_another_kind_is_checked_as_far_as_it_goes():
    class Plain(gymnasium.Env):
        observation_space = action_space = Fair().action_space

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return "hello", {}

        def step(self, action):
            return "", 0.0, True, False, {}

    gymnasium.register(id="Plain-v0", entry_point=lambda: Plain())  # type: ignore[arg-type]
    try:
        findings = check("Plain-v0", range(2))
    finally:
        del gymnasium.registry["Plain-v0"]
    assert {(each.rule, each.is_note) for each in findings} == {
        ("seed", True),
        ("gold_action", True),
        ("wrong_action", True),
    }

"""The commands and the documented examples for authors of environments."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest

from tests.envs.test_tool_env import Quiz
from tir_alp.config import Config
from tir_alp.envs.__main__ import main
from tir_alp.envs.check import check
from tir_alp.envs.grading import Grade
from tir_alp.rollouts.environment import make_environment

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs/examples/letter_count"


def run(*command, cwd, path=()):
    """Run a command with third-party packages, and tir_alp itself, lent by this interpreter."""
    lent = [*map(str, path), str(ROOT), *(each for each in sys.path if "site-packages" in each)]
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(lent)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_new_package_is_the_example_of_the_docs_and_works_where_it_was_written(tmp_path):
    """Every command that `new` prints, from the folder that contains the package's folder."""
    python = tmp_path / "venv/bin/python"
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    printed = run(python, "-m", "tir_alp.envs", "new", "letter_count", cwd=work)
    assert "--env.id letter_count:LetterCount-v0 --data.source env" in printed
    for file in ("pyproject.toml", "src/letter_count/__init__.py", "src/letter_count/env.py"):
        assert (work / "letter_count" / file).read_text() == (EXAMPLE / file).read_text()
    how = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    run(python, "-m", "pip", "install", *how, "-e", "letter_count", cwd=work)
    pytest_options = ("-q", "-p", "no:cacheprovider")
    printed = run(python, "-m", "pytest", *pytest_options, "letter_count", cwd=work)
    assert "2 passed" in printed
    check_it = ("-m", "tir_alp.envs", "check", "letter_count:LetterCount-v0")
    assert run(python, *check_it, cwd=work) == "all checks passed\n"


@pytest.mark.parametrize(("file", "name"), [("my_env", "Mine"), ("shop_env", "Shop")])
def test_an_environment_in_one_file_needs_no_package(tmp_path, file, name):
    shutil.copy(ROOT / f"docs/examples/{file}.py", tmp_path)
    check_it = (sys.executable, "-m", "tir_alp.envs", "check", f"{file}:{name}-v0")
    assert run(*check_it, cwd=tmp_path) == "all checks passed\n"


@pytest.mark.parametrize(
    ("id", "said"),
    [
        ("Mine-v0", "Name the module that registers it, as my_module:Mine-v0"),
        ("a_folder_only:Mine-v0", "was found as a folder without code: install the package"),
        ("a_file:Mine-v0", "a_file.py, which should register it"),
    ],
)
def test_an_unknown_id_says_what_is_missing(id, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "a_folder_only").mkdir()
    (tmp_path / "a_file.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["check", id]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(ValueError) as caught:
        make_environment(Config.model_validate({"env": {"id": id}}))
    assert said in str(caught.value)


def test_a_tool_of_ones_own_is_a_class(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs/examples")
    env = gymnasium.make("shop_env:Shop-v0", tools_in_prompt=True)
    try:
        task = {"question": "What do 3 times fig cost?", "answer": "36"}
        prompt, _ = env.reset(options={"task": task})
        assert '"name": "price"' in prompt
        call = '<tool_call>{"name": "price", "arguments": {"fruit": "fig"}}</tool_call>'
        price, _, terminated, _, info = env.step(call)
        assert (price, info["outcome"], terminated) == ("12", "ok", False)
        refused = env.step(call.replace("fruit", "fish"))
        assert refused[0].startswith("Error: ") and refused[-1]["outcome"] == "tool_error"
        assert env.step(r"\boxed{36}")[1:3] == (1.0, True)
    finally:
        env.close()
        del gymnasium.registry["Shop-v0"]
        del sys.modules["shop_env"]  # so that the next import registers it again


@pytest.mark.parametrize(
    "file", ["my_env.py", "shop_env.py", "letter_count/src/letter_count/env.py"]
)
def test_the_docs_show_the_examples_and_they_are_short(file):
    code = (ROOT / "docs/examples" / file).read_text()
    assert f"```python\n{code}```" in (ROOT / "docs/environments.md").read_text()
    assert len(code.splitlines()) <= 60


@pytest.mark.parametrize("name", ["Letter", "a-b", "", "../x"])
def test_a_bad_package_name_is_refused(tmp_path, capsys, name):
    assert main(["new", name, "--into", str(tmp_path)]) == 2
    assert "is not a package name" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert main(["new", "mine", "--into", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["PythonMath", "SingleTurnMath", "MultiTool", "PythonCode"])
def test_the_shipped_environments_pass(name, capsys):
    assert main(["check", f"tir_alp.envs:{name}-v0", "--seeds", "2"]) == 0
    assert capsys.readouterr().out == "all checks passed\n"


def test_an_unknown_environment_is_reported(capsys):
    assert main(["check", "no_such_package:Env-v0"]) == 2
    assert "cannot make the environment 'no_such_package:Env-v0'" in capsys.readouterr().err


def test_settings_of_the_environment_are_those_of_a_config(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "docs/examples")
    agent = ["check", "tir_alp.envs:Agent-v0", "--seeds", "2"]
    assert main([*agent, "--env.kwargs.function", "my_agent:solve"]) == 0
    assert capsys.readouterr().out == "all checks passed\n"
    nested = ["--env.kwargs.sandbox.limits.wall_s=5", '--env.kwargs={"max_turns": 2}']
    assert main([*nested, "check", "tir_alp.envs:PythonMath-v0", "--seeds", "1"]) == 0


def test_an_agent_is_checked_with_its_verifier(monkeypatch, tmp_path, capsys):
    (tmp_path / "my_verifier.py").write_text("def verify(task, report):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--env.kwargs.command", "python agent.py", "--env.kwargs.verifier"]
    assert main(["check", "tir_alp.envs:Agent-v0", *words, "my_verifier:verify"]) == 1
    printed = capsys.readouterr().out
    assert (
        "gold_action: not checked" in printed and "no_answer: 'I do not know.' earns 1" in printed
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--env.kwargs.funktion", "a:b"],
            "env.kwargs.funktion: there is no such setting",
        ),
        (
            ["--env.kwargs.command", "x", "--env.kwargs.timeout_s", "soon"],
            "env.kwargs.timeout_s: it must be of type float",
        ),
        (["--env.kwargs.function"], "--env.kwargs.function needs a value"),
        (["--env.kwargs", "3"], "--env.kwargs is '3'; it must be an object"),
        ([], "env.kwargs needs one of command and function"),
    ],
)
def test_a_wrong_setting_is_named(words, said, capsys):
    assert main(["check", "tir_alp.envs:Agent-v0", *words]) == 2
    assert said in capsys.readouterr().err


def test_only_a_check_takes_settings_of_an_environment(tmp_path, capsys):
    assert main(["new", "mine", "--into", str(tmp_path), "--env.kwargs.tools", "[]"]) == 2
    assert "new takes no --env.kwargs" in capsys.readouterr().err and not [*tmp_path.iterdir()]


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


class Wordy(Fair):
    def grade(self, task, answer):
        return Grade(correct=True, score="high")  # pyright: ignore[reportArgumentType]


class Immeasurable(Fair):
    def grade(self, task, answer):
        return Grade(correct=True, score=float("nan"))


class Praising(Fair):
    def step(self, action):
        return "", "well done", True, False, {}


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
        (Wordy, {"gold_action", "wrong_action"}),
        (Immeasurable, {"gold_action", "wrong_action"}),
        (Praising, {"reward", "gold_action", "wrong_action", "gymnasium"}),
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


def test_an_environment_without_the_base_class_is_checked_as_far_as_possible():
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

"""Demonstrations are episodes that were played, and their programs solve their tasks."""

import gymnasium
import pytest

from tir_alp.envs.__main__ import main
from tir_alp.envs.demonstrations import PROGRAMS, Style, demonstrations, tasks_of
from tir_alp.envs.word_problems import WordProblems
from tir_alp.tools.held_out import is_held_out


@pytest.fixture
def env():
    env = gymnasium.make("tir_alp.envs:PythonMath-v0", instruction="")
    yield env
    env.close()


@pytest.mark.sandbox
@pytest.mark.parametrize("kind", PROGRAMS)
def test_the_program_of_each_kind_solves_its_tasks(env, kind):
    if kind not in ("arithmetic", "word_problems"):
        pytest.importorskip("reasoning_gym")
    for row in demonstrations(env, [kind], 6, seed=3, style=Style(mistakes=0.0)):
        roles = [each["role"] for each in row["messages"]]
        assert roles == ["user", "assistant", "tool", "assistant"]


@pytest.mark.sandbox
def test_a_mistake_is_shown_with_its_real_error_and_only_the_repair_is_learnt(env):
    rows = list(demonstrations(env, ["gcd", "arithmetic"], 12, 0, Style(mistakes=1.0)))
    for row in rows:
        wrong, error, right, output, _ = row["messages"][1:]
        assert (wrong["weight"], right["weight"]) == (0, 1)
        assert "Error" in error["content"] and "Error" not in output["content"]
        assert wrong["content"] != right["content"]


@pytest.mark.sandbox
def test_demonstrations_follow_from_their_seed_and_guesses_call_no_tool(env):
    first, again, other = (
        list(demonstrations(env, ["arithmetic"], 4, seed, Style())) for seed in (1, 1, 2)
    )
    assert first == again != other
    (guess,) = demonstrations(env, ["arithmetic"], 1, 0, Style(guesses=1.0))
    assert [each["role"] for each in guess["messages"]] == ["user", "assistant"]


@pytest.mark.sandbox
def test_the_command_writes_a_file(tmp_path, capsys):
    out = tmp_path / "t.jsonl"
    words = ["demonstrate", "--out", str(out), "--number", "3", "--kinds", "arithmetic"]
    assert main(words) == 0
    assert len(out.read_text().splitlines()) == 3 and "tir_alp.sft" in capsys.readouterr().out
    assert main([*words[:-1], "magic"]) == 2
    assert "there is no demonstration of 'magic'" in capsys.readouterr().err


def test_word_problems_are_split_and_their_answers_are_what_python_computes():
    for split in ("train", "held_out"):
        tasks = WordProblems(seed=0, size=40, split=split)
        for task in tasks:
            assert is_held_out(task["question"]) == (split == "held_out")
            assert str(eval(task["expression"])) == task["answer"]
    with pytest.raises(ValueError, match="no demonstration of 'x'"):
        tasks_of("x", 0, 1)


@pytest.mark.sandbox
def test_a_task_that_nothing_can_solve_is_not_demonstrated(env):
    pytest.importorskip("reasoning_gym")
    task = tasks_of("simple_equations", 0, 14)[13]
    assert "0 = 0" in task["question"] and PROGRAMS["simple_equations"](task) is None
    rows = list(demonstrations(env, ["simple_equations"], 14, 0, Style(mistakes=0.0)))
    assert len(rows) == 14 and task["task_id"] not in [row["task_id"] for row in rows]

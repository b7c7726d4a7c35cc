"""The study of eleven kinds of tasks: what its stages make of each other, and its rows."""

import json
import tomllib
from pathlib import Path

from tir_alp.envs.demonstrations import PROGRAMS
from tir_alp.run.command_line import parse_config
from tir_alp.studies.mixture import RL_CONFIG, Evaluated, Size, chain, row_of, table


def test_both_methods_begin_with_the_model_that_was_taught_the_same_kinds():
    found = [stage.words for stage, _ in chain(Path("runs/x"), 1, Size(sft_steps=5))]
    (demonstrate,) = (words for words in found if words[0] == "envs")
    kinds = demonstrate[demonstrate.index("--kinds") + 1].split(",")
    mix = tomllib.loads(RL_CONFIG.read_text())["data"]["mix"]
    assert kinds == [each.get("dataset", each["source"]) for each in mix]
    assert len(set(kinds)) >= 9 and set(kinds) <= set(PROGRAMS)
    trained = [words for words in found if words[0] == "train"]
    taught = "runs/x/seed1/sft/checkpoints/step_5"
    for method, words in zip(("alp_sequence", "bypass_sequence"), trained, strict=True):
        options = dict(zip(words[1::2], words[2::2], strict=True))
        assert (options["--algorithm"], options["--model.path"]) == (method, taught)


def test_every_evaluation_plays_the_same_tasks_with_the_same_draws():
    words = [
        list(stage.words)
        for seed in (0, 1)
        for stage, evaluated in chain(Path("runs/x"), seed, Size())
        if evaluated is not None
    ]
    for each in words:
        for option in ("--model", "--out", "--env.kwargs.instruction"):
            if option in each:
                del each[(at := each.index(option)) : at + 2]
    assert {tuple(each) for each in words} == {tuple(words[0]), (*words[0], "--without-tools")}


def test_rows_count_each_kind(tmp_path):
    tasks = {"word_problems/held_out/0/0": [True], "reasoning_gym/gcd/0/3": [False, True]}
    means = {name: {"mean": 1.0} for name in ("turns", "tool_calls", "tool_errors")}
    found = {
        "avg@k": {"mean": 0.75, "low": 0.5, "high": 1.0, "num_tasks": 2},
        "failed_episodes": 0,
        "per_task": [{"task_id": name, "correct": correct} for name, correct in tasks.items()],
        **means,
    }
    (tmp_path / "evaluation.json").write_text(json.dumps({"sets": {"held_out": found}}))
    row = row_of(Evaluated(3, "sft", True, tmp_path))
    assert row["kinds"] == {"gcd": "1/2", "word_problems": "1/1"} and row["mean"] == 0.75
    assert "| 3 |  |  | 75.0% [50.0%, 100.0%] |  |  |  |" in table([row])


def test_the_config_is_one_of_a_run():
    assert len(parse_config(tomllib.loads(RL_CONFIG.read_text())).data.sources) == 11

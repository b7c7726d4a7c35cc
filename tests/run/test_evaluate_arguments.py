"""What the command line of `tir_alp.evaluate` means, without playing anything."""

import json

import pytest

from tir_alp.config import Config, SFTConfig
from tir_alp.evaluate import read_arguments
from tir_alp.run.command_line import Words
from tir_alp.run.model_choice import settings_of


def test_columns_on_the_command_line_are_those_of_its_files():
    data = {"question_column": "problem", "answer_column": "solution"}
    words = Words({"model": "tiny", "data": "a.csv.gz,arithmetic,b.jsonl"}, {"data": data})
    config, _, out = read_arguments(words)
    a, arithmetic, b = config.eval.data
    assert (a.source, a.question_column, b.answer_column) == ("csv", "problem", "solution")
    assert arithmetic.question_column == config.data.question_column == "question"
    assert str(out) == "evaluations/tiny/a-arithmetic-b-k1"


def test_a_column_of_a_benchmark_in_a_file_can_be_another_one():
    words = Words(
        {"model": "tiny", "data": "math500=my.jsonl"}, {"data": {"question_column": "text"}}
    )
    (source,) = read_arguments(words)[0].eval.data
    assert (source.question_column, str(source.path)) == ("text", "my.jsonl")


def test_a_model_that_a_run_is_compared_with_plays_with_the_settings_of_the_run(tmp_path):
    config = Config.model_validate(
        {"env": {"kwargs": {"max_turns": 2}}, "rollout": {"temperature": 0.5}}
    )
    (tmp_path / "config.json").write_text(config.model_dump_json())
    words = Words({"model": "tiny"}, {"eval": {"num_tasks": 3}})
    compared, model, _ = read_arguments(words, settings_of(tmp_path))
    assert compared.env.kwargs == {"max_turns": 2} and compared.rollout.temperature == 0.5
    assert compared.eval.num_tasks == 3 and model.path == compared.model.path


@pytest.mark.parametrize("command", ["sft", "train"])
def test_the_settings_of_every_kind_of_run_are_read(command, tmp_path):
    made = {
        "sft": SFTConfig.model_validate({"data": {"path": "a.jsonl"}, "env": {"id": "a:B-v0"}}),
        "train": Config.model_validate({"env": {"id": "a:B-v0"}}),
    }[command]
    (tmp_path / "config.json").write_text(made.model_dump_json())
    (tmp_path / "origin.json").write_text(json.dumps({"command": command}))
    words = Words({"model": "tiny"}, {})
    assert read_arguments(words, settings_of(tmp_path))[0].env.id == "a:B-v0"

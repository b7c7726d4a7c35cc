"""A user's mistake is reported in one message, with exit code 2, and no run folder is left."""

import json

import pytest

from tests.doctor.test_doctor import FORGETFUL
from tir_alp import train
from tir_alp.models.tiny import BASE

TINY = ("--steps", "1", "--eval.num_tasks", "4", "--rollout.groups_per_step", "2")


def refuse(capsys, tmp_path, monkeypatch, *arguments):
    """Start a run that cannot start; return its error message."""
    monkeypatch.chdir(tmp_path)
    assert train.main([*TINY, *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("tir_alp.train: ")
    assert "Traceback" not in message
    assert not (tmp_path / "runs").exists()
    return message


@pytest.fixture
def refusal(capsys, tmp_path, monkeypatch):
    return lambda *arguments: refuse(capsys, tmp_path, monkeypatch, *arguments)


def copy_of_the_tiny_model(folder):
    for file in BASE.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_an_unknown_key(refusal):
    assert "--trainer.lrate: there is no such key; did you mean --trainer.lr?" in refusal(
        "--trainer.lrate", "1"
    )


def test_an_unknown_key_in_a_file(refusal, tmp_path):
    (tmp_path / "my.toml").write_text("[trainer]\nlrate = 1\n")
    assert "trainer.lrate: there is no such key" in refusal("--config", str(tmp_path / "my.toml"))


def test_a_value_of_the_wrong_type(refusal):
    message = refusal("--trainer.lr", "fast")
    assert "trainer.lr: " in message
    assert "'fast'" in message


def test_an_unknown_algorithm(refusal):
    message = refusal("--algorithm", "ppo")
    assert "no algorithm 'ppo'" in message
    assert "alp_sequence" in message


def test_a_missing_config(refusal):
    assert "cannot read the config 'nowhere.toml'" in refusal("--config", "nowhere.toml")


def test_a_missing_model_folder(refusal):
    assert "no model folder './nowhere'" in refusal("--model.path", "./nowhere")


def test_an_empty_data_set(refusal, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    message = refusal("--data.source", "jsonl", "--data.path", str(tmp_path / "empty.jsonl"))
    assert "empty.jsonl holds no tasks" in message


def test_a_prompt_longer_than_the_context(refusal, tmp_path):
    rows = [{"question": f"{number} " + "very " * 60, "answer": "1"} for number in range(64)]
    tasks = tmp_path / "long.jsonl"
    tasks.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    message = refusal("--data.source", "jsonl", "--data.path", str(tasks))
    assert "long.jsonl:" in message
    assert "rollout.max_context_tokens = 256" in message


def test_a_tokenizer_without_an_end_token(refusal, tmp_path):
    folder = copy_of_the_tiny_model(tmp_path)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["eos_token"]
    file.write_text(json.dumps(settings))
    assert "has no eos token" in refusal("--model.path", str(folder))


def test_a_template_that_drops_thinking(refusal, tmp_path):
    folder = copy_of_the_tiny_model(tmp_path)
    (folder / "chat_template.jinja").write_text(FORGETFUL)
    message = refusal("--model.path", str(folder), "--model.rewritten_history", "refuse")
    assert "rewrites history" in message and "<think>" in message
    assert 'model.rewritten_history = "fork"' in message and '"append"' in message


@pytest.mark.parametrize("name", ["tir_alp.envs:Nothing-v0", "no_such_package:Env-v0"])
def test_an_unknown_environment(refusal, name):
    assert f"cannot make the environment '{name}'" in refusal("--env.id", name)


def test_an_unknown_environment_setting(refusal):
    message = refusal("--env.kwargs", '{"max_turn": 3}')
    assert "env.kwargs.max_turn: there is no such setting. Did you mean max_turns?" in message
    assert "It takes call_format, instruction, max_calls, max_turns, " in message
    assert len(message.splitlines()) == 1


def test_a_setting_of_the_environment_of_the_wrong_type(refusal):
    message = refusal("--env.kwargs.max_turns", "two")
    assert "env.kwargs.max_turns: it must be of type int (it is 'two')" in message


def test_settings_of_the_environment_that_are_no_table(refusal):
    assert "give its keys one by one, as --env.kwargs.KEY VALUE" in refusal(
        "--env.kwargs", "max_turns=3"
    )


def test_resuming_a_missing_run(refusal):
    assert "nowhere is not a run folder" in refusal("--resume", "nowhere")

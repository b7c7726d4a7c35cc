"""The auditor on a run that a real model made in a real sandbox: honest, and spoiled."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.runs import assert_honest, train_in
from tests.tir_alp.corruptions import CORRUPTIONS, TOKENIZER, Copy
from tir_alp.audit import audit_run
from tir_alp.audit.__main__ import main

SMALL = (
    *("--name", "small", "--model.path", "tiny-able", "--steps", "2", "--seed", "5"),
    *("--rollout.groups_per_step", "2", "--rollout.group_size", "2", "--rollout.max_refills", "2"),
    *("--rollout.max_staleness", "1", "--eval.num_tasks", "1", "--data.num_tasks", "1000"),
)
NUM_CORRUPTIONS = 1000


@pytest.fixture(scope="session")
def honest(tmp_path_factory) -> Path:
    return train_in(tmp_path_factory.mktemp("audit"), *SMALL)


@pytest.fixture
def copied(honest, tmp_path) -> Path:
    """To be spoiled."""
    return Path(shutil.copytree(honest, tmp_path / "copy"))


def test_an_honest_run_is_accounted_for(honest, capsys):
    assert main([str(honest)]) == 0
    assert "every token is accounted for" in capsys.readouterr().out
    checked = {check: number for check, (number, _) in audit_run(honest).totals().items()}
    assert min(checked.values()) > 0, checked
    assert checked["sampled tokens"] == checked["logprobs"] == checked["versions"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_corruption_is_caught(honest, copied):
    rng = random.Random(0)
    made: Counter[str] = Counter()
    missed = []
    while made.total() < NUM_CORRUPTIONS:
        name = min(CORRUPTIONS, key=lambda name: (made[name], name))
        for _ in range(200):
            copy = Copy(honest, rng)
            done = CORRUPTIONS[name](copy)
            if done is not None and (spoiled := copy.spoiled()):
                break
        else:
            pytest.fail(f"{name} cannot be made here")
        for file, data in spoiled.items():
            (copied / file).unlink() if data is None else (copied / file).write_bytes(data)
        findings = audit_run(copied, TOKENIZER)
        if not findings.drifts:
            missed.append((name, done))
        made[name] += 1
        for file in spoiled:
            shutil.copy(honest / file, copied / file)
    assert missed == []
    assert len(made) >= 20
    assert_honest(copied)  # all was put back: it was the corruptions that were caught

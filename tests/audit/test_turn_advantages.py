"""GiGPO's advantages of turns: recorded as the loss got them, and computed again from rewards."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.audit.test_audit import SMALL
from tests.runs import assert_honest, train_with
from tests.training.harness import Groups, flat, make_groups, trainer
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.audit import audit_run
from tir_alp.models.tiny import TRAIN_CONFIG
from tir_alp.records.ledger_rows import update_record, update_row
from tir_alp.run.command_line import load_config, read_toml
from tir_alp.training.batch import collate
from tir_alp.training.packed_sequence import packed_sequence, packed_sequences


def by_turn(groups: Groups) -> Groups:
    return [[replace(each, turn_advantages=(0.25, -0.5)) for each in group] for group in groups]


def test_what_is_packed_has_the_advantages_of_its_turns():
    samples = flat(by_turn(make_groups()))
    samples[3] = replace(samples[3], turn_advantages=None)  # a conversation beside the main one
    samples[4] = replace(samples[4], turn_advantages=(0.0, 0.0))
    packed = [*packed_sequences(collate(samples), by_turn=True)]
    assert packed == [packed_sequence(each) for each in samples]
    assert packed[0].turn_advantages == pytest.approx((0.8 + 0.25, 0.8 - 0.5))
    assert packed[3].turn_advantages == packed[4].turn_advantages == ()


def test_a_token_that_differs_from_its_turn_is_seen():
    sample = flat(by_turn(make_groups()))[0]
    batch = collate([sample])
    assert batch.token_advantages is not None
    place = batch.loss_mask[0].nonzero()[0, 0]
    batch.token_advantages[0, place] += 1.0
    (packed,) = packed_sequences(batch, by_turn=True)
    assert len(packed.turn_advantages) == 3 and packed != packed_sequence(sample)


def test_a_row_of_the_ledger_keeps_them_exactly_and_is_as_before_without_them():
    groups = by_turn(make_groups())
    (update,) = trainer(ALGORITHMS["gigpo"]).step(groups, 0).updates
    assert {each.uid: each for each in update.sequences} == {
        each.trajectory.sequence_uid: packed_sequence(each) for each in flat(groups)
    }
    row = json.loads(json.dumps(update_row(update)))
    assert update_record(row) == update
    (plain,) = trainer(ALGORITHMS["grpo"]).step(make_groups(), 0).updates
    assert {len(each) for each in update_row(plain)["sequences"]} == {5}


def test_what_depends_on_the_policy_is_not_recorded():
    (update,) = trainer(ALGORITHMS["tir_otb"]).step(make_groups(), 0).updates
    assert {each.turn_advantages for each in update.sequences} == {()}


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    words = (*SMALL, "--algorithm", "gigpo", "--rollout.group_size", "6", "--steps", "1")
    return train_with(tmp_path_factory.mktemp("turns"), load_config(words, read_toml(TRAIN_CONFIG)))


def sequences_of(ledger: list[dict[str, Any]]) -> list[list[Any]]:
    """The sequences of an update that have advantages of turns."""
    rows = [each for row in ledger if row["kind"] == "update" for each in row["sequences"]]
    return [each for each in rows if len(each) == 6]


def other_number(ledger: list[dict[str, Any]]) -> None:
    sequences_of(ledger)[0][5][0] += 1e-6


def none(ledger: list[dict[str, Any]]) -> None:
    sequences_of(ledger)[0].pop()


def of_another_sequence(ledger: list[dict[str, Any]]) -> None:
    first, *others = sequences_of(ledger)
    other = next(each for each in others if each[5] != first[5])
    first[5], other[5] = other[5], first[5]


def one_turn_more(ledger: list[dict[str, Any]]) -> None:
    turns = sequences_of(ledger)[0][5]
    turns.append(turns[-1])


@pytest.mark.parametrize("corrupt", [other_number, none, of_another_sequence, one_turn_more])
def test_a_ledger_with_other_advantages_of_turns_is_caught(honest, tmp_path, corrupt):
    assert_honest(honest)
    copied = Path(shutil.copytree(honest, tmp_path / "copy"))
    file = copied / "ledger" / "step_000001.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    corrupt(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drifts = [str(each) for each in audit_run(copied).drifts]
    assert drifts and all("its turns were trained with the advantages" in each for each in drifts)


def test_a_reward_that_moves_to_another_turn_is_caught(honest, tmp_path):
    """The reward of the trajectory stays, and with it the advantage of the whole sequence."""
    copied = Path(shutil.copytree(honest, tmp_path / "copy"))
    file = copied / "trajectories" / "step_000001.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    moved = next(row for row in rows if len(row["turns"]) > 1 and row["turns"][-1]["reward"] > 0)
    moved["turns"][0]["reward"] = moved["turns"][-1]["reward"]
    moved["turns"][-1]["reward"] = 0.0
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drifts = [str(each) for each in audit_run(copied).drifts]
    assert any("its turns were trained with the advantages" in each for each in drifts)
    assert not any("it was trained with the advantage " in each for each in drifts)


def test_updates_that_were_undone_are_accounted_for(tmp_path):
    words = (*SMALL, "--algorithm", "mipu", "--algorithm.acceptance.tolerance", "0")
    words = (*words, "--rollout.max_staleness", "0", "--engine.precision", "int8", "--steps", "4")
    words = (*words, "--rollout.group_size", "6", "--trainer.lr", "1e-3")
    run = train_with(tmp_path, load_config(words, read_toml(TRAIN_CONFIG)))
    assert_honest(run)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rejected = [step["acceptance/rejected"] for step in steps if "acceptance/rejected" in step]
    skipped = [step["train/skipped_updates"] for step in steps if "train/skipped_updates" in step]
    assert len(skipped) == 4 and sum(rejected) >= 1 and sum(skipped) >= sum(rejected)

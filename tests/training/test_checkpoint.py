"""A checkpoint is either complete or absent; an incomplete one is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import TrainerConfig
from tir_alp.models.tiny.model import make_model, make_tokenizer
from tir_alp.records.trajectories import state_from_record, state_to_record
from tir_alp.rollouts.queue import QueueState
from tir_alp.tools.outcome import Outcome
from tir_alp.training import checkpoint, checkpoint_folder
from tir_alp.training.checkpoint_folder import CheckpointError, Position
from tir_alp.training.ranks import alone
from tir_alp.training.structure import declared_end_token_ids
from tir_alp.training.trainer import Trainer
from tir_alp.types import StopReason, TokenSpan, Trajectory, TrajectoryGroup, Turn, VersionSpan

TURN = Turn(
    completion=TokenSpan((4, 5), (-0.1 - 2e-17, -1e-300), trainable=False),
    observation=TokenSpan((7,)),
    policy_version=3,
    stop_reason=StopReason.LENGTH,
    outcome=Outcome.TOOL_ERROR,
    reward=1 / 3,
    info={"tool_calls": 1, "answer": None},
    timing={"generate": 0.1},
    version_spans=(VersionSpan(3, 0, 1), VersionSpan(4, 1, 2)),
)
TRAJECTORY = Trajectory("t", 5, TokenSpan((1, 2)), (TURN,), True, False, sequence_uid=9)
ROLLOUTS = QueueState(8, (5, 7), {5: TrajectoryGroup("t", 5, (TRAJECTORY,) * 2, num_failed=1)})
"""Whatever a group can hold."""
ROWS = state_to_record(ROLLOUTS)


def make_trainer(algorithm="bypass_token", model=None):
    return Trainer(
        make_model(seed=0) if model is None else model,
        TrainerConfig(),
        ALGORITHMS[algorithm],
        ranks=alone(),
        temperature=1.0,
        on_bad_update=lambda *_: None,
    )


@pytest.fixture(scope="module")
def trainer():
    return make_trainer()


def save(folder, trainer, step, keep=9):
    position = Position(step=step, group=16 * step)
    return checkpoint.save(folder, trainer, make_tokenizer(), position, ROWS, keep=keep)


def test_a_checkpoint_is_a_hugging_face_folder_and_knows_where_the_run_stood(tmp_path, trainer):
    path = save(tmp_path, trainer, step=7)
    loaded = AutoModelForCausalLM.from_pretrained(path).state_dict()
    weights = make_model(seed=0).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert checkpoint_folder.verify(path) == Position(step=7, group=112)


def test_a_checkpoint_ends_where_the_run_ended_its_completions(tmp_path):
    position = Position(step=1, group=16)
    ends = frozenset({1, 4})
    path = checkpoint.save(
        tmp_path, make_trainer(), make_tokenizer(), position, ROWS, 1, end_token_ids=ends
    )
    assert GenerationConfig.from_pretrained(path).eos_token_id == [1, 4]
    assert declared_end_token_ids(str(path)) == ends


def test_pending_groups_come_back_as_they_were(tmp_path, trainer):
    assert (
        state_from_record(checkpoint_folder.load_rollouts(save(tmp_path, trainer, step=1)))
        == ROLLOUTS
    )


def test_the_newest_is_by_number_and_old_ones_go(tmp_path, trainer):
    for step in (2, 9, 10):
        save(tmp_path, trainer, step, keep=2)
    assert checkpoint_folder.newest(tmp_path)[1].step == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_9"]


@pytest.mark.parametrize("name", ["model.safetensors", "trainer/__0_0.distcp", "tokenizer.json"])
def test_a_torn_checkpoint_is_refused_and_the_last_good_one_is_used(tmp_path, trainer, name):
    good = save(tmp_path, trainer, step=1)
    torn = save(tmp_path, trainer, step=2)
    (torn / name).write_bytes((torn / name).read_bytes()[:-1])
    path, position, refused = checkpoint_folder.newest(tmp_path)
    assert (path, position.step) == (good, 1)
    assert refused == [f"{torn} is torn: {name} is not what was saved"]


def test_a_missing_file_is_named(tmp_path, trainer):
    path = save(tmp_path, trainer, step=1)
    (path / "trainer" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"trainer/\.metadata is missing"):
        checkpoint_folder.verify(path)


def test_a_foreign_folder_is_refused(tmp_path, trainer):
    path = save(tmp_path, trainer, step=1)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="there is no checkpoint") as refusal:
        checkpoint_folder.newest(tmp_path)
    assert "no readable manifest" in str(refusal.value)


def test_a_checkpoint_of_another_format_is_refused(tmp_path, trainer):
    path = save(tmp_path, trainer, step=1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": "other 9"}))
    with pytest.raises(
        CheckpointError, match="has the format 'other 9', not 'tir_alp checkpoint 3'"
    ):
        checkpoint_folder.verify(path)


def test_what_does_not_fit_the_run_is_refused(tmp_path, trainer):
    path = save(tmp_path, trainer, step=1)
    with pytest.raises(CheckpointError, match=r"step_1 does not fit this run.*log_sigma"):
        checkpoint.load(path, make_trainer("alp_token"))
    wider = make_model(seed=0)
    wider.resize_token_embeddings(300)
    with pytest.raises(CheckpointError, match=r"does not fit this run: 3 tensors.*embed_tokens"):
        checkpoint.load(path, make_trainer(model=wider))


def test_what_a_crash_left_half_written_is_not_a_checkpoint(tmp_path, trainer):
    (tmp_path / ".step_5.part").mkdir()
    (tmp_path / ".step_5.part" / "model.safetensors").write_bytes(b"half")
    save(tmp_path, trainer, step=4)
    assert checkpoint_folder.newest(tmp_path)[1].step == 4
    assert save(tmp_path, trainer, step=5).is_dir()

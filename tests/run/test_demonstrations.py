"""What is learnt from files and from runs: read, checked and named when it is opened."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tir_alp.config import TranscriptsConfig
from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.records.trajectories import to_record
from tir_alp.rollouts.demonstration import Demonstrator
from tir_alp.rollouts.renderer import Renderer
from tir_alp.run.demonstrations import open_demonstrations
from tir_alp.types import TokenSpan, Trajectory, trace_uid

TOKENIZER = make_tokenizer()


def row(number: int, answer: str = "a") -> dict:
    question = {"role": "user", "content": f"question {number}"}
    return {"messages": [question, {"role": "assistant", "content": answer}]}


def open_rows(path: Path, max_tokens=64, **settings):
    config = TranscriptsConfig(path=path, **settings)
    demonstrator = Demonstrator(lambda system, tools: Renderer(TOKENIZER, system=system))
    return open_demonstrations(config, demonstrator, TOKENIZER, max_tokens, lambda line: None)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    return path


def texts(found, rows):
    return [TOKENIZER.decode(found.samples(each, 0)[0].trajectory.token_ids) for each in rows]


def test_rows_are_learnt_or_held_out_by_their_first_message(tmp_path):
    rows = [row(number % 50, f"answer {number}") for number in range(100)]
    found = open_rows(write(tmp_path / "t.jsonl", *rows), held_out=0.3)
    assert len(found.trained) + len(found.held_out) == 100
    assert 5 < len(found.held_out) < 60
    questions = [{each.split("<|end|>")[0] for each in texts(found, some)} for some in
                 (found.trained, found.held_out)]  # fmt: skip
    assert not questions[0] & questions[1]
    (sample,) = found.samples(found.trained[0], 7)
    assert sample.advantage == 1.0 and sample.trajectory.sequence_uid == 7


def test_a_broken_row_is_fatal_or_left_out_and_named_either_way(tmp_path):
    path = write(tmp_path / "t.jsonl", row(0), {"messages": 3}, row(1, "long " * 40), row(2))
    with pytest.raises(ValueError, match=r'^t\.jsonl:2: .*; or set data\.broken_rows = "skip"'):
        open_rows(path)
    found = open_rows(path, broken_rows="skip", held_out=0.0)
    assert len(found.trained) == 2
    assert found.left_out[0].startswith("t.jsonl:2: 'messages' must be a list")
    assert "t.jsonl:3 has" in found.left_out[1] and "is 64" in found.left_out[1]


def test_data_with_nothing_to_learn_is_refused(tmp_path):
    path = write(tmp_path / "t.jsonl", row(0, "long " * 40))
    with pytest.raises(ValueError, match=r"no conversation to train on in .*t\.jsonl\n.*has"):
        open_rows(path)


def test_conversations_in_a_parquet_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [row(number) for number in range(4)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = open_rows(tmp_path / "t.parquet", source="parquet", held_out=0.0)
    assert len(found.trained) == 4
    assert texts(found, found.trained[:1]) == ["<|user|>question 0<|end|><|assistant|>a<|end|>"]


def run_folder(folder: Path, *trajectories: Trajectory) -> Path:
    (folder / "trajectories").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": {"path": "tiny"}}))
    write(folder / "trajectories" / "step_000001.jsonl", *map(to_record, trajectories))
    return folder


def sampled(number: int, reward: float, void: bool = False) -> Trajectory:
    demonstrator = Demonstrator(lambda system, tools: Renderer(TOKENIZER, system=system))
    from tir_alp.rollouts.transcripts import read_transcript

    made = demonstrator.trajectory(read_transcript(row(number), "x"), number)
    completion = made.turns[0].completion
    logprobs = tuple(-0.5 for _ in completion.token_ids)
    turn = replace(
        made.turns[0],
        completion=TokenSpan(completion.token_ids, logprobs, trainable=False),
        reward=reward,
        policy_version=3,
        info={"void": void},
    )
    return replace(made, turns=(turn,))


def test_trajectories_of_a_run_are_learnt_token_by_token_once_each(tmp_path):
    run = run_folder(
        tmp_path / "run", sampled(0, 1.0), sampled(1, 0.5), sampled(0, 1.0), sampled(2, 2.0)
    )
    found = open_rows(run, source="run", held_out=0.0)
    assert len(found.trained) == 2  # enough reward, and not the same tokens twice
    learnt = found.samples(found.trained[0], 9)[0].trajectory
    assert learnt.token_ids == sampled(0, 1.0).token_ids
    assert learnt.turns[0].completion.trainable and set(learnt.rollout_logprobs) == {0.0}
    assert (learnt.sequence_uid, learnt.turns[0].policy_version) == (9, 0)
    assert len(open_rows(run, source="run", held_out=0.0, min_reward=0.5).trained) == 3


def test_all_traces_of_a_rewritten_conversation_are_learnt(tmp_path):
    first, last = sampled(0, 0.5), replace(sampled(0, 0.5), sequence_uid=trace_uid(0, 1))
    run = run_folder(tmp_path / "run", replace(last, branches=(first,), is_forked=True))
    found = open_rows(run, source="run", held_out=0.0, min_reward=1.0)  # 0.5 in each trace
    samples = found.samples(found.trained[0], 9)
    assert [each.trajectory.sequence_uid for each in samples] == [trace_uid(9, 1), 9]
    assert all(set(each.trajectory.rollout_logprobs) == {0.0} for each in samples)
    assert found.num_tokens == 2 * len(first.token_ids)


def test_void_turns_and_other_tokenizers_are_not_learnt_from(tmp_path):
    run = run_folder(tmp_path / "void", sampled(0, 1.0, void=True))
    with pytest.raises(ValueError, match="nothing in it is to be learnt"):
        open_rows(run, source="run", held_out=0.0)
    other = make_tokenizer()
    other.add_tokens(["more"])
    config = TranscriptsConfig(source="run", path=run)
    demonstrator = Demonstrator(lambda system, tools: Renderer(other))
    with pytest.raises(ValueError, match="tokens of another tokenizer"):
        open_demonstrations(config, demonstrator, other, 64, lambda line: None)
    with pytest.raises(ValueError, match="has no trajectories to learn from"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "config.json").write_text('{"model": {"path": "tiny"}}')
        open_rows(tmp_path / "empty", source="run")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"source": "jsonl"}, "'jsonl' needs a path"),
        ({"source": "hub", "path": "x"}, "'hub' does not take a path"),
        ({"source": "hub"}, "'hub' needs a dataset"),
        ({"path": "x", "dataset": "y"}, "'jsonl' does not take a dataset"),
    ],
)
def test_sources_need_what_they_read(settings, reason):
    with pytest.raises(ValueError, match=reason):
        TranscriptsConfig(**settings)

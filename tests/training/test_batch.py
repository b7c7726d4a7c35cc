"""Packing, compared with literal tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tir_alp.tools.outcome import Outcome
from tir_alp.training.batch import (
    Sample,
    collate,
    divide,
    loss_positions,
    pack,
    sequences_of,
    to_rows,
)
from tir_alp.types import StopReason, TokenSpan, Trajectory, Turn


def trajectory(uid: int, prompt: tuple[int, ...], *spans: TokenSpan) -> Trajectory:
    """Return a prompt followed by alternating completions and observations."""
    spans = (*spans, TokenSpan(())) if len(spans) % 2 else spans
    turns = tuple(
        Turn(completion, observation, 0, StopReason.STOP, Outcome.OK, 0.0)
        for completion, observation in zip(spans[::2], spans[1::2], strict=True)
    )
    return Trajectory("t", 0, TokenSpan(prompt), turns, True, False, sequence_uid=uid)


def said(*ids: int, trainable: bool = True) -> TokenSpan:
    return TokenSpan(ids, tuple(-id / 10 for id in ids), trainable)


def of_length(uid: int, length: int) -> Sample:
    return Sample(trajectory(uid, (1,) * (length - 1), said(5)), 1.0)


def shapes(batches) -> list[list[int]]:
    return [list(batch.lengths) for batch in batches]


TWO = [
    Sample(trajectory(7, (1, 2), said(3, 4), TokenSpan((5,)), said(6)), 0.5),
    Sample(trajectory(8, (1,), said(9)), -0.5),
]


def test_two_sequences_are_packed_behind_one_another():
    batch = collate(TWO)
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 1, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert batch.lengths == (6, 2)
    assert batch.sequence_uids == (7, 8)
    assert batch.advantages.tolist() == [0.5, -0.5]
    assert batch.num_loss_tokens == 4


def test_what_the_loss_reads_is_a_row_a_sequence():
    batch = collate(TWO)
    assert batch.loss_mask.tolist() == [
        [False, False, True, True, False, True],
        [False, True, False, False, False, False],
    ]
    expected = torch.tensor([[0, 0, -0.3, -0.4, 0, -0.6], [0, -0.9, 0, 0, 0, 0]])
    torch.testing.assert_close(batch.rollout_logprobs, expected)
    assert batch.turn_ids.tolist() == [[-1, -1, 0, 0, -1, 1], [-1, 0, -1, -1, -1, -1]]
    assert (batch.token_ids.dtype, batch.rollout_logprobs.dtype) == (torch.int64, torch.float32)


def test_some_sequences_of_a_batch_are_a_batch():
    three = collate([*TWO, Sample(trajectory(9, (4,), said(2, 2)), 1.5)])
    some = sequences_of(three, [0, 2])
    assert some.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 4, 2, 2]
    assert some.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert (some.lengths, some.sequence_uids) == ((6, 3), (7, 9))
    assert some.advantages.tolist() == [0.5, 1.5]
    assert torch.equal(some.loss_mask, three.loss_mask[[0, 2]])
    assert torch.equal(some.rollout_logprobs, three.rollout_logprobs[[0, 2]])
    assert some.proximal_logprobs is None


def test_the_places_of_the_loss_are_those_of_its_tokens():
    batch = collate(TWO)
    places = loss_positions(batch)
    assert places.tolist() == [2, 3, 5, 7]
    assert batch.token_ids[places].tolist() == [3, 4, 6, 9]
    assert batch.token_ids[places - 1].tolist() == [2, 3, 5, 1]


def test_values_of_the_loss_go_back_to_their_rows():
    batch = collate(TWO)
    rows = to_rows(batch, torch.tensor([30.0, 40.0, 60.0, 90.0]))
    assert rows.tolist() == [[0, 0, 30, 40, 0, 60], [0, 90, 0, 0, 0, 0]]
    assert torch.equal(rows[batch.loss_mask], batch.token_ids[loss_positions(batch)] * 10.0)


def test_a_void_turn_is_read_but_not_learnt():
    batch = collate(
        [Sample(trajectory(0, (1,), said(2, trainable=False), TokenSpan((3,)), said(4)), 1.0)]
    )
    assert batch.token_ids.tolist() == [1, 2, 3, 4]
    assert batch.loss_mask.tolist() == [[False, False, False, True]]
    assert loss_positions(batch).tolist() == [3]


def test_long_sequences_come_first_and_share_with_their_like():
    samples = [of_length(uid, length) for uid, length in enumerate((2, 6, 3, 5, 4))]
    batches = pack(samples, 10)
    assert shapes(batches) == [[6], [5, 4], [3, 2]]
    assert [batch.sequence_uids for batch in batches] == [(1,), (3, 4), (2, 0)]


def test_a_micro_batch_is_filled_to_its_last_token():
    samples = [of_length(uid, 5) for uid in range(4)]
    assert shapes(pack(samples, 10)) == [[5, 5], [5, 5]]
    assert shapes(pack(samples, 9)) == [[5], [5], [5], [5]]
    assert shapes(pack(samples, 20)) == [[5, 5, 5, 5]]


def test_a_sequence_longer_than_a_micro_batch_stands_alone():
    samples = [of_length(uid, length) for uid, length in enumerate((3, 30, 25, 4))]
    assert shapes(pack(samples, 10)) == [[30], [25], [4, 3]]


@pytest.mark.parametrize(
    "useless", [trajectory(1, (1, 2)), trajectory(1, (1, 2), said(3, trainable=False))]
)
def test_what_has_nothing_to_learn_is_left_out(useless):
    batches = pack([Sample(useless, 1.0), of_length(0, 4)], 100)
    assert [batch.sequence_uids for batch in batches] == [(0,)]
    assert pack([Sample(useless, 1.0)], 100) == []


def test_no_token_is_lost_or_learnt_twice():
    samples = [of_length(uid, 2 + uid * 7 % 11) for uid in range(30)]
    batches = pack(samples, 16)
    assert sorted(uid for batch in batches for uid in batch.sequence_uids) == list(range(30))
    assert all(sum(batch.lengths) <= 16 for batch in batches)
    assert sum(batch.num_loss_tokens for batch in batches) == 30


def test_the_ranks_of_a_round_have_alike_many_tokens():
    rounds = divide([9, 2, 7, 4, 6, 5, 3, 8], max_tokens=12, num_ranks=2)
    assert rounds == [[[0], [7]], [[2, 3], [4, 5]], [[6], [1]]]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(2, 60), max_size=40),
    max_tokens=st.integers(1, 120),
    num_ranks=st.integers(1, 5),
)
def test_every_rank_gets_equally_many_micro_batches_of_its_share(lengths, max_tokens, num_ranks):
    rounds = divide(lengths, max_tokens, num_ranks)
    shares = [share for shares in rounds for share in shares]
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    assert all(len(share) < 2 or sum(lengths[i] for i in share) <= max_tokens for share in shares)
    for round_ in rounds:
        assert len(round_) == num_ranks
        loads = [sum(lengths[index] for index in share) for share in round_]
        longest = max(lengths[index] for share in round_ for index in share)
        assert max(loads) - min(loads) <= longest


def test_a_rank_without_a_sample_runs_along_with_nothing_to_learn():
    samples = [of_length(uid, length) for uid, length in enumerate((9, 3, 4))]
    first, second = (pack(samples, 9, rank, num_ranks=2) for rank in (0, 1))
    assert (shapes(first), shapes(second)) == ([[9]], [[4, 3]])
    first, second = (pack(samples[:1], 9, rank, num_ranks=2) for rank in (0, 1))
    assert [batch.num_loss_tokens for batch in (*first, *second)] == [1, 0]
    assert second[0].lengths == (9,)

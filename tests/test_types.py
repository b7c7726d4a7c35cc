"""The data types, by the examples in their docstrings."""

import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from tir_alp.tools.outcome import Outcome
from tir_alp.types import (
    Batch,
    StopReason,
    TokenSpan,
    Trajectory,
    TrajectoryGroup,
    Turn,
    VersionSpan,
    cut_version_spans,
)


def turn(completion: TokenSpan, observation: tuple[int, ...] = (), **changes) -> Turn:
    fields = {
        "completion": completion,
        "observation": TokenSpan(observation),
        "policy_version": 3,
        "stop_reason": StopReason.STOP,
        "outcome": Outcome.OK,
        "reward": 0.0,
    }
    return Turn(**{**fields, **changes})


def trajectory(*turns: Turn, prompt: tuple[int, ...] = (1, 2), **changes) -> Trajectory:
    fields = {
        "task_id": "t",
        "group_id": 0,
        "prompt": TokenSpan(prompt),
        "turns": turns,
        "terminated": True,
        "truncated": False,
    }
    return Trajectory(**{**fields, **changes})


# ----------------------------------------------------------------------------------- spans


@pytest.mark.parametrize(
    ("span", "loss_mask"),
    [
        (TokenSpan((7, 8)), (False, False)),
        (TokenSpan((4, 5, 9), (-0.1, -2.3, -0.7)), (True, True, True)),
        (TokenSpan((4, 9), (-0.1, -1.2), trainable=False), (False, False)),
        (TokenSpan(()), ()),
        (TokenSpan((), ()), ()),
    ],
)
def test_the_loss_mask_of_a_span_follows_from_its_author(span, loss_mask):
    assert span.loss_mask == loss_mask
    assert len(span) == len(loss_mask)


def test_a_void_turn_was_sampled_all_the_same():
    assert TokenSpan((4, 9), (-0.1, -1.2), trainable=False).is_sampled
    assert not TokenSpan((4, 9)).is_sampled


@pytest.mark.parametrize("logprobs", [(), (-0.1,), (-0.1, -0.2, -0.3)])
def test_a_span_whose_logprobs_do_not_match_its_tokens_is_refused(logprobs):
    with pytest.raises(ValueError, match=f"a span of 2 tokens has {len(logprobs)} logprobs"):
        TokenSpan((4, 9), logprobs)


def test_spans_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        TokenSpan((7, 8)).trainable = False  # type: ignore[misc]


# -------------------------------------------------------------------------------- versions

FIVE = TokenSpan((1, 2, 3, 4, 5), (-0.1,) * 5)


def test_a_turn_knows_which_weights_sampled_which_tokens():
    spans = (VersionSpan(3, 0, 2), VersionSpan(7, 2, 5))
    assert turn(FIVE, version_spans=spans).versions == spans
    assert turn(FIVE).versions == (VersionSpan(3, 0, 5),)
    assert turn(TokenSpan((), ())).versions == ()


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(3, 0, 4)], "do not cover the 5 tokens"),
        ([(3, 0, 6)], "do not cover the 5 tokens"),
        ([(3, 1, 5)], "do not cover the 5 tokens"),
        ([(3, 0, 2), (4, 3, 5)], "do not cover the 5 tokens"),
        ([(3, 0, 2), (4, 1, 5)], "do not cover the 5 tokens"),
        ([(3, 0, 5), (4, 5, 5)], "do not cover the 5 tokens"),
        ([(4, 0, 5)], "the first token has version 4, not 3"),
        ([(3, 0, 2), (2, 2, 5)], r"versions must grow from span to span; they are \[3, 2\]"),
        ([(3, 0, 2), (3, 2, 5)], "versions must grow"),
    ],
)
def test_version_spans_that_do_not_fit_a_completion_are_refused(spans, message):
    with pytest.raises(ValueError, match=message):
        turn(FIVE, version_spans=tuple(VersionSpan(*span) for span in spans))


def test_version_spans_are_cut_with_the_tokens():
    spans = (VersionSpan(3, 0, 2), VersionSpan(7, 2, 5))
    assert cut_version_spans(spans, 4) == (VersionSpan(3, 0, 2), VersionSpan(7, 2, 4))
    assert cut_version_spans(spans, 2) == (VersionSpan(3, 0, 2),)
    assert cut_version_spans((), 2) == ()


# ---------------------------------------------------------------------------- trajectories


def test_a_trajectory_is_its_spans_in_order():
    whole = trajectory(
        turn(TokenSpan((3, 4), (-0.3, -0.4)), observation=(5,)),
        turn(TokenSpan((6,), (-0.6,))),
    )
    assert whole.token_ids == (1, 2, 3, 4, 5, 6)
    assert whole.loss_mask == (False, False, True, True, False, True)
    assert whole.rollout_logprobs == (0.0, 0.0, -0.3, -0.4, 0.0, -0.6)
    assert whole.turn_ids == (-1, -1, 0, 0, -1, 1)


def test_the_columns_of_a_trajectory_are_computed_once_and_not_pickled():
    whole, other = (trajectory(turn(TokenSpan((3, 4), (-0.3, -0.4)))) for _ in range(2))
    before = len(pickle.dumps(whole))
    assert whole.token_ids is whole.token_ids and whole.loss_mask is whole.loss_mask
    assert whole == other
    assert len(pickle.dumps(whole)) == before
    copied = pickle.loads(pickle.dumps(whole))
    assert copied == whole and copied.turn_ids == whole.turn_ids
    assert replace(whole, turns=()).token_ids == (1, 2)
    with pytest.raises(FrozenInstanceError):
        whole.task_id = "u"  # type: ignore[misc]


def test_a_void_turn_is_out_of_the_loss_but_keeps_its_logprobs():
    whole = trajectory(
        turn(TokenSpan((3,), (-0.3,), trainable=False), observation=(5,)),
        turn(TokenSpan((6,), (-0.6,))),
    )
    assert whole.loss_mask == (False, False, False, False, True)
    assert whole.rollout_logprobs == (0.0, 0.0, -0.3, 0.0, -0.6)
    assert whole.turn_ids == (-1, -1, 0, -1, 1)


def test_a_trajectory_that_never_got_a_turn_is_its_prompt():
    whole = trajectory()
    assert whole.token_ids == (1, 2)
    assert whole.loss_mask == (False, False)
    assert whole.reward == 0


def test_rewards_add_up_over_turns_and_stand_side_by_side_in_a_group():
    span = TokenSpan((3,), (-0.3,))
    first = trajectory(turn(span, reward=0.25), turn(span, reward=1.0))
    second = trajectory(turn(span, reward=-1.0))
    assert first.reward == 1.25
    assert TrajectoryGroup("t", 0, (first, second)).rewards == (1.25, -1.0)


def test_a_turn_is_void_where_the_environment_says_so():
    span = TokenSpan((3,), (-0.3,))
    assert turn(span, info={"void": True}).is_void
    assert not turn(span, info={"void": False}).is_void
    assert not turn(span).is_void


def test_a_batch_counts_the_tokens_of_its_loss():
    batch = Batch(
        token_ids=torch.tensor([5, 6, 7, 8, 9]),
        position_ids=torch.tensor([0, 1, 2, 0, 1]),
        lengths=(3, 2),
        sequence_uids=(0, 1),
        loss_mask=torch.tensor([[False, False, True], [False, True, False]]),
        rollout_logprobs=torch.zeros(2, 3),
        turn_ids=torch.tensor([[-1, -1, 0], [-1, 0, -1]]),
        advantages=torch.tensor([0.7, -0.7]),
    )
    assert batch.num_loss_tokens == 2

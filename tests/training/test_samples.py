"""What the traces of an episode count for in the loss."""

from dataclasses import replace

import pytest
import torch

from tir_alp.algorithm.loss import loss_counts, policy_loss
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.tools.outcome import Outcome
from tir_alp.training.batch import collate, pack
from tir_alp.training.micro_batch import loss_inputs
from tir_alp.training.samples import samples_of
from tir_alp.types import StopReason, TokenSpan, Trajectory, Turn, trace_uid


def turn(num_tokens, *, trainable=True):
    return Turn(
        completion=TokenSpan((7,) * num_tokens, (-0.5,) * num_tokens, trainable),
        observation=TokenSpan(()),
        policy_version=0,
        stop_reason=StopReason.EOS,
        outcome=Outcome.OK,
        reward=0.0,
    )


def trace(number, *lengths, uid=3, trainable=True):
    turns = tuple(turn(length, trainable=trainable) for length in lengths)
    return Trajectory("t", 0, TokenSpan((5, 6)), turns, True, False, trace_uid(uid, number))


def forked(*lengths, uid=3):
    *earlier, last = (trace(number, each, uid=uid) for number, each in enumerate(lengths))
    return replace(last, branches=tuple(earlier), is_forked=True)


def test_every_trace_has_the_advantage_of_its_episode():
    samples = samples_of(forked(2, 6), 0.7, [0.1, 0.2], "token")
    assert [each.advantage for each in samples] == [0.7, 0.7]
    # The trajectory itself is the last trace.
    assert [each.turn_advantages for each in samples] == [(0.2,), (0.1,)]
    assert [each.weight for each in samples] == [0.75, 0.25]
    assert [each.weight for each in samples_of(forked(2, 6), 0.7, None, "equal")] == [1.0, 1.0]


def test_the_weights_are_shares_of_what_is_trained():
    masked = replace(forked(2, 6), branches=(trace(0, 2, trainable=False),))
    assert [each.weight for each in samples_of(masked, 1.0, None, "token")] == [1.0, 0.0]
    none = trace(0, 2, trainable=False)
    assert [each.weight for each in samples_of(none, 1.0, None, "token")] == [1.0]


def loss_of(samples, algorithm, max_tokens=1000):
    """The loss of an update, summed over its micro-batches."""
    inputs = [loss_inputs(batch) for batch in pack(samples, max_tokens)]
    losses = []
    counts = torch.stack([torch.stack([*loss_counts(each, algorithm)]) for each in inputs]).sum(0)
    for each in inputs:
        logprobs = each.logprobs + 0.1 * torch.arange(each.logprobs.shape[1])
        losses.append(policy_loss(replace(each, logprobs=logprobs), algorithm, *counts)[0])
    return float(sum(losses))


@pytest.mark.parametrize("aggregation", ["sequence_mean_token_mean", "sequence_mean_token_sum"])
@pytest.mark.parametrize("max_tokens", [1000, 1])
def test_by_tokens_an_episode_counts_as_one_sequence(aggregation, max_tokens):
    algorithm = ALGORITHMS["bypass_token"].model_copy(update={"aggregation": aggregation})
    other = samples_of(trace(0, 5, uid=9), -1.0)
    shared = samples_of(forked(2, 2, 2, 2), 1.0, None, "token")
    equal = samples_of(forked(2, 2, 2, 2), 1.0, None, "equal")
    # Every trace has the same loss, so that the mean over its tokens is that of the episode.
    one, whole = samples_of(trace(0, 2), 1.0), loss_of(other, algorithm)
    of_trace = loss_of(one, algorithm)
    times = 1 if aggregation == "sequence_mean_token_mean" else 4
    due = (times * of_trace + whole) / 2
    assert loss_of([*shared, *other], algorithm, max_tokens) == pytest.approx(due, rel=1e-5)
    due = (4 * of_trace + whole) / 5
    assert loss_of([*equal, *other], algorithm, max_tokens) == pytest.approx(due, rel=1e-5)


def test_with_a_mean_over_tokens_the_credit_makes_no_difference():
    algorithm = ALGORITHMS["bypass_token"].model_copy(update={"aggregation": "token_mean"})
    losses = [
        loss_of(samples_of(forked(2, 5), 1.0, None, credit), algorithm)
        for credit in ("equal", "token")
    ]
    assert losses[0] == losses[1]


def test_a_batch_without_weights_has_none():
    assert collate(samples_of(forked(2, 6), 1.0)).weights is None
    weights = collate(samples_of(forked(2, 6), 1.0, None, "token")).weights
    assert weights is not None and weights.tolist() == [0.75, 0.25]

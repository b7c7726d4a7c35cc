"""Summaries against numpy on the tokens, however these are divided and laid out."""

import functools
import math
import operator
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tir_alp.algorithm.inputs import LossInputs
from tir_alp.algorithm.ratio_metrics import PERCENTILES, mismatch_metrics, ratio_metrics
from tir_alp.algorithm.ratio_summary import FIRST_TOKENS, MAX_TURNS, RatioSummary, summarise

torch.set_num_threads(1)

SIZED = [name for name in RatioSummary.__slots__ if name != "columns"]

Rows = tuple[LossInputs, Tensor, dict[str, Tensor]]
"""Arguments of `summarise`: inputs, entropy, clipped."""


@st.composite
def batches(draw) -> Rows:
    """Up to 5 sequences with turns and observations between them; NaN or inf outside the mask."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 20)))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        row = [-1] * rng.integers(1, 4)
        for turn in range(rng.integers(1, draw(st.sampled_from([2, 4, 12])))):
            row += [turn] * rng.integers(1, 2 * FIRST_TOKENS) + [-1] * rng.integers(0, 3)
        rows.append(row)
    width = max(map(len, rows)) + draw(st.integers(0, 2))
    turn_ids = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    mask = (turn_ids >= 0) & torch.from_numpy(rng.random(turn_ids.shape) < 0.8)
    junk = draw(st.sampled_from([math.nan, math.inf]))

    def random(mean: float, std: float) -> Tensor:
        values = torch.from_numpy(rng.normal(mean, std, turn_ids.shape))
        return torch.where(mask, values, junk)

    rollout = random(-1.0, 0.3)
    inputs = LossInputs(
        logprobs=torch.where(mask, rollout + random(0.0, 0.2), junk),
        rollout_logprobs=rollout,
        advantages=torch.from_numpy(rng.choice([-0.5, 0.0, 1.0], len(rows))),
        loss_mask=mask,
        turn_ids=turn_ids,
    )
    clipped = {side: torch.from_numpy(rng.random(mask.shape) < 0.2) for side in ("low", "high")}
    return inputs, random(0.7, 0.1), clipped


def select(rows: Rows, index: list[int]) -> Rows:
    inputs, entropy, clipped = rows
    assert inputs.turn_ids is not None
    part = LossInputs(
        logprobs=inputs.logprobs[index],
        rollout_logprobs=inputs.rollout_logprobs[index],
        advantages=inputs.advantages[index],
        loss_mask=inputs.loss_mask[index],
        turn_ids=inputs.turn_ids[index],
    )
    return part, entropy[index], {side: where[index] for side, where in clipped.items()}


def total(parts: list[RatioSummary]) -> RatioSummary:
    return functools.reduce(operator.add, parts)


def by_numpy(rows: Rows) -> dict[str, float]:
    """Return every metric, computed from all tokens at once."""
    inputs, entropy, clipped = rows
    assert inputs.turn_ids is not None
    mask = inputs.loss_mask.numpy()
    where = np.argwhere(mask)
    if not len(where):
        return {}
    current, rollout = inputs.logprobs.numpy()[mask], inputs.rollout_logprobs.numpy()[mask]
    turns = inputs.turn_ids.numpy()
    turn = turns[mask]
    place = np.array([t - np.flatnonzero(turns[b] == turns[b, t])[0] for b, t in where])
    advantage = inputs.advantages.numpy()[where[:, 0]]
    l = current - rollout  # noqa: E741
    r = np.exp(l)

    def statistics(chosen: np.ndarray) -> dict[str, float]:
        ratios = r[chosen]
        return {
            "tokens": len(ratios),
            "kl": -l[chosen].mean(),
            "k3": (ratios - l[chosen] - 1).mean(),
            "chi2": (ratios**2).mean() - 1,
            "ess": ratios.sum() ** 2 / (ratios**2).sum() / len(ratios),
            "log_perplexity": -current[chosen].mean(),
            "rollout_log_perplexity": -rollout[chosen].mean(),
            "entropy": entropy.numpy()[mask][chosen].mean(),
            "clip_low": clipped["low"].numpy()[mask][chosen].mean(),
            "clip_high": clipped["high"].numpy()[mask][chosen].mean(),
            "clip_dual": 0.0,
            **{
                f"ratio_p{p}": np.quantile(ratios, p / 100, method="inverted_cdf")
                for p in (2, 50, 98)
            },
        }

    row = where[:, 0]
    sequence = np.array([l[row == b].sum() for b in np.unique(row)])
    per_turn = np.array(
        [l[(row == b) & (turn == i)].sum() for b, i in sorted(set(zip(row, turn, strict=True)))]
    )
    everything = statistics(np.ones(len(l), bool))
    expected = {
        **{f"ratio/p{p}": np.quantile(np.exp(sequence), p / 100) for p in PERCENTILES},
        **{f"ratio/turn_p{p}": np.quantile(np.exp(per_turn), p / 100) for p in PERCENTILES},
        **{
            f"ratio/token_p{p}": np.quantile(r, p / 100, method="inverted_cdf") for p in PERCENTILES
        },
        "ratio/token_chi2": everything["chi2"],
        "ratio/token_ess": everything["ess"],
        "ratio/sequence_chi2": (np.exp(sequence) ** 2).mean() - 1,
        "ratio/sequence_ess": np.exp(sequence).mean() ** 2 / (np.exp(sequence) ** 2).mean(),
        "kl/rollout": everything["kl"],
        "kl/rollout_k3": everything["k3"],
        "perplexity/policy": np.mean([np.exp(-current[row == b].mean()) for b in np.unique(row)]),
        "perplexity/rollout": np.mean([np.exp(-rollout[row == b].mean()) for b in np.unique(row)]),
        "entropy/mean": everything["entropy"],
    }
    is_first = (turn > 0) & (place < FIRST_TOKENS)
    slices = {
        **{f"turn_{i}": np.minimum(turn, MAX_TURNS - 1) == i for i in range(MAX_TURNS)},
        "positive": advantage > 0,
        "negative": advantage < 0,
        "after_tool_positive": (advantage > 0) & is_first,
        "after_tool_negative": (advantage < 0) & is_first,
    }
    for name, chosen in slices.items():
        if chosen.any():
            expected |= {f"{name}/{key}": value for key, value in statistics(chosen).items()}
    return expected


def assert_metrics(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if "token_p" in name or "/ratio_p" in name:  # from the histogram: a share of the log ratio
            assert math.log(found[name]) == pytest.approx(math.log(value), rel=0.0101, abs=1e-6)
        else:
            assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


@given(batches())
@settings(deadline=None)
def test_every_metric_equals_numpys(rows):
    assert_metrics(ratio_metrics(summarise(*rows)), by_numpy(rows))


@given(batches(), st.integers(0, 1 << 20))
@settings(deadline=None)
def test_parts_in_any_order_add_up_to_the_whole(rows, seed):
    num_rows = len(rows[0].advantages)
    order = np.random.default_rng(seed).permutation(num_rows).tolist()
    cut = seed % (num_rows + 1)
    parts = [summarise(*select(rows, part)) for part in (order[:cut], order[cut:])]
    parts = [pickle.loads(pickle.dumps(part)) for part in parts]  # as ranks exchange them
    whole, added = summarise(*rows), total(parts)
    assert torch.equal(added.histogram, whole.histogram)
    assert ratio_metrics(added) == pytest.approx(ratio_metrics(whole), rel=1e-12, abs=1e-15)


@given(batches())
@settings(deadline=None)
def test_padding_makes_no_difference(rows):
    inputs, entropy, clipped = rows

    def pad(tensor: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, 3), value=value)

    assert inputs.turn_ids is not None
    padded = replace(
        inputs,
        logprobs=pad(inputs.logprobs, math.nan),
        rollout_logprobs=pad(inputs.rollout_logprobs, math.nan),
        loss_mask=pad(inputs.loss_mask, False),
        turn_ids=pad(inputs.turn_ids, -1),
    )
    clipped = {side: pad(where, True) for side, where in clipped.items()}
    found = ratio_metrics(summarise(padded, pad(entropy, math.nan), clipped))
    assert found == ratio_metrics(summarise(*rows))


def one_turn(log_ratios: Tensor, advantage: float = 1.0) -> LossInputs:
    return LossInputs(
        logprobs=log_ratios[None] - 1,
        rollout_logprobs=torch.full((1, len(log_ratios)), -1.0),
        advantages=torch.tensor([advantage]),
        loss_mask=torch.ones(1, len(log_ratios), dtype=torch.bool),
        turn_ids=torch.zeros(1, len(log_ratios), dtype=torch.int64),
    )


def test_a_summary_of_many_tokens_is_as_large_as_one_of_few():
    few, many = (summarise(one_turn(torch.randn(n))) for n in (1, 100_000))
    sizes = [{name: getattr(summary, name).numel() for name in SIZED} for summary in (few, many)]
    assert sizes[0] == sizes[1]
    assert few.histogram.nbytes + few.sums.nbytes < 700_000


def test_first_tokens_are_those_of_a_turn_even_where_some_are_masked():
    turn_ids = torch.tensor([[0, 0, -1, *[1] * (FIRST_TOKENS + 2)]])
    mask = turn_ids >= 0
    mask[0, 3:8] = False  # among the first tokens of turn 1
    zeros = torch.zeros(turn_ids.shape)
    inputs = LossInputs(zeros, zeros, torch.tensor([-1.0]), mask, turn_ids=turn_ids)
    summary = summarise(inputs)
    assert summary.tokens(is_first=True).num_tokens == FIRST_TOKENS - 5
    assert summary.tokens(turn=1, is_first=False).num_tokens == 2
    assert summary.tokens(turn=0).num_tokens == 2


def test_without_tokens_there_is_nothing_to_say():
    inputs = one_turn(torch.ones(3))
    empty = summarise(replace(inputs, loss_mask=torch.zeros(1, 3, dtype=torch.bool)))
    assert ratio_metrics(empty) == mismatch_metrics(empty) == {}


def test_log_ratios_beyond_all_bounds_are_clamped_as_in_the_loss():
    metrics = ratio_metrics(summarise(one_turn(torch.tensor([-1000.0, 0.0, 1000.0]))))
    assert metrics["ratio/token_chi2"] == pytest.approx(math.exp(40) / 3, rel=1e-6)
    assert metrics["ratio/token_p98"] == pytest.approx(math.exp(20), rel=0.25)
    assert metrics["kl/rollout"] == 0


def test_credit_may_differ_from_token_to_token():
    inputs = replace(one_turn(torch.zeros(4)), advantages=torch.tensor([[1.0, 1.0, -1.0, 0.0]]))
    summary = summarise(inputs)
    assert [summary.tokens(sign=sign).num_tokens for sign in ("negative", "zero", "positive")] == [
        *(1, 1, 2)
    ]


def test_turns_are_needed():
    with pytest.raises(ValueError, match="turn_ids is None"):
        summarise(replace(one_turn(torch.zeros(1)), turn_ids=None))

"""A short run; `python -m tests.fuzz.graders` is the long one."""

from tests.fuzz.compounds import KINDS
from tests.fuzz.graders import fuzz, pairs
from tir_alp.envs.grading import Grade


def test_other_notations_are_right_and_other_values_are_wrong():
    result = fuzz(num_pairs=300, seed=1)
    assert result.num_right >= 140 and result.num_wrong >= 120
    assert result.false_positives == result.without_verdict == []
    assert result.false_negatives == []


def test_every_kind_is_drawn_right_and_wrong():
    source = pairs(seed=2)
    drawn = {(pair.kind, pair.is_right) for pair in (next(source) for _ in range(200))}
    assert drawn == {(kind, is_right) for kind in KINDS for is_right in (True, False)}


def test_the_fuzzer_finds_a_grader_that_is_lax_or_strict_or_silent():
    lax = fuzz(100, ask=lambda answer, truth: Grade(correct=True))
    strict = fuzz(100, ask=lambda answer, truth: Grade(correct=answer == truth))
    silent = fuzz(100, ask=lambda answer, truth: Grade(correct=None))
    assert len(lax.false_positives) == lax.num_wrong > 30
    assert len(strict.false_negatives) > 30 and strict.false_positives == []
    assert len(silent.without_verdict) == 100

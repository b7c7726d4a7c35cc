"""The records of updates that a step reports."""

import math
from dataclasses import replace

from tests.training.harness import (
    flat,
    make_groups,
    noisy,
    trainer,
    with_advantage,
)
from tir_alp.training.packed_sequence import PackedSequence, packed_sequence
from tir_alp.training.step_report import UpdateRecord, join_ranks


def test_a_step_reports_which_sequences_the_loss_of_each_update_got():
    groups, skipped = make_groups(), []
    bad = [*groups[:2], *with_advantage(groups[2:], math.inf)]
    one = trainer(noisy(), bad=lambda update, _: skipped.append(update), updates_per_step=2)
    first, second = one.step(bad, 3).updates
    assert [(each.update, each.made) for each in (first, second)] == [(6, True), (7, False)]
    assert skipped == [7]
    for record, part in ((first, bad[:2]), (second, bad[2:])):
        expected = {packed_sequence(each) for each in flat(part)}
        assert set(record.sequences) == expected and len(record.sequences) == len(expected)


def test_records_of_ranks_are_joined_without_sequences_that_fill_a_round():
    def record(update: int, *sequences: PackedSequence) -> UpdateRecord:
        return UpdateRecord(update, made=True, sequences=sequences)

    long, short = (PackedSequence(uid, 9, 4, 0.5, "ab") for uid in (1, 2))
    filler = replace(short, num_loss_tokens=0)
    first_rank, second_rank = [record(0, long), record(1, short)], [record(0, short), record(1)]
    assert join_ranks([first_rank, [record(0, short), record(1, filler)]]) == join_ranks(
        [first_rank, second_rank]
    )
    assert join_ranks([first_rank, second_rank])[0].sequences == (long, short)

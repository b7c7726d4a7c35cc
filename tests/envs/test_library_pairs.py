"""Where the grader and other libraries differ, the docs say so, and say why."""

import pytest

from tests.envs.library_verdicts import LIBRARIES, documented, reason_of, verdicts


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_difference_from_a_library_is_documented_and_no_other(library):
    known = documented()
    found = {verdict.pair: verdict for verdict in verdicts(library)}
    expected = {
        pair: verdict.line(reason_of(known.get(pair, "")))
        for pair, verdict in found.items()
        if verdict.ours is not verdict.theirs
    }
    assert expected == {pair: line for pair, line in known.items() if pair in found}
    assert all(len(reason_of(line)) > 10 for line in expected.values())


def test_there_are_enough_pairs():
    counts = {library: len(verdicts(library)) for library in LIBRARIES}
    assert counts == {"math_verify": 269, "hendrycks": 30, "minerva": 66}
    assert set(documented()) <= {v.pair for library in LIBRARIES for v in verdicts(library)}

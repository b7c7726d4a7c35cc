"""Real chat templates, where a folder of them is at hand; see `tests.fuzz.templates`."""

import os
from pathlib import Path

import pytest

from tests.fuzz.templates import FEWEST, differences, read_table

FOLDER = os.environ.get("TIR_ALP_TEMPLATES", "")


@pytest.mark.skipif(not FOLDER, reason="TIR_ALP_TEMPLATES names no folder of chat templates")
@pytest.mark.timeout(600)
def test_every_real_template_is_reproduced_or_refused_as_the_table_says():
    assert differences(Path(FOLDER)) == []


def test_the_table_has_no_template_that_is_reproduced_wrongly():
    verdicts = read_table()
    assert len({name for name, _ in verdicts}) >= FEWEST
    kinds = [verdict.partition(": ") for verdict in verdicts.values()]
    assert {kind for kind, _, _ in kinds} == {"accepted", "thoughts", "refused"}
    assert all(bool(reason) == (kind == "refused") for kind, _, reason in kinds)
    assert sum(kind != "refused" for kind, _, _ in kinds) >= FEWEST

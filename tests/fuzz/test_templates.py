"""Real chat templates, where a folder of them is at hand; see `tests.fuzz.templates`."""

import os
from pathlib import Path

import pytest

from tests.fuzz.templates import examine_all

FOLDER = os.environ.get("TIR_ALP_TEMPLATES", "")
FEWEST = 60


@pytest.mark.skipif(not FOLDER, reason="TIR_ALP_TEMPLATES names no folder of chat templates")
@pytest.mark.timeout(600)
def test_every_real_template_is_reproduced_or_refused():
    verdicts = {name: (verdict, detail) for name, verdict, detail in examine_all(Path(FOLDER))}
    assert len({name.split()[0] for name in verdicts}) >= FEWEST
    assert {
        name: found for name, found in verdicts.items() if found[0] in ("WRONG", "CRASHED")
    } == {}
    assert sum(verdict != "refused" for verdict, _ in verdicts.values()) >= FEWEST
    assert all(detail for verdict, detail in verdicts.values() if verdict == "refused")

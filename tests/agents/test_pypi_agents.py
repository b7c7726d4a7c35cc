"""Agents from PyPI train the tiny model in one step, and each got what was captured, byte for byte.

`python tests/agents/install.py FOLDER` installs them; `TIR_ALP_AGENTS` names the folder.
"""

import pytest

pytest.importorskip("openai")

from tests.agents import client_runs
from tests.agents.client_runs import (
    CLIENTS,
    GROUP,
    assert_received,
    assert_trained,
    episodes_of,
)
from tests.agents.install import FOLDER_VARIABLE, find_python
from tests.runs import assert_honest

pytestmark = [
    pytest.mark.skipif(
        find_python() is None, reason=f"{FOLDER_VARIABLE} names no folder with agents"
    ),
    pytest.mark.sandbox,
]
REWRITE = ("openai_completions", "smolagents", "mini_swe_agent")
"""Those that may go on with another text than they got: without a mark, or without the reply."""
SEVERAL = ("streams",)
"""Those that have several conversations."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return client_runs.trained(tmp_path_factory.mktemp("agents"))


@pytest.mark.parametrize("client", CLIENTS)
def test_its_episodes_end_and_are_trained_on(run, client):
    assert_trained(run, client)


@pytest.mark.parametrize("client", CLIENTS)
def test_it_got_what_was_captured_byte_for_byte(run, client):
    assert_received(run, client)


@pytest.mark.parametrize("client", [each for each in CLIENTS if each not in (*REWRITE, *SEVERAL)])
def test_its_conversation_is_one_trace(run, client):
    assert [len(each.sequences) for each in episodes_of(run, client)] == [1] * GROUP


def test_each_stream_is_a_conversation_of_its_own(run):
    assert [len(each.sequences) for each in episodes_of(run, "streams")] == [3] * GROUP


def test_the_audit_is_clean(run):
    assert_honest(run)

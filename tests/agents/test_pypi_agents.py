"""Agents from PyPI train the tiny model in one step, and each got what was captured, byte for byte.

`python tests/agents/install.py FOLDER` installs them; `TIR_ALP_AGENTS` names the folder.
"""

import json
from pathlib import Path

import pytest

pytest.importorskip("openai")

from tests.agents.install import FOLDER_VARIABLE, find_python
from tests.agents.pypi_agents import AGENTS, RECEIVED, verifiers_bash
from tests.runs import assert_honest, train_with
from tir_alp.config import Config
from tir_alp.envs.interop.libraries import folder_of
from tir_alp.models.tiny import ABLE
from tir_alp.records.ledger_rows import update_record
from tir_alp.records.trajectories import from_record
from tir_alp.training.policy import load_tokenizer

pytestmark = [
    pytest.mark.skipif(
        find_python() is None, reason=f"{FOLDER_VARIABLE} names no folder with agents"
    ),
    pytest.mark.sandbox,
]
SCRIPT = Path(__file__).with_name("pypi_agents.py")
GROUP = 2
VERIFIERS = folder_of("verifiers") / "bin" / "python"
CLIENTS = [each for each in AGENTS if each != verifiers_bash.__name__ or VERIFIERS.exists()]
REWRITE = ("openai_completions", "smolagents", "mini_swe_agent")
"""Those that may go on with another text than they got: without a mark, or without the reply."""
STOPS = ("\n```", "Observation:", "Calling tools:", "</code>")  # texts at which clients stop


def tasks(seed, size, split):
    """A task for each agent; it is held out for none but the first."""
    asked = {"question": "What is 37*48+112?", "answer": "1888", "python": str(VERIFIERS)}
    names = CLIENTS if split == "train" else CLIENTS[:1]
    return [{"task_id": name, "client": name, **asked} for name in names]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agents")
    values = {
        "name": "agents",
        "steps": 1,
        "model": {"path": "tiny-able"},
        "env": {
            "id": "tir_alp.envs:Agent-v0",
            "kwargs": {
                "command": [find_python(), "-E", str(SCRIPT)],
                "timeout_s": 240.0,
                "files": [RECEIVED],
            },
        },
        "data": {"source": f"{__name__}:tasks"},
        "agents": {"calls": "fenced", "train_on": "all", "python": {"sandbox": {"preload": []}}},
        "rollout": {
            "groups_per_step": len(CLIENTS),
            "group_size": GROUP,
            "max_turn_tokens": 64,
            "max_context_tokens": 1024,
            "overlong": "keep",
        },
        "eval": {
            "num_tasks": 1,
            "greedy": False,
        },
        "trackers": [],
    }
    return train_with(folder, Config.model_validate(values))


@pytest.fixture(scope="module")
def episodes(run):
    lines = (run / "trajectories/step_000001.jsonl").read_text().splitlines()
    return [from_record(json.loads(line)) for line in lines]


def of_client(episodes, name):
    found = [each for each in episodes if each.task_id == name]
    assert len(found) == GROUP
    return found


def turns(episode):
    """Return the turns of all traces, in the order in which they ended."""
    found = [turn for each in episode.sequences for turn in each.turns]
    return sorted(found, key=lambda turn: turn.info["exchange"]["number"])


def report(episode):
    return json.loads(episode.turns[-1].info["report"])


def received(path, body):
    """Return the text and the calls of a reply, as the client got it."""
    if body.startswith("data:"):
        return streamed(body)
    body = json.loads(body)
    if path.endswith("/messages"):
        parts = body["content"]
        text = "".join(each["text"] for each in parts if each["type"] == "text")
        calls = [[each["id"], each["input"]] for each in parts if each["type"] == "tool_use"]
    elif path.endswith("/responses"):
        parts = body["output"]
        said = [part for each in parts if each["type"] == "message" for part in each["content"]]
        text = "".join(each["text"] for each in said)
        called = [each for each in parts if each["type"] == "function_call"]
        calls = [[each["call_id"], json.loads(each["arguments"])] for each in called]
    elif path.endswith("/chat/completions"):
        message = body["choices"][0]["message"]
        text, called = message["content"] or "", message.get("tool_calls") or []
        calls = [[each["id"], json.loads(each["function"]["arguments"])] for each in called]
    else:
        text, calls = body["choices"][0]["text"], []
    return text, calls


def streamed(body):
    """Return the text and the calls of a stream of `/chat/completions`."""
    events = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    deltas = [each["delta"] for event in events for each in json.loads(event)["choices"]]
    text = "".join(each.get("content") or "" for each in deltas)
    parts = [part for each in deltas for part in each.get("tool_calls") or ()]
    arguments = "".join(each["function"]["arguments"] for each in parts)
    return text, [[parts[0]["id"], json.loads(arguments)]] if parts else []


@pytest.mark.parametrize("client", CLIENTS)
def test_its_episodes_end_and_are_trained_on(run, episodes, client):
    for episode in of_client(episodes, client):
        assert report(episode)["end"] == "exited", report(episode)["errors"]
        assert any(any(each.loss_mask) for each in episode.sequences)
    ledger = (run / "ledger/step_000001.jsonl").read_text().splitlines()
    updates = [each for each in map(json.loads, ledger) if each["kind"] == "update"]
    packed = [each for row in updates for each in update_record(row).sequences]
    trained = {each.uid for each in packed}
    for episode in of_client(episodes, client):
        assert {each.sequence_uid for each in episode.sequences} <= trained


@pytest.mark.parametrize("client", CLIENTS)
def test_it_got_what_was_captured_byte_for_byte(episodes, client):
    tokenizer = load_tokenizer(str(ABLE))
    for episode in of_client(episodes, client):
        replies = report(episode)["files"][RECEIVED].splitlines()
        assert len(replies) == len(turns(episode)) > 0
        for turn, line in zip(turns(episode), replies, strict=True):
            text, calls = received(*json.loads(line))
            reply = turn.info["exchange"]["reply"]
            assert text.encode() == reply["content"].encode()
            made = reply.get("calls", [])
            assert calls == [[name, json.loads(given)] for name, _, given in made]
            sampled = tokenizer.decode(list(turn.completion.token_ids), skip_special_tokens=False)
            if not made:
                assert sampled.encode().startswith(text.encode())
                assert sampled[len(text) :] in ("", tokenizer.eos_token, *STOPS)
            for _, given in calls:
                assert all(str(each) in sampled for each in given.values())


@pytest.mark.parametrize("client", [each for each in CLIENTS if each not in REWRITE])
def test_its_conversation_is_one_trace(episodes, client):
    assert [len(each.sequences) for each in of_client(episodes, client)] == [1] * GROUP


def test_the_audit_is_clean(run):
    assert_honest(run)

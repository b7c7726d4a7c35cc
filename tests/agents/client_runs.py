"""A run in which clients from PyPI train a model, and what holds for each of their episodes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.agents.install import find_python
from tests.agents.pypi_agents import AGENTS, RECEIVED, VERIFIERS
from tests.runs import train_with
from tir_alp.config import Config
from tir_alp.envs.interop.libraries import folder_of
from tir_alp.models.resolve import resolve
from tir_alp.records.ledger_rows import update_record
from tir_alp.records.trajectories import from_record
from tir_alp.training.policy import load_tokenizer
from tir_alp.types import Trajectory, Turn

SCRIPT = Path(__file__).with_name("pypi_agents.py")
GROUP = 2
HOST = folder_of("verifiers") / "bin" / "python"
CLIENTS = [each for each in AGENTS if each not in VERIFIERS or HOST.exists()]
STOPS = ("\n```", "Observation:", "Calling tools:", "</code>")  # texts at which clients stop

Tasks = list[dict[str, Any]]


def tasks(seed: int, size: int, split: str) -> Tasks:
    """A task for each client; it is held out for none but the first."""
    asked = {"question": "What is 37*48+112?", "answer": "1888", "python": str(HOST)}
    names = CLIENTS if split == "train" else CLIENTS[:1]
    return [{"task_id": name, "client": name, **asked} for name in names]


def trained(folder: Path) -> Path:
    """Train the tiny model in one step by its clients; return the run folder."""
    values = {
        "name": "agents",
        "steps": 1,
        "model": {"path": "tiny-able"},
        "env": {
            "id": "tir_alp.envs:Agent-v0",
            "kwargs": {
                "command": [find_python(), "-E", str(SCRIPT)],
                "timeout_s": 400.0,
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


def episodes_of(run: Path, client: str) -> list[Trajectory]:
    """Return the episodes of a client in the first step."""
    lines = (run / "trajectories/step_000001.jsonl").read_text().splitlines()
    episodes = [from_record(json.loads(line)) for line in lines]
    found = [each for each in episodes if each.task_id == client]
    assert len(found) == GROUP
    return found


def assert_trained(run: Path, client: str) -> None:
    """Assert that the client's episodes ended by themselves, and that all traces were trained."""
    ledger = (run / "ledger/step_000001.jsonl").read_text().splitlines()
    updates = [each for each in map(json.loads, ledger) if each["kind"] == "update"]
    packed = [each for row in updates for each in update_record(row).sequences]
    trained = {each.uid for each in packed}
    for episode in episodes_of(run, client):
        assert _report(episode)["end"] == "exited", _report(episode)["errors"]
        assert any(any(each.loss_mask) for each in episode.sequences)
        assert {each.sequence_uid for each in episode.sequences} <= trained


def assert_received(run: Path, client: str) -> None:
    """Assert that the client got what was captured, byte for byte, and that it was sampled."""
    config = json.loads((run / "config.json").read_text())
    tokenizer = load_tokenizer(resolve(config["model"]["path"]))
    for episode in episodes_of(run, client):
        replies = _report(episode)["files"][RECEIVED].splitlines()
        assert len(replies) == len(_turns(episode)) > 0
        for turn, line in zip(_turns(episode), replies, strict=True):
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


def _report(episode: Trajectory) -> dict[str, Any]:
    return json.loads(episode.turns[-1].info["report"])


def _turns(episode: Trajectory) -> list[Turn]:
    """Return the turns of all traces, in the order in which they ended."""
    found = [turn for each in episode.sequences for turn in each.turns]
    return sorted(found, key=lambda turn: turn.info["exchange"]["number"])


# --------------------------------------------------------------------------- what a client received


def received(path: str, body: str) -> tuple[str, list[Any]]:
    """Return the text and the calls of a reply, as the client got it."""
    if body.startswith(("data:", "event:")):
        return _STREAMED[path.rpartition("/v1/")[2]]([*_events(body)])
    reply = json.loads(body)
    if path.endswith("/messages"):
        parts = reply["content"]
        text = "".join(each["text"] for each in parts if each["type"] == "text")
        calls = [[each["id"], each["input"]] for each in parts if each["type"] == "tool_use"]
    elif path.endswith("/responses"):
        parts = reply["output"]
        said = [part for each in parts if each["type"] == "message" for part in each["content"]]
        text = "".join(each["text"] for each in said)
        called = [each for each in parts if each["type"] == "function_call"]
        calls = [[each["call_id"], json.loads(each["arguments"])] for each in called]
    elif path.endswith("/chat/completions"):
        message = reply["choices"][0]["message"]
        text, called = message["content"] or "", message.get("tool_calls") or []
        calls = [[each["id"], json.loads(each["function"]["arguments"])] for each in called]
    else:
        text, calls = reply["choices"][0]["text"], []
    return text, calls


def _events(body: str) -> Iterator[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in body.split("\n") if line.startswith("data: ")]
    for line in lines:
        if line != "[DONE]":
            yield json.loads(line)


def _chat(events: list[dict[str, Any]]) -> tuple[str, list[Any]]:
    deltas = [each["delta"] for event in events for each in event["choices"]]
    text = "".join(each.get("content") or "" for each in deltas)
    parts = [part for each in deltas for part in each.get("tool_calls") or ()]
    arguments = "".join(each["function"]["arguments"] for each in parts)
    return text, [[parts[0]["id"], json.loads(arguments)]] if parts else []


def _responses(events: list[dict[str, Any]]) -> tuple[str, list[Any]]:
    def joined(kind: str, item: str) -> str:
        kind = f"response.{kind}.delta"
        found = [each for each in events if each["type"] == kind and each["item_id"] == item]
        return "".join(each["delta"] for each in found)

    text, calls = "", []
    for event in events:
        if event["type"] == "response.output_item.added":
            item = event["item"]
            if item["type"] == "message":
                text += joined("output_text", item["id"])
            else:
                arguments = joined("function_call_arguments", item["id"])
                calls.append([item["call_id"], json.loads(arguments)])
    return text, calls


def _messages(events: list[dict[str, Any]]) -> tuple[str, list[Any]]:
    def joined(index: int, field: str) -> str:
        kind = "content_block_delta"
        found = [each for each in events if each["type"] == kind and each["index"] == index]
        return "".join(each["delta"][field] for each in found)

    text, calls = "", []
    for event in events:
        if event["type"] == "content_block_start":
            block = event["content_block"]
            if block["type"] == "text":
                text += joined(event["index"], "text")
            else:
                calls.append([block["id"], json.loads(joined(event["index"], "partial_json"))])
    return text, calls


_STREAMED = {"chat/completions": _chat, "responses": _responses, "messages": _messages}

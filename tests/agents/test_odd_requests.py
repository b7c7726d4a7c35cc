"""Fuzz: no request of valid JSON, however odd its fields, is an error of the server's."""

import asyncio
import copy
import json
import random
from typing import Any

import pytest

pytest.importorskip("openai")

from aiohttp import ClientSession

from tests.agents.served import gateway
from tests.agents.templates import TOOL, Scripted
from tir_alp.agents.gateway import APIS
from tir_alp.agents.session import Session, SessionSettings

FUNCTION = TOOL["function"]
CALL = {"name": "python", "arguments": '{"code": "1"}'}
SCHEMA = FUNCTION["parameters"]
VALID: dict[str, dict[str, Any]] = {
    "chat/completions": {
        "model": "m",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "1?"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "type": "function", "function": CALL}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "1"},
        ],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "python"}},
        "stop": ["x"],
        "n": 2,
        "max_tokens": 9,
        "stream_options": {"include_usage": True},
        "logit_bias": {},
    },
    "completions": {"model": "m", "prompt": "1?", "stop": ["x"], "n": 2, "max_tokens": 9},
    "responses": {
        "model": "m",
        "instructions": "s",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "1?"}]},
            {"type": "function_call", "call_id": "c", **CALL},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        ],
        "tools": [{"type": "function", "name": "python", "parameters": SCHEMA}],
        "tool_choice": {"type": "function", "name": "python"},
        "text": {"format": {"type": "text"}},
        "max_output_tokens": 9,
    },
    "messages": {
        "model": "m",
        "max_tokens": 9,
        "system": [{"type": "text", "text": "s"}],
        "messages": [
            {"role": "user", "content": "1?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "tool_use", "id": "c", "name": "python", "input": {"code": "1"}}
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "c", "content": "1"}],
            },
        ],
        "tools": [{"name": "python", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "python"},
        "stop_sequences": ["x"],
    },
}
ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 3, 1e308, 2**70, "", "x", "\ud800", "auto", [], {}, [[]], [None], [{}]),
    *(
        {"type": None},
        {"type": "text"},
        {"type": []},
        {"name": 3},
        {"function": 3},
        {"x": {"y": []}},
    ),
)
NUM_MUTATIONS = 150


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return where a value has values."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    found = []
    for key in keys:
        found.append((*path, key))
        if isinstance(value[key], dict | list):
            found += places(value[key], (*path, key))
    return found


def mutated(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a body with one or two of its values replaced or left out."""
    made = copy.deepcopy(body)
    for _ in range(rng.randint(1, 2)):
        *above, last = rng.choice(places(made))
        holder = made
        for key in above:
            holder = holder[key]
        if rng.random() < 0.15:
            del holder[last]
        else:
            holder[last] = copy.deepcopy(rng.choice(ODD))
        if not made:
            return made
    return made


def test_every_api_is_tried():
    assert VALID.keys() == APIS.keys()


@pytest.mark.parametrize("calls", ["template", "fenced"])
@pytest.mark.parametrize("path", VALID)
def test_odd_fields_are_refused_or_answered(path, calls):
    rng = random.Random(f"{path} {calls}")
    settings = SessionSettings(max_context_tokens=2000, max_turn_tokens=50)
    statuses: list[int] = []

    async def main():
        async with gateway(calls=calls) as (made, encodes), ClientSession() as http:
            for _ in range(NUM_MUTATIONS):
                session = Session(Scripted("hi").generate, encodes, settings)
                endpoint = made.open(session)
                body = mutated(rng, VALID[path])
                headers = {"Authorization": f"Bearer {endpoint.key}"}
                url = f"{endpoint.openai_url}/{path}"
                async with http.post(url, data=json.dumps(body), headers=headers) as reply:
                    text = await reply.text()
                    assert reply.status in (200, 400), (reply.status, body, text)
                    if reply.status == 400:
                        assert json.loads(text)["error"]["message"], (body, text)
                    statuses.append(reply.status)
                assert session.failures == [] and not session.capture.busy
                await made.end(endpoint)

    asyncio.run(main())
    assert {200, 400} == {*statuses}

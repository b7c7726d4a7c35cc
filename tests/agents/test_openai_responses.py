"""The official OpenAI client and its newer API against the gateway, unchanged."""

import json

import pytest

from tests.agents.templates import Scripted
from tests.agents.test_openai_chat import CALL, played

openai = pytest.importorskip("openai")

TOOL = {
    "type": "function",
    "name": "python",
    "description": "Runs Python.",
    "parameters": {
        "type": "object",
        "properties": {"code": {"type": "string"}},
        "required": ["code"],
    },
    "strict": False,
}
BASE = {"model": "m", "instructions": "s"}


def test_a_loop_with_a_tool_is_one_trace():
    engine = Scripted("Let me see: " + CALL + CALL, "It is 1.")

    async def talk(made):
        items = [{"role": "user", "content": "1?"}]
        reply = await made.responses.create(**BASE, input=items, tools=[TOOL])
        words, one, other = reply.output
        assert reply.output_text == "Let me see: " and words.role == "assistant"
        assert json.loads(one.arguments) == {"code": "print(1)"} and one.call_id != other.call_id
        items += [each.model_dump(exclude_unset=True) for each in reply.output]
        for each in (one, other):
            items.append({"type": "function_call_output", "call_id": each.call_id, "output": "1\n"})
        reply = await made.responses.create(**BASE, input=items, tools=[TOOL])
        assert reply.output_text == "It is 1." and reply.status == "completed"
        assert reply.usage.output_tokens == 9

    (trace,) = played(engine, talk).traces
    first, second = (ids for ids, _ in engine.calls)
    sampled = trace.exchanges[0].completion.token_ids
    assert second[: len(first) + len(sampled)] == first + sampled


def test_streams_say_the_same_as_replies():
    words = "Ünï " * 40

    async def talk(made):
        deltas = []
        async with made.responses.stream(model="m", input="1?", tools=[TOOL]) as stream:
            async for each in stream:
                if each.type == "response.output_text.delta":
                    deltas.append(each.delta)
            final = await stream.get_final_response()
        assert "".join(deltas) == words == final.output_text
        assert json.loads(final.output[1].arguments) == {"code": "print(1)"}

    played(Scripted(words + CALL), talk)


def test_a_cut_reply_is_incomplete():
    async def talk(made):
        reply = await made.responses.create(model="m", input="1?", max_output_tokens=2)
        assert reply.status == "incomplete" and reply.output_text == "so"
        assert reply.incomplete_details.reason == "max_output_tokens"

    played(Scripted("so it is"), talk)


@pytest.mark.parametrize(
    "changed",
    [
        {"previous_response_id": "resp_1"},
        {"text": {"format": {"type": "json_object"}}},
        {"tools": [{"type": "web_search"}]},
        {"tool_choice": "required"},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        {"input": [{"role": "assistant", "content": "x"}]},
        {"input": "x" * 500},
    ],
)
def test_what_cannot_be_done_is_refused(changed):
    async def talk(made):
        with pytest.raises(openai.BadRequestError):
            await made.responses.create(**{"model": "m", "input": "1?"} | changed)

    assert not played(Scripted("x"), talk, max_context_tokens=256).num_exchanges

"""The official Anthropic client against the gateway, unchanged."""

import asyncio

import pytest

from tests.agents.served import serve
from tests.agents.templates import Scripted

pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

CALL = '<tool_call>\n{"name": "python", "arguments": {"code": "print(1)"}}\n</tool_call>'
TOOL = {
    "name": "python",
    "description": "Runs Python.",
    "input_schema": {
        "type": "object",
        "properties": {"code": {"type": "string"}},
        "required": ["code"],
    },
}
ASK = [{"role": "user", "content": "1?"}]
BASE = {"model": "m", "max_tokens": 200}


def played(engine, talk, **how):
    async def main():
        async with serve(engine, **how) as endpoint:
            async with anthropic.AsyncAnthropic(
                base_url=endpoint.url, api_key=endpoint.key, max_retries=0
            ) as made:
                await talk(made)
            return await endpoint.session.close()

    return asyncio.run(main())


def test_a_loop_with_a_tool_is_one_trace():
    engine = Scripted("Let me see: " + CALL, "It is 1.")

    async def talk(made):
        messages = [*ASK]
        reply = await made.messages.create(**BASE, messages=messages, system="s", tools=[TOOL])
        assert reply.stop_reason == "tool_use"
        words, call = reply.content
        assert words.text == "Let me see: " and call.input == {"code": "print(1)"}
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "1\n"}
        messages += [
            {"role": "assistant", "content": reply.content},
            {"role": "user", "content": [result]},
        ]
        reply = await made.messages.create(**BASE, messages=messages, system="s", tools=[TOOL])
        assert reply.content[0].text == "It is 1." and reply.stop_reason == "end_turn"
        assert reply.usage.output_tokens == 9

    capture = played(engine, talk)
    (trace,) = capture.traces
    first, second = (ids for ids, _ in engine.calls)
    sampled = trace.exchanges[0].completion.token_ids
    assert second[: len(first) + len(sampled)] == first + sampled
    text = engine.tokenizer.decode(list(second))
    assert text.endswith("</tool_call><|end|><|tool|>1\n<|end|><|assistant|>")
    assert text.count("<|system|>s<|end|>") == 1


def test_streams_say_the_same_as_replies():
    words = "Ünï " * 40

    async def talk(made):
        async with made.messages.stream(
            **BASE | {"max_tokens": 400}, messages=ASK, tools=[TOOL]
        ) as stream:
            text = "".join([each async for each in stream.text_stream])
            message = await stream.get_final_message()
        assert text == words == message.content[0].text
        assert message.content[1].input == {"code": "print(1)"}
        assert message.stop_reason == "tool_use" and message.usage.output_tokens > 160

    played(Scripted(words + CALL), talk, max_turn_tokens=400)


def test_stop_sequences_limits_and_choices():
    async def talk(made):
        reply = await made.messages.create(**BASE, messages=ASK, stop_sequences=["STOP"])
        assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", "STOP")
        assert reply.content[0].text == "so "
        reply = await made.messages.create(**BASE | {"max_tokens": 2}, messages=ASK)
        assert reply.stop_reason == "max_tokens" and reply.content[0].text == "so"

    played(Scripted("so STOP x"), talk)

    async def forced(made):
        reply = await made.messages.create(
            **BASE, messages=ASK, tools=[TOOL], tool_choice={"type": "tool", "name": "python"}
        )
        assert reply.content[0].input == {"code": "2"}

    played(Scripted(' {"code": "2"}}\n</tool_call>'), forced)


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aaaa"}}


@pytest.mark.parametrize(
    "changed",
    [
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        {"messages": [*ASK, {"role": "assistant", "content": "So"}]},
        {"messages": [{"role": "user", "content": "x" * 500}]},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"extra_body": {"top_k": 5}},
        {"tool_choice": {"type": "any"}},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
    ],
)
def test_what_cannot_be_done_is_refused_in_anthropics_form(changed):
    async def talk(made):
        with pytest.raises(anthropic.BadRequestError) as caught:
            await made.messages.create(**{**BASE, "messages": ASK} | changed)
        body = caught.value.body
        assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
        assert len(body["error"]["message"]) > 20

    capture = played(Scripted("x"), talk, max_context_tokens=256)
    assert not capture.num_exchanges


def test_a_wrong_key_is_refused_in_anthropics_form():
    async def main():
        async with (
            serve(Scripted("x")) as endpoint,
            anthropic.AsyncAnthropic(
                base_url=endpoint.url, api_key="sk-wrong", max_retries=0
            ) as made,
        ):
            with pytest.raises(anthropic.AuthenticationError):
                await made.messages.create(**BASE, messages=ASK)

    asyncio.run(main())

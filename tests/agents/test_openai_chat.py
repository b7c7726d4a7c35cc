"""The official OpenAI client against the gateway, unchanged."""

import asyncio
import json

import pytest

from tests.agents.served import gateway, serve
from tests.agents.templates import TOOL, Scripted
from tir_alp.agents.session import Session, SessionSettings
from tir_alp.types import StopReason

openai = pytest.importorskip("openai")

CALL = '<tool_call>\n{"name": "python", "arguments": {"code": "print(1)"}}\n</tool_call>'
ASK = [{"role": "user", "content": "1?"}]


def client(endpoint, **how):
    return openai.AsyncOpenAI(
        base_url=endpoint.openai_url, api_key=endpoint.key, **({"max_retries": 0} | how)
    )


def played(engine, talk, **how):
    """Run a conversation; return the capture."""

    async def main():
        async with serve(engine, **how) as endpoint:
            async with client(endpoint) as made:
                await talk(made)
            return await endpoint.session.close()

    return asyncio.run(main())


def texts(engine):
    return [engine.tokenizer.decode(list(ids)) for ids, _ in engine.calls]


def test_a_reply_is_what_was_sampled():
    engine = Scripted("hello")

    async def talk(made):
        reply = await made.chat.completions.create(model="tiny", messages=ASK)
        assert reply.choices[0].message.content == "hello"
        assert reply.choices[0].finish_reason == "stop"
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (5, 6)

    capture = played(engine, talk)
    (exchange,) = capture.traces[0].exchanges
    assert exchange.completion.stop_reason is StopReason.EOS
    assert engine.tokenizer.decode(list(exchange.completion.token_ids)) == "hello<|end|>"


def test_a_loop_with_a_tool_is_one_trace_that_is_never_encoded_again():
    engine = Scripted("Let me see: " + CALL, "It is 1.")

    async def talk(made):
        messages = [*ASK]
        reply = await made.chat.completions.create(model="m", messages=messages, tools=[TOOL])
        message = reply.choices[0].message
        assert message.content == "Let me see: "
        assert reply.choices[0].finish_reason == "tool_calls"
        (call,) = message.tool_calls
        assert json.loads(call.function.arguments) == {"code": "print(1)"}
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "1\n"}]
        reply = await made.chat.completions.create(model="m", messages=messages, tools=[TOOL])
        assert reply.choices[0].message.content == "It is 1."

    capture = played(engine, talk)
    (trace,) = capture.traces
    assert len(trace.exchanges) == 2
    first, second = engine.calls
    sampled = trace.exchanges[0].completion.token_ids
    assert second[0][: len(first[0]) + len(sampled)] == first[0] + sampled
    assert texts(engine)[1].endswith("</tool_call><|end|><|tool|>1\n<|end|><|assistant|>")


def test_several_calls_in_one_reply_and_one_if_asked():
    engine = Scripted(CALL + "\n" + CALL)

    async def talk(made):
        for parallel, number in ((True, 2), (False, 1)):
            reply = await made.chat.completions.create(
                model="m", messages=ASK, tools=[TOOL], parallel_tool_calls=parallel
            )
            message = reply.choices[0].message
            assert message.content is None
            assert len({each.id for each in message.tool_calls}) == number

    capture = played(engine, talk)
    assert [each.exchanges[0].completion.stop_reason for each in capture.traces] == [
        StopReason.EOS,
        StopReason.STOP,
    ]


def test_a_call_that_must_be_made_begins_the_reply_and_is_not_sampled():
    engine = Scripted(' {"code": "2"}}\n</tool_call>')

    async def talk(made):
        reply = await made.chat.completions.create(
            model="m",
            messages=ASK,
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "python"}},
        )
        (call,) = reply.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"code": "2"}

    capture = played(engine, talk)
    assert texts(engine)[0].endswith('<tool_call>\n{"name": "python", "arguments":')
    text = engine.tokenizer.decode(list(capture.traces[0].exchanges[0].completion.token_ids))
    assert text == ' {"code": "2"}}\n</tool_call><|end|>'


def test_a_call_that_cannot_be_read_stays_text():
    engine = Scripted("<tool_call>\n{nonsense}\n</tool_call>")

    async def talk(made):
        reply = await made.chat.completions.create(model="m", messages=ASK, tools=[TOOL])
        assert reply.choices[0].message.content == "<tool_call>\n{nonsense}\n</tool_call>"
        assert reply.choices[0].message.tool_calls is None

    played(engine, talk)


def test_streams_say_the_same_as_replies():
    words = "Ünï " * 40

    async def talk(made):
        stream = await made.chat.completions.create(
            model="m",
            messages=ASK,
            tools=[TOOL],
            stream=True,
            stream_options={"include_usage": True},
        )
        content, arguments, reasons, usage = "", "", [], None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                content += choice.delta.content or ""
                for call in choice.delta.tool_calls or ():
                    arguments += call.function.arguments or ""
                reasons.append(choice.finish_reason)
        assert content == words
        assert json.loads(arguments) == {"code": "print(1)"}
        assert [each for each in reasons if each] == ["tool_calls"]
        assert usage is not None and usage.completion_tokens > 0

    played(Scripted(words + CALL), talk)


def test_n_replies_are_traces_of_their_own_with_own_draws():
    engine = Scripted("a", "b", "c")

    async def talk(made):
        reply = await made.chat.completions.create(model="m", messages=ASK, n=3)
        assert [each.message.content for each in reply.choices] == ["a", "b", "c"]
        second = {"role": "assistant", "content": "b"}
        await made.chat.completions.create(model="m", messages=[*ASK, second, *ASK])

    capture = played(engine, talk, uid=7)
    assert [len(each.exchanges) for each in capture.traces] == [1, 2, 1]
    uids = [sampling.sequence_uid for _, sampling in engine.calls]
    assert len(set(uids)) == 3 and uids[0] == 7 and uids[3] == uids[1]


def test_a_stop_text_ends_the_reply_and_stays_in_the_trace():
    engine = Scripted("so 4 STOP and 5")

    async def talk(made):
        reply = await made.chat.completions.create(model="m", messages=ASK, stop=["STOP", "x"])
        assert reply.choices[0].message.content == "so 4 "
        assert reply.choices[0].finish_reason == "stop"

    (trace,) = played(engine, talk).traces
    ids = trace.exchanges[0].completion.token_ids
    assert engine.tokenizer.decode(list(ids)) == "so 4 STOP"
    assert len(trace.exchanges[0].completion.logprobs) == len(ids)


def test_limits_cut_a_reply():
    async def talk(made):
        reply = await made.chat.completions.create(model="m", messages=ASK, max_tokens=3)
        assert reply.choices[0].message.content == "hel"
        assert reply.choices[0].finish_reason == "length"

    played(Scripted("hello"), talk)


def test_logprobs_are_those_of_the_sampled_tokens():
    engine = Scripted("hi")

    async def talk(made):
        reply = await made.chat.completions.create(model="m", messages=ASK, logprobs=True)
        content = reply.choices[0].logprobs.content
        assert [each.token for each in content] == ["h", "i", "<|end|>"]
        assert [each.logprob for each in content] == pytest.approx([-0.001, -0.0011, -0.0012])

    played(engine, talk)


def test_the_run_decides_about_temperature_where_it_trains():
    engine = Scripted("hi")

    async def talk(made):
        await made.chat.completions.create(model="m", messages=ASK, temperature=0.3, seed=5)

    played(engine, talk, temperature=1.0, seed=11)
    played(engine, talk, seed=11)
    assert [(each.temperature, each.seed) for _, each in engine.calls] == [(1.0, 11), (0.3, 5)]


def test_an_edited_history_begins_a_new_trace_with_the_reason():
    engine = Scripted("hello")

    async def talk(made):
        first = {"role": "assistant", "content": "hello"}
        edited = {"role": "assistant", "content": "hellO"}
        for reply in (first, edited):
            messages = [*ASK, reply, {"role": "user", "content": "2?"}]
            await made.chat.completions.create(model="m", messages=messages[:1])
            await made.chat.completions.create(model="m", messages=messages)

    capture = played(engine, talk)
    assert [len(each.exchanges) for each in capture.traces] == [2, 1, 1]
    assert "message 1, a reply, was changed: the content differs from character 4" in (
        capture.traces[2].reason
    )
    assert capture.traces[2].parent is None


REFUSED = {
    "an image": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}],
            }
        ]
    },
    "a format": {"response_format": {"type": "json_object"}},
    "a penalty": {"frequency_penalty": 0.5},
    "top logprobs": {"logprobs": True, "top_logprobs": 3},
    "no messages": {"messages": []},
    "a reply to go on with": {"messages": [*ASK, {"role": "assistant", "content": "a"}]},
    "a choice of no tool": {"tool_choice": "required"},
    "an unknown field": {"extra_body": {"best_of": 3}},
    "a temperature": {"temperature": -1},
    "a length": {"max_tokens": 0},
    "a role": {"messages": [{"role": "robot", "content": "x"}]},
    "too long": {"messages": [{"role": "user", "content": "x" * 500}]},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused_with_the_reason(what):
    async def talk(made):
        with pytest.raises(openai.BadRequestError) as caught:
            await made.chat.completions.create(**{"model": "m", "messages": ASK} | REFUSED[what])
        assert caught.value.type == "invalid_request_error"
        assert caught.value.param or caught.value.code, caught.value
        if what == "an image":
            assert "reads text only" in str(caught.value)
        if what == "too long":
            assert caught.value.code == "context_length_exceeded"

    capture = played(Scripted("x"), talk, max_context_tokens=256)
    assert not capture.num_exchanges and not capture.busy


def test_a_wrong_key_and_an_ended_episode_are_refused():
    engine = Scripted("hi")

    async def main():
        async with gateway() as (made, encodes):
            one, other = (
                made.open(Session(engine.generate, encodes, SessionSettings())) for _ in range(2)
            )
            async with openai.AsyncOpenAI(
                base_url=one.openai_url, api_key=other.key, max_retries=0
            ) as wrong:
                with pytest.raises(openai.AuthenticationError):
                    await wrong.chat.completions.create(model="m", messages=ASK)
            await made.end(one)
            async with client(one) as late, client(other) as right:
                with pytest.raises(openai.AuthenticationError):
                    await late.chat.completions.create(model="m", messages=ASK)
                await right.chat.completions.create(model="m", messages=ASK)
                assert [each.id async for each in right.models.list()] == ["tiny"]
                with pytest.raises(openai.NotFoundError, match="there is no /v1/embeddings"):
                    await right.embeddings.create(model="m", input="x")
            assert [each.session.capture.num_exchanges for each in (one, other)] == [0, 1]

    asyncio.run(main())


def test_a_client_that_goes_away_frees_the_engine_and_its_place():
    engine = Scripted("hi", delay_s=30)

    async def main():
        async with serve(engine) as endpoint, client(endpoint) as made:
            with pytest.raises(openai.APITimeoutError):
                await made.chat.completions.create(model="m", messages=ASK, timeout=0.3)
            for _ in range(100):
                if engine.num_cancelled:
                    break
                await asyncio.sleep(0.02)
            assert engine.num_cancelled == 1 and not endpoint.session.capture.busy
            engine.delay_s = 0
            await made.chat.completions.create(model="m", messages=ASK)
            assert endpoint.session.capture.num_exchanges == 1

    asyncio.run(main())


def test_a_late_engine_is_an_error_that_the_episode_remembers():
    async def main():
        async with serve(Scripted("hi", delay_s=5), timeout_s=0.1) as endpoint:
            async with client(endpoint) as made:
                with pytest.raises(openai.InternalServerError, match="no completion within"):
                    await made.chat.completions.create(model="m", messages=ASK)
            assert endpoint.session.failures and not endpoint.session.capture.busy

    asyncio.run(main())


def test_a_flood_of_one_episode_is_refused_and_the_other_goes_on():
    slow, quick = Scripted("hi", delay_s=0.2), Scripted("hi")

    async def main():
        async with gateway() as (made, encodes):
            settings = SessionSettings(max_running=2, max_waiting=4)
            flooded = made.open(Session(slow.generate, encodes, settings))
            calm = made.open(Session(quick.generate, encodes, SessionSettings()))
            async with client(flooded) as many, client(calm) as one:

                def ask(each):
                    return each.chat.completions.create(model="m", messages=ASK)

                results = asyncio.gather(*(ask(many) for _ in range(40)), return_exceptions=True)
                await asyncio.wait_for(ask(one), 5)
                kinds = {type(each).__name__ for each in await results}
                assert kinds == {"ChatCompletion", "RateLimitError"}

    asyncio.run(main())


def test_a_body_that_is_too_large_or_no_json_is_refused():
    httpx = pytest.importorskip("httpx")

    async def main():
        async with serve(Scripted("hi")) as endpoint, httpx.AsyncClient() as raw:
            url = f"{endpoint.openai_url}/chat/completions"
            headers = {"Authorization": f"Bearer {endpoint.key}"}
            reply = await raw.post(url, content=b"x" * (17 << 20), headers=headers)
            assert reply.status_code == 413 and reply.json()["error"]["message"]
            reply = await raw.post(url, content=b"{", headers=headers)
            assert reply.status_code == 400 and "not JSON" in reply.json()["error"]["message"]
            ten_mb = {"model": "m", "messages": [{"role": "user", "content": "x" * (10 << 20)}]}
            reply = await raw.post(url, json=ten_mb, headers=headers)
            assert reply.json()["error"]["code"] == "context_length_exceeded"

    asyncio.run(main())

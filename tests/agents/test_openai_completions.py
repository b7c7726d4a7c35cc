"""`/v1/completions` with the official client: a text that goes on keeps its tokens."""

import asyncio
from typing import Any

import pytest

from tests.agents.served import serve
from tests.agents.templates import Scripted, encoder
from tests.agents.test_agent_audit import drifts, play
from tir_alp.agents.messages import Dialogue, Message, from_record, to_record
from tir_alp.records.trajectories import to_record as to_trajectory_record

openai = pytest.importorskip("openai")


def played(engine, talk, **how):
    """Run a conversation; return the capture."""

    async def main():
        async with serve(engine, **how) as endpoint:
            async with openai.AsyncOpenAI(
                base_url=endpoint.openai_url, api_key=endpoint.key, max_retries=0
            ) as made:
                await talk(made.completions)
            return await endpoint.session.close()

    return asyncio.run(main())


def text_of(engine, ids):
    return engine.tokenizer.decode(list(ids))


def test_a_text_that_goes_on_is_one_trace_and_nothing_sampled_is_encoded_again():
    engine = Scripted("x = 6*7\n```", " 42, so")
    prompt = "<|user|>6*7?<|end|><|assistant|>"

    async def talk(made):
        reply = await made.create(model="m", prompt=prompt, stop=["\n```"])
        assert reply.choices[0].text == "x = 6*7" and reply.choices[0].finish_reason == "stop"
        more = prompt + "x = 6*7\n```\noutput: 42\n"
        reply = await made.create(model="m", prompt=[more], n=2)
        assert [each.text for each in reply.choices] == [" 42, so"] * 2
        assert reply.usage.completion_tokens == 2 * len(engine.tokenizer.encode(" 42, so<|end|>"))
        await made.create(model="m", prompt=f"{more} 42, so<|end|> and then")

    first, second = played(engine, talk).traces
    assert [len(each.exchanges) for each in (first, second)] == [3, 1]
    assert second.parent == (0, 1) and second.inherited_ids == first.first(1).token_ids
    for number, (context, _) in enumerate([engine.calls[0], engine.calls[1], engine.calls[3]]):
        shown = first.first(number).token_ids + first.exchanges[number].shown
        assert context == shown
    whole = prompt + "x = 6*7\n```\noutput: 42\n 42, so<|end|> and then"
    assert text_of(engine, engine.calls[3][0]) == whole
    assert to_record(first.exchanges[0].reply)["ending"] == "\n```"
    assert from_record(to_record(first.exchanges[0].reply)) == first.exchanges[0].reply


@pytest.mark.parametrize("change", ["without its end mark", "another text"])
def test_a_text_that_was_changed_begins_a_new_trace(change):
    engine = Scripted("yes")

    async def talk(made):
        await made.create(model="m", prompt="so?")
        if change == "another text":
            await made.create(model="m", prompt="so?yeS<|end|>go on")
        else:
            await made.create(model="m", prompt="so?yes go on")

    first, second = played(engine, talk).traces
    assert second.parent is None and second.reason
    assert len(first.exchanges) == len(second.exchanges) == 1


def test_of_two_replies_with_the_same_text_the_one_with_the_same_end_goes_on():
    engine = Scripted("hi")

    async def talk(made):
        await made.create(model="m", prompt="P")
        engine.end = ""
        await made.create(model="m", prompt="P")
        await made.create(model="m", prompt="Phi there")

    assert [len(each.exchanges) for each in played(engine, talk).traces] == [1, 2]


def test_streams_and_logprobs():
    engine = Scripted("Ünï " * 40)

    async def talk(made):
        text, reasons = "", []
        usage: Any = None
        stream = await made.create(
            model="m", prompt="P", stream=True, stream_options={"include_usage": True}
        )
        async for chunk in stream:
            text += "".join(each.text for each in chunk.choices)
            reasons += [each.finish_reason for each in chunk.choices if each.finish_reason]
            usage = chunk.usage or usage
        assert text == "Ünï " * 40 and reasons == ["stop"] and usage.completion_tokens > 100
        engine.script = ["hi"]
        reply = await made.create(model="m", prompt="P", logprobs=0)
        found = reply.choices[0].logprobs
        assert found.tokens == ["h", "i", "<|end|>"] and found.text_offset == [0, 1, 2]
        assert found.token_logprobs == pytest.approx([-0.002, -0.0021, -0.0022])

    played(engine, talk, max_turn_tokens=400)


async def solve(task, variables):
    """Answer with a text of its own form, with a program between, and once with a retry."""
    async with openai.AsyncOpenAI(
        base_url=variables["OPENAI_BASE_URL"], api_key=variables["OPENAI_API_KEY"]
    ) as client:
        text = f"<|user|>{task['question']}<|end|><|assistant|>"
        for _ in range(2):
            reply = await client.completions.create(model="m", prompt=text, stop=["```"])
            text += reply.choices[0].text + "```\n42\n"
        await client.completions.create(model="m", prompt=text)
        return (await client.completions.create(model="m", prompt=text)).choices[0].text


def test_the_audit_accounts_for_texts_and_finds_what_was_changed():
    script = ("6*7```", "6*7 again```", "lost", "42")
    trajectory, attempt = play("all", f"{__name__}:solve", script)
    assert [len(each.turns) for each in trajectory.sequences] == [1, 3]
    assert trajectory.reward == 1.0
    record, ledger = to_trajectory_record(trajectory), attempt.to_record()
    assert drifts(record, ledger) == []
    exchange = record["branches"][0]["turns"][0]["info"]["exchange"]
    assert exchange["reply"]["ending"] == "```"
    for changed in ("", "``` "):
        exchange["reply"]["ending"] = changed
        assert drifts(record, ledger)
    exchange["reply"]["ending"] = "```"
    exchange["asked"][0]["content"] += " "
    assert drifts(record, ledger)


REFUSED = {
    "prompt": [{"prompt": [1, 2]}, {"prompt": ["a", "b"]}, {"prompt": ""}, {"prompt": []}],
    "echo": [{"echo": True}],
    "suffix": [{"suffix": "x"}],
    "logprobs": [{"logprobs": 2}],
    "best_of": [{"best_of": 3}],
    "frequency_penalty": [{"frequency_penalty": 1.0}],
    "messages": [{"extra_body": {"messages": []}}],
}


@pytest.mark.parametrize("param", REFUSED)
def test_what_cannot_be_done_is_refused_with_the_reason(param):
    async def talk(made):
        for body in REFUSED[param]:
            with pytest.raises(openai.BadRequestError) as caught:
                await made.create(**{"model": "m", "prompt": "P"} | body)
            assert caught.value.param == param

    assert not played(Scripted("x"), talk).traces


def test_the_first_token_of_a_models_texts_is_added_once():
    class Begins(type(encoder().tokenizer)):
        def encode(self, text, add_special_tokens=True, **how):
            ids = super().encode(text, add_special_tokens=False, **how)
            return [self.bos_token_id, *ids] if add_special_tokens else ids

    made = encoder()
    made.tokenizer.bos_token = "<|user|>"
    made.tokenizer.__class__ = Begins
    bos = made.tokenizer.bos_token_id
    for text in ("hi", "<|user|>hi"):
        ids = made.opening(Dialogue((Message("text", text),)))
        assert ids[0] == bos and ids.count(bos) == 1

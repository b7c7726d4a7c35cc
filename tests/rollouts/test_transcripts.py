"""Conversations are read from the forms of public data sets; a fault names row and message."""

import json

import pytest

from tir_alp.rollouts.transcripts import Message, read_transcript
from tir_alp.tools.calls import ToolCall

CALL = ToolCall("python", {"code": "print(1)"})
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def read(row):
    return read_transcript(row, "file:7")


def messages(*some):
    return read({"messages": list(some)}).messages


@pytest.mark.parametrize("arguments", [{"code": "print(1)"}, '{"code": "print(1)"}'])
def test_openai_s_form(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "python", "arguments": arguments}}
    found = read(
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                USER,
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "1"},
                ANSWER,
            ],
            "tools": [{"type": "function", "function": {"name": "python"}}],
        }
    )
    assert found.system == "be brief" and found.transcript_id == "file:7"
    assert found.messages == (
        Message("user", "q"),
        Message("assistant", "", CALL),
        Message("tool", "1"),
        Message("assistant", "a"),
    )
    assert found.tools[0]["function"] == {"name": "python"}


def test_sharegpt_s_form():
    call = json.dumps({"name": "python", "arguments": {"code": "print(1)"}})
    rows = [("human", "q"), ("gpt", "words"), ("function_call", call), ("observation", "1")]
    listed = [{"from": author, "value": text} for author, text in (*rows, ("gpt", "a"))]
    found = read({"system": "s", "conversations": listed, "tools": "[]"})
    assert found.system == "s" and found.tools == ()
    assert [each.role for each in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1] == Message("assistant", "words", CALL)


def test_prompt_and_completion_learn_the_completion_alone():
    assert read({"prompt": "q", "completion": "a"}).messages == (
        Message("user", "q"),
        Message("assistant", "a"),
    )
    found = read({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}).messages
    assert [each.trainable for each in found if each.role == "assistant"] == [False, True]


def test_pieces_weights_and_nulls_of_parquet():
    pieces = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = messages(USER, {"role": "assistant", "content": pieces, "weight": 0}, USER, ANSWER)
    assert found[1] == Message("assistant", "ab", trainable=False)
    call = {"name": "python", "arguments": {"code": "print(1)", "query": None}}
    assert messages(USER, {"role": "assistant", "tool_calls": [call]})[1].call == CALL


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "not an object"),
        ({"text": "x"}, r"no column 'messages' or 'conversations'; the row has 'text': set data"),
        ({"messages": []}, "'messages' must be a list of messages that is not empty"),
        ({"messages": "[1"}, "'messages' is a text that is not JSON"),
        ({"messages": [USER, 3]}, "message 2: must be an object, not 3"),
        ({"messages": [USER, {"role": "judge", "content": ""}]}, "message 2: there is no role 'ju"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "must be a text, not 3"),
        ({"messages": [USER]}, "ends with the assistant, not with 'user'"),
        ({"messages": [ANSWER]}, "begins with a user"),
        ({"messages": [USER, USER, ANSWER]}, "message 2 is of 'user', right after one of 'user'"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "all have weight 0"),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "'weight' must be 0 or 1, not 0.5"),
        ({"messages": [USER, ANSWER | {"tool_calls": [1, 2]}]}, "makes 2 calls"),
        ({"messages": [USER, ANSWER | {"tool_calls": [1]}]}, 'a call is {"name"'),
        (
            {"messages": [USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "the arguments of 'f' must be JSON",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
            "only text can be learnt, and a piece of the content is 'image_url'",
        ),
        ({"conversations": [{"from": "cat", "value": "x"}]}, "there is no author 'cat'"),
        ({"prompt": "q", "completion": 3}, "must both be texts or lists"),
        ({"messages": [USER, ANSWER], "tools": 3}, "'tools' must be a list of JSON schemas"),
    ],
)
def test_a_broken_row_is_named(row, reason):
    with pytest.raises(ValueError, match=f"^file:7: .*{reason}"):
        read(row)

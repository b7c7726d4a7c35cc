"""A conversation becomes the trajectory that a rollout would have made of it."""

import pytest
from tokenizers import AddedToken

from tests.rollouts.call_templates import DROPS_THOUGHTS
from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.rollouts.demonstration import Demonstrator
from tir_alp.rollouts.renderer import Renderer
from tir_alp.rollouts.transcripts import Message, Transcript
from tir_alp.tools.calls import ToolCall
from tir_alp.types import StopReason, trace_uid

TOKENIZER = make_tokenizer()
CALL = ToolCall("python", {"code": "print(6*7)"})
EPISODE = (
    Message("user", "What is 6*7?"),
    Message("assistant", "I compute.", CALL),
    Message("tool", "42"),
    Message("assistant", r"\boxed{42}"),
)
HERMES_TEMPLATE = """\
{%- for m in messages %}
{{- '<|' + m.role + '|>' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}
{{- '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}
{%- endfor %}
{{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
{%- if tools %}{# shown elsewhere #}{% endif %}"""


def encode(*messages, tokenizer=TOKENIZER, **settings):
    def renderer(system, tools):
        shown = {"tools": tools} if tools else {}
        return Renderer(tokenizer, system=system, **settings, **shown)

    return Demonstrator(renderer).trajectory(Transcript("row", "", messages), uid=5)


def learnt(trajectory, tokenizer=TOKENIZER):
    pairs = zip(trajectory.token_ids, trajectory.loss_mask, strict=True)
    return tokenizer.decode([token for token, bit in pairs if bit])


def test_the_tokens_are_those_of_the_whole_conversation_and_the_assistant_s_are_learnt():
    found = encode(*EPISODE)
    call = "I compute.\n```python\nprint(6*7)\n```"
    whole = TOKENIZER.apply_chat_template(
        [
            {"role": "user", "content": "What is 6*7?"},
            {"role": "assistant", "content": call},
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": r"\boxed{42}"},
        ],
        tokenize=True,
        return_dict=False,
    )
    assert list(found.token_ids) == whole
    assert learnt(found) == call + r"\boxed{42}<|end|>"
    assert set(found.rollout_logprobs) == {0.0}
    assert [turn.stop_reason for turn in found.turns] == [StopReason.STOP, StopReason.EOS]
    assert (found.sequence_uid, found.group_id, found.task_id) == (5, 5, "row")


def test_a_call_in_fences_may_be_part_of_the_text():
    text = "I compute.\n```python\nprint(6*7)\n```"
    assert encode(EPISODE[0], Message("assistant", text), *EPISODE[2:]) == encode(*EPISODE)


def test_a_second_message_of_the_user_follows_the_end_mark():
    found = encode(*EPISODE, Message("user", "thanks"), Message("assistant", "ok"))
    assert TOKENIZER.decode(found.token_ids).endswith(
        r"\boxed{42}<|end|><|user|>thanks<|end|><|assistant|>ok<|end|>"
    )
    assert learnt(found).endswith(r"\boxed{42}<|end|>ok<|end|>")


def test_a_message_with_weight_0_is_read_and_not_learnt():
    silent = Message("assistant", "I compute.", CALL, trainable=False)
    found = encode(EPISODE[0], silent, *EPISODE[2:])
    assert found.token_ids == encode(*EPISODE).token_ids
    assert learnt(found) == r"\boxed{42}<|end|>"


def test_a_special_token_in_a_text_stays_text():
    found = encode(Message("user", "<|end|>"), Message("assistant", "say <|end|> twice"))
    end = TOKENIZER.convert_tokens_to_ids("<|end|>")
    assert found.token_ids.count(end) == 2  # the user's turn and the assistant's
    assert learnt(found) == "say <|end|> twice<|end|>"


def test_a_native_call_is_written_as_the_template_writes_it():
    tokenizer = make_tokenizer()
    marks = [AddedToken(each, special=False) for each in ("<tool_call>", "</tool_call>")]
    tokenizer.add_tokens(marks)
    tokenizer.chat_template = HERMES_TEMPLATE
    found = encode(*EPISODE, tokenizer=tokenizer, call_format="tool_call")
    opening, closing = tokenizer.convert_tokens_to_ids(["<tool_call>", "</tool_call>"])
    completion = found.turns[0].completion.token_ids
    assert completion.count(opening) == 1 and completion[-1] == closing
    assert tokenizer.decode(completion) == (
        'I compute.\n<tool_call>\n{"name": "python", "arguments": {"code": "print(6*7)"}}\n'
        "</tool_call>"
    )


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (
            (EPISODE[0], Message("assistant", "no call"), *EPISODE[2:]),
            "turn 1 of the assistant: a tool's output follows, but the turn has no complete call",
        ),
        (
            (EPISODE[0], Message("assistant", "```python\n1\n```\nIt is 1"), *EPISODE[2:]),
            "turn 1 of the assistant: there is text after the call, which no rollout has: 'It is",
        ),
        (
            (EPISODE[0], Message("assistant", "", ToolCall("search", {"q": "x"})), *EPISODE[2:]),
            "a call of 'search' .* cannot be written in the format 'fenced'",
        ),
    ],
)
def test_what_no_rollout_could_have_been_is_refused_by_row_and_turn(messages, reason):
    with pytest.raises(ValueError, match=f"row: .*{reason}"):
        encode(*messages)


def test_a_thought_that_the_template_drops_is_learnt_where_it_was_written():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DROPS_THOUGHTS
    thought = "<think>\nHm.\n</think>\n\n"
    messages = (
        Message("user", "6*7?"),
        Message("assistant", f"{thought}42"),
        Message("user", "Sure?"),
        Message("assistant", f"{thought}Yes", trainable=False),
        Message("user", "Why?"),
        Message("assistant", "So."),
        Message("user", "So?"),
        Message("assistant", "Yes."),
    )
    found = encode(*messages, tokenizer=tokenizer, rewritten_history="fork")
    texts = [tokenizer.decode(list(each.token_ids)) for each in found.conversation]
    first = "<|user|>6*7?<|end|><|assistant|>"
    second = f"{first}42<|end|><|user|>Sure?<|end|><|assistant|>"
    third = f"{second}Yes<|end|><|user|>Why?<|end|><|assistant|>"
    assert texts == [
        f"{first}{thought}42<|end|>",
        f"{second}{thought}Yes<|end|>",
        f"{third}So.<|end|><|user|>So?<|end|><|assistant|>Yes.<|end|>",
    ]
    assert [any(each.loss_mask) for each in found.conversation] == [True, False, True]
    assert [each.sequence_uid for each in found.conversation] == [trace_uid(5, n) for n in range(3)]
    appended = encode(*messages, tokenizer=tokenizer, rewritten_history="append")
    assert not appended.branches and len(appended.turns) == 4

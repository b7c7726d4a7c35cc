"""Where the history is rewritten, a new trace begins with what the policy reads then."""

import dataclasses
import os
from pathlib import Path

import pytest

from tests.fuzz.templates import tokenizer_for
from tests.rollouts.call_templates import DROPS_THOUGHTS
from tests.rollouts.forked import ANSWERS, SUMMARY, WORDS, Speaker, Talk, play, renderer, tokenizer
from tests.rollouts.test_chat_template import DROPS_OLD_THINKING, DROPS_THINKING, HERMES_LIKE, TOOLS
from tir_alp.rollouts.chat_template import CALL_ID, ChatTemplate
from tir_alp.rollouts.episode import EpisodeFailed
from tir_alp.rollouts.history import Conversation
from tir_alp.rollouts.renderer import Renderer
from tir_alp.types import StopReason, trace_uid

USER, ASSISTANT = "user", "assistant"
FOLDER = os.environ.get("TIR_ALP_TEMPLATES", "")


def said(role, content):
    return {"role": role, "content": content}


def rendered(*messages, template=DROPS_THOUGHTS):
    return ChatTemplate(tokenizer(template)).render(messages, generation=True)


def text_of(ids):
    return tokenizer().decode(list(ids))


def encoded(text):
    return tuple(tokenizer().encode(text, add_special_tokens=False))


# ---------------------------------------------------------------------- one episode, literally


def test_each_turn_is_sampled_after_what_the_template_renders_for_it():
    speaker = Speaker(*WORDS)
    trajectory, _ = play(speaker)
    task = said(USER, "6*7?")
    first = [task, said(ASSISTANT, WORDS[0]), said(USER, "Why?")]
    second = [*first, said(ASSISTANT, WORDS[1]), {"role": "tool", "content": "41"}]
    third = [*second, said(ASSISTANT, WORDS[2]), said(USER, "Sure <_end|>?")]
    due = [rendered(*each) for each in ([task], first, second, third, SUMMARY)]
    due[3] = due[3].replace("<_end|>", "<|end|>")  # what the user typed
    assert [text_of(each) for each in speaker.read] == due
    (mark,) = encoded("<|end|>")
    for number, (ids, text) in enumerate(zip(speaker.read, due, strict=True)):
        assert number == 3 or ids == encoded(text)
        assert ids.count(mark) == text.count("<|end|>") - (number == 3)  # it is no mark

    traces = trajectory.conversation
    assert [len(each.turns) for each in traces] == [1, 2, 1, 1]
    assert trajectory.is_forked and not any(each.is_forked for each in trajectory.branches)
    assert [each.sequence_uid for each in traces] == [trace_uid(5, number) for number in range(4)]
    assert [each.sequence_uid for each in speaker.samplings] == [
        trace_uid(5, number) for number in (0, 1, 1, 2, 3)
    ]
    assert trajectory.reward == 1.25 and trajectory.terminated
    words = [text_of(turn.completion.token_ids) for turn in trajectory.conversation_turns]
    assert words == [each if each.endswith("```") else f"{each}<|end|>" for each in WORDS]
    contexts = []
    for trace in traces:
        ids = trace.prompt.token_ids
        for turn in trace.turns:
            contexts.append(ids)
            ids += turn.completion.token_ids + turn.observation.token_ids
    assert contexts == speaker.read


def test_every_sampled_token_is_trained_once_and_nothing_else():
    trajectory, attempt = play(Speaker(*WORDS))
    trained = sum(sum(each.loss_mask) for each in trajectory.sequences)
    # The end mark that the engine sampled after the call is cut off.
    assert trained == sum(len(each.completion.token_ids) for each in attempt.calls) - 1


def test_a_template_that_only_appends_makes_one_trace():
    answers = [("41", 0.0, {}), ("42", 0.0, {}), ("", 1.0, {})]
    trajectory, _ = play(Speaker(*WORDS), Talk(answers), renderer(HERMES_LIKE))
    assert trajectory.branches == () and not trajectory.is_forked
    assert len(trajectory.turns) == 3


@pytest.mark.parametrize("template", [DROPS_OLD_THINKING, DROPS_THINKING])
def test_thoughts_that_are_dropped_after_an_output_begin_a_trace(template):
    answers = [("41", 0.0, {}), ("42", 0.0, {}), ("", 1.0, {})]
    words = ["<think>a</think>It", "is", "<think>b</think>42"]
    speaker = Speaker(*words)
    trajectory, _ = play(speaker, Talk(answers), renderer(template))
    assert [len(each.turns) for each in trajectory.conversation] == [1, 2]
    messages = [said(USER, "6*7?"), said(ASSISTANT, words[0]), {"role": "tool", "content": "41"}]
    assert text_of(speaker.read[1]) == rendered(*messages, template=template)
    messages += [said(ASSISTANT, words[1]), {"role": "tool", "content": "42"}]
    assert text_of(speaker.read[2]) == rendered(*messages, template=template)


def test_append_and_refuse():
    answers = [("Why?", 0.0, {"role": "user"}), ("", 1.0, {})]
    trajectory, _ = play(Speaker(*WORDS), Talk(answers), renderer(rewritten_history="append"))
    assert not trajectory.branches and len(trajectory.turns) == 2
    with pytest.raises(EpisodeFailed, match=r'model\.rewritten_history = "fork"'):
        play(Speaker(*WORDS), Talk(answers), renderer(rewritten_history="refuse"))
    summed = [("", 0.0, {"messages": SUMMARY}), ("", 1.0, {})]
    trajectory, _ = play(Speaker(*WORDS), Talk(summed), renderer(rewritten_history="refuse"))
    assert len(trajectory.branches) == 1


# ----------------------------------------------------------------------------------- limits, masks


def test_the_limit_of_the_context_is_that_of_each_trace():
    speaker = Speaker(*["x" * 60] * 5)
    summed = [("", 0.0, {"messages": [said(USER, "Go on.")]})] * 4 + [("", 1.0, {})]
    trajectory, _ = play(speaker, Talk(summed), max_context_tokens=80)
    assert len(trajectory.conversation) == 5 and not trajectory.truncated
    long = [("", 0.0, {"messages": [said(USER, "y" * 80)]}), ("", 1.0, {})]
    trajectory, _ = play(Speaker("x", "x"), Talk(long), max_context_tokens=80)
    assert trajectory.truncated and len(trajectory.turns) == 1 and not trajectory.branches


def test_what_is_left_out_of_the_loss_is_decided_for_the_episode():
    void = [(text, reward, {**info, "void": True}) for text, reward, info in ANSWERS[:1]]
    env = Talk([*void, *ANSWERS[1:]])
    trajectory, _ = play(Speaker(*WORDS), env, void_turns="mask_trajectory")
    assert not any(any(each.loss_mask) for each in trajectory.sequences)
    trajectory, _ = play(Speaker(*WORDS), env, void_turns="mask_turn")
    assert [any(each.loss_mask) for each in trajectory.conversation] == [False, True, True, True]
    trajectory, _ = play(Speaker(*WORDS), trace_credit="last")
    assert [any(each.loss_mask) for each in trajectory.conversation] == [False, False, False, True]


def test_a_cut_completion_makes_the_whole_episode_overlong():
    words = ["x" * 300, *WORDS[1:]]
    trajectory, _ = play(Speaker(*words), overlong="mask_trajectory")
    assert trajectory.is_overlong and not trajectory.turns[0].is_cut
    assert not any(any(each.loss_mask) for each in trajectory.sequences)


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({"role": "system"}, r"info\['role'\] is 'system'"),
        ({"messages": []}, "no list of messages"),
        ({"messages": [said("tool", "a")]}, "'user' or 'assistant'"),
        ({"messages": [said(USER, 3)]}, "no text"),
        ({"messages": [said(USER, "a"), said(ASSISTANT, "b")]}, "ends with a message of the user"),
        ({"messages": [{**said(USER, "a"), "name": "n"}]}, "and nothing else"),
    ],
)
def test_what_is_no_message_fails_the_episode_and_says_why(info, reason):
    with pytest.raises(EpisodeFailed, match=reason):
        play(Speaker(*WORDS), Talk([("a", 0.0, info), ("", 1.0, {})]))


# ------------------------------------------------------------------------------- native calls


def test_a_native_call_stays_as_it_was_written():
    native = HERMES_LIKE.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    made = renderer(native, call_format="tool_call", tools=TOOLS)
    written = '<think>Hm</think>So:<tool_call>\n{"name":"python",  "arguments": {}}\n</tool_call>'
    ids = encoded(written)
    conversation, found = made.go_on(Conversation.about("a"), ids, StopReason.STOP, "1")
    assert found.begins
    assert text_of(found.span.token_ids).endswith(
        "<|assistant|>" + written.partition("</think>")[2] + "<|end|><|tool|>1<|end|><|assistant|>"
    )
    ids = encoded(written.partition("</think>")[2])
    _, found = made.go_on(conversation, ids, StopReason.STOP, "2")
    assert not found.begins


def test_a_shortened_output_stays_shortened():
    made = renderer(DROPS_OLD_THINKING, max_observation_tokens=10)
    ids = encoded("<think>a</think>b")
    conversation, found = made.go_on(Conversation.about("a"), ids, StopReason.EOS, "x" * 50)
    assert found.begins and "x" * 11 not in text_of(found.span.token_ids)
    assert conversation.turns[0].answers == ("x" * 10,)
    _, found = made.go_on(conversation, encoded("c"), StopReason.EOS, "y" * 50)
    assert not found.begins


def test_a_conversation_that_the_template_refuses_goes_on_as_it_was_sampled():
    refuses = "{% for m in messages %}{% if '!' in m.content %}{{ raise_exception('!') }}"
    made = renderer(refuses + "{% endif %}{% endfor %}" + DROPS_OLD_THINKING)
    _, found = made.go_on(Conversation.about("a"), encoded("!"), StopReason.EOS, "1")
    assert not found.begins
    assert dataclasses.replace(found, begins=True) != found


# ------------------------------------------------------------------------------- real templates


def squashed(text):
    return "".join(text.split())


def with_thought(text, *, apart):
    thought, mark, rest = text.partition("</think>")
    if not mark or not apart:
        return said(ASSISTANT, text)
    thought = thought.removeprefix("<think>").strip("\n")
    return said(ASSISTANT, rest.lstrip("\n")) | {"reasoning_content": thought}


@pytest.mark.parametrize(
    "path", sorted(Path(FOLDER).glob("*.jinja")) if FOLDER else [], ids=lambda path: path.stem
)
@pytest.mark.parametrize("role", ["tool", "user"])
def test_the_model_reads_what_a_real_template_writes(path, role):
    made = tokenizer_for(path.read_text())
    try:
        built = Renderer(made, rewritten_history="fork")
        conversation, ids = Conversation.about("6*7?"), built.prompt("6*7?").token_ids
        said_so_far = []
        for number in range(3):
            begins_thought = made.decode(list(ids)).rstrip().endswith("<think>")
            text = ("" if begins_thought else "<think>\n") + f"So {number}.\n</think>\n\nIt is."
            text += "\n```python\n1\n```" if role == "tool" else ""
            end = [] if role == "tool" else [built.end_mark]
            completion = [*made.encode(text, add_special_tokens=False), *end]
            stop = StopReason.STOP if role == "tool" else StopReason.EOS
            conversation, found = built.go_on(conversation, completion, stop, "x", role)
            ids = (
                found.span.token_ids if found.begins else (*ids, *completion, *found.span.token_ids)
            )
            answer = said(role, "x")
            if role == "tool":
                answer |= {"name": "python", "tool_call_id": CALL_ID}
            said_so_far.append((text, answer))
            due = [
                built.template.render(
                    [
                        said(USER, "6*7?"),
                        *(m for t, a in said_so_far for m in (with_thought(t, apart=apart), a)),
                    ],
                    generation=True,
                )
                for apart in (False, True)
            ]
            due = [made.decode(made.encode(each, add_special_tokens=False)) for each in due]
            if made.decode([built.end_mark]) not in due[0]:
                pytest.skip("the tokenizer of this test lacks the mark that ends a turn")
            read = made.decode(list(ids))
            if found.begins:
                assert read in due
            else:
                assert squashed(read) in map(squashed, due)
    except ValueError as error:
        pytest.skip(f"refused: {error}")

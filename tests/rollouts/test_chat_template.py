"""Turn formats, with small templates that behave like those of known model families."""

import json
from datetime import datetime

import pytest

from tir_alp.engines.base import Completion
from tir_alp.envs.parsing import parse_action
from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.rollouts.chat_template import ChatTemplate
from tir_alp.rollouts.formats import HERMES, find_form
from tir_alp.rollouts.formats.readers import JsonReader
from tir_alp.rollouts.prefix_stability import check_prefix_stability
from tir_alp.rollouts.renderer import Renderer
from tir_alp.tools.calls import BadCall, ToolCall, find_call
from tir_alp.types import StopReason

TOOLS = (
    {
        "type": "function",
        "function": {"name": "python", "parameters": {"properties": {"code": {"type": "string"}}}},
    },
)

_LOOP = "{% for m in messages %}<|{{ m.role }}|>"
_END = "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
HERMES_LIKE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    + _LOOP
    + "{{ m.content }}{% for c in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}" + _END
)
MISTRAL_LIKE = (
    "{% if tools %}[AVAILABLE]{{ tools | tojson }}{% endif %}"
    + _LOOP
    + "{{ m.content }}{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
    '"id": "{{ c.id }}"}{% endfor %}]{% endif %}' + _END
)
LLAMA_LIKE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    + _LOOP
    + "{% if m.role == 'tool' %}{{ m.content | tojson }}{% elif m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}" + _END
)
XML = (
    _LOOP + "{{ m.content }}{% for c in m.tool_calls %}<f={{ c.function.name }}>{% endfor %}" + _END
)
DROPS_THINKING = _LOOP + "{{ m.content.split('</think>')[-1] }}" + _END
DROPS_OLD_THINKING = (
    _LOOP + "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}"
    "{% endif %}" + _END
)
DROPS_EARLY_TURNS = (
    "{% for m in messages %}{% if loop.revindex <= 12 or loop.first %}<|{{ m.role }}|>"
    "{{ m.content }}<|end|>{% endif %}" + _END.removeprefix("<|end|>")
)
SHORTENS_OLD_OUTPUTS = (
    _LOOP + "{% if m.role == 'tool' and loop.revindex > 4 %}{{ m.content[:200] }}"
    "{% else %}{{ m.content }}{% endif %}" + _END
)
SHORTENS_OUTPUTS = _LOOP + "{{ m.content[:500] if m.role == 'tool' else m.content }}" + _END
PREFILLS = _LOOP + "{{ m.content }}" + _END.replace("<|assistant|>", "<|assistant|><no>")


def tokenizer_with(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def native(template, **how):
    return Renderer(tokenizer_with(template), call_format="tool_call", tools=TOOLS, **how)


def ids(text):
    return tuple(make_tokenizer().encode(text, add_special_tokens=False))


def text_of(token_ids):
    return make_tokenizer().decode(list(token_ids))


# ------------------------------------------------------------------------- the form of calls


@pytest.mark.parametrize(
    ("template", "marks", "reader"),
    [
        (HERMES_LIKE, (HERMES.opening, HERMES.closing), JsonReader()),
        (MISTRAL_LIKE, ("[TOOL_CALLS]", ""), JsonReader(in_list=True)),
        (LLAMA_LIKE, ("", ""), JsonReader(arguments_key="parameters")),
    ],
    ids=["hermes", "mistral", "llama"],
)
def test_the_form_of_calls_is_found_in_the_template(template, marks, reader):
    form = find_form(ChatTemplate(tokenizer_with(template), tools=TOOLS))
    assert ((form.opening, form.closing), form.read) == (marks, reader)


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (
            HERMES_LIKE,
            'I see.<tool_call>\n{"name": "python", "arguments": {"code": "1"}}\n</tool_call>',
        ),
        (MISTRAL_LIKE, '[TOOL_CALLS] [{"name": "python", "arguments": {"code": "1"}, "id": "x"}]'),
        (LLAMA_LIKE, '{"name": "python", "parameters": {"code": "1"}}'),
    ],
    ids=["hermes", "mistral", "llama"],
)
def test_the_environment_reads_the_same_call_of_every_model(template, written):
    action = native(template).action(ids(written))
    assert parse_action(action, "tool_call") == ToolCall("python", {"code": "1"})


def test_a_malformed_call_in_the_model_s_form_is_still_a_call_and_says_why():
    action = native(MISTRAL_LIKE).action(ids("[TOOL_CALLS] [oops"))
    found = find_call(action, "tool_call")
    assert isinstance(found, BadCall) and "Expecting value: line 1 column 3" in found.error


def test_the_model_is_shown_its_tools():
    shown = text_of(native(HERMES_LIKE).prompt("ab").token_ids)
    assert shown == f"<|system|>{json.dumps(list(TOOLS))}<|end|><|user|>ab<|end|><|assistant|>"


@pytest.mark.parametrize("template", [HERMES_LIKE, MISTRAL_LIKE, LLAMA_LIKE])
def test_an_episode_is_what_the_template_makes_of_it(template):
    renderer = native(template)
    call = {"type": "function", "id": "9", "function": {"name": "python", "arguments": {"c": "1"}}}
    messages = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": 'a "b"\n'},
    ]
    whole = tokenizer_with(template).apply_chat_template(
        messages, tools=list(TOOLS), tokenize=False, add_generation_prompt=True
    )
    prompt = text_of(renderer.prompt("ab").token_ids)
    observation = text_of(renderer.observation('a "b"\n', StopReason.STOP).token_ids)
    assert whole.startswith(prompt)
    assert whole.endswith(observation)
    assert '"name": "python"' in whole[len(prompt) : len(whole) - len(observation)]


def test_a_template_that_shows_no_tools_is_refused_for_native_calls():
    with pytest.raises(ValueError, match="does not show the model its tools"):
        Renderer(make_tokenizer(), call_format="tool_call", tools=TOOLS)


def test_a_template_with_calls_in_an_unknown_form_is_refused():
    template = "{{ tools }}" + XML
    with pytest.raises(ValueError, match="'<f=probe_tool>', which is none of the forms"):
        native(template)


# ----------------------------------------------------------------------- where a call ends


def stop_at(renderer, text):
    matches = renderer.stop_matcher()
    return next((i for i, token in enumerate(ids(text)) if matches(token)), None)


def test_generation_stops_at_the_token_that_closes_a_call():
    call = '<tool_call>{"name": "x", "arguments": {}}</tool_call>'
    assert stop_at(native(HERMES_LIKE), f"So {call} and {call}") == len(f"So {call}") - 1
    assert stop_at(native(HERMES_LIKE), call[:-1]) is None
    assert stop_at(native(HERMES_LIKE), "```python\n1\n```") is None


def test_a_format_without_calls_never_stops():
    renderer = Renderer(make_tokenizer(), call_format="none")
    assert stop_at(renderer, "```python\n1\n```<tool_call>{}</tool_call>") is None


def test_cut_keeps_what_stands_before_the_end_of_the_first_call():
    call = '<tool_call>{"name": "x", "arguments": {}}</tool_call>'
    sampled = ids(f"{call} and then")
    completion = Completion(
        token_ids=sampled,
        logprobs=(-1.0,) * len(sampled),
        stop_reason=StopReason.LENGTH,
        policy_version=0,
    )
    cut = native(HERMES_LIKE).cut(completion)
    assert (cut.token_ids, cut.stop_reason) == (ids(call), StopReason.STOP)


# ----------------------------------------------------------------------------------- the clock


def test_a_template_that_writes_the_time_is_given_that_of_the_run():
    tokenizer = tokenizer_with("{{ strftime_now('%d %b %Y %H:%M') }}" + HERMES_LIKE)
    clock = datetime(2026, 1, 31, 23, 59)
    assert text_of(Renderer(tokenizer, clock=clock).prompt("ab").token_ids) == (
        "31 Jan 2026 23:59<|user|>ab<|end|><|assistant|>"
    )
    assert check_prefix_stability(ChatTemplate(tokenizer, clock=clock)) == ()


# ------------------------------------------------------------------------- prefix stability


@pytest.mark.parametrize("template", [HERMES_LIKE, LLAMA_LIKE], ids=["hermes", "llama"])
def test_templates_that_only_append_are_stable(template):
    assert check_prefix_stability(ChatTemplate(tokenizer_with(template), tools=TOOLS)) == ()
    assert check_prefix_stability(ChatTemplate(tokenizer_with(template), "Be brief.")) == ()


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (DROPS_THINKING, "it drops the thinking of a turn ('thought 0'"),
        (DROPS_OLD_THINKING, "message 3 changes the text before it"),
        (DROPS_EARLY_TURNS, "message 14 changes the text before it"),
        (SHORTENS_OLD_OUTPUTS, "message 7 changes the text before it"),
        (SHORTENS_OUTPUTS, "it shortens a long output of a tool ('output 0'"),
        (PREFILLS, "it does not keep the prompt for turn 1"),
    ],
    ids=[
        *("drops thinking", "drops old thinking", "drops early turns"),
        *("shortens old outputs", "shortens outputs", "prefills"),
    ],
)
def test_what_a_template_rewrites_is_reported(template, sentence):
    assert sentence in "; ".join(check_prefix_stability(ChatTemplate(tokenizer_with(template))))


def test_a_template_that_rewrites_is_refused_unless_the_history_may_differ():
    tokenizer = tokenizer_with(DROPS_OLD_THINKING)
    with pytest.raises(ValueError, match=r"rewrites history: .*model\.rewritten_history"):
        Renderer(tokenizer)
    renderer = Renderer(tokenizer, rewritten_history="append")
    assert text_of(renderer.observation("1", StopReason.EOS).token_ids) == (
        "<|tool|>1<|end|><|assistant|>"
    )


@pytest.mark.parametrize("place", ["description", "name"])
def test_a_description_of_a_tool_cannot_forge_a_mark(place):
    tool = {"name": "python", "description": "Runs a program.", "parameters": {"type": "object"}}
    tool[place] += "<|end|>"
    tokenizer = tokenizer_with(HERMES_LIKE)
    schema = {"type": "function", "function": tool}
    with pytest.raises(ValueError, match=r"contains '<\|end\|>'.*tools_in_prompt"):
        Renderer(tokenizer, call_format="tool_call", tools=(schema,))

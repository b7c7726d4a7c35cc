"""Observations of a growing conversation are written as the template writes them, or refused."""

import pytest

from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.rollouts.renderer import Renderer
from tir_alp.types import StopReason

START = "{% for m in messages %}"
TURN = "<|{{ m.role }}|>{{ m.content }}<|end|>"
CLOSE = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
ONE, OTHER = (
    {"type": "function", "function": {"name": name, "parameters": {"properties": {}}}}
    for name in ("search", "python")
)
HERMES_CALL = (
    "{% for c in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}"
)
SHOWS_TOOLS = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"


def tokenizer_with(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def text_of(span):
    return make_tokenizer().decode(list(span.token_ids))


# ------------------------------------------------------------------------ names and ids of tools

NAMED = START + "<|{{ m.role }}|>{% if m.role == 'tool' %}{{ m.name }}: {% endif %}"
NAMED_END = "{{ m.content }}" + HERMES_CALL + "<|end|>" + CLOSE


def test_an_observation_has_the_name_of_the_tool_for_code():
    renderer = Renderer(tokenizer_with(NAMED + NAMED_END))
    assert text_of(renderer.observation("1", StopReason.EOS)) == (
        "<|tool|>python: 1<|end|><|assistant|>"
    )


def test_an_observation_has_the_name_of_the_only_tool():
    tokenizer = tokenizer_with(SHOWS_TOOLS + NAMED + NAMED_END)
    renderer = Renderer(tokenizer, call_format="tool_call", tools=(ONE,))
    assert text_of(renderer.observation("1", StopReason.EOS)) == (
        "<|tool|>search: 1<|end|><|assistant|>"
    )


def test_an_observation_has_the_name_of_the_tool_that_was_called():
    tokenizer = tokenizer_with(SHOWS_TOOLS + NAMED + NAMED_END)
    renderer = Renderer(tokenizer, call_format="tool_call", tools=(ONE, OTHER))
    for name, shown in [("search", "search"), ("python", "python"), ("<|end|>", "search")]:
        call = tokenizer.encode(f'<tool_call>{{"name": "{name}"}}</tool_call>')
        assert text_of(renderer.observation("1", StopReason.EOS, call)) == (
            f"<|tool|>{shown}: 1<|end|><|assistant|>"
        )


def test_the_id_of_a_call_has_the_form_that_templates_demand():
    template = START + "<|{{ m.role }}|>{{ m.tool_call_id }} {{ m.content }}<|end|>" + CLOSE
    template = template.replace("{{ m.tool_call_id }} ", "{{ m.tool_call_id or '' }}")
    renderer = Renderer(tokenizer_with(template))
    assert text_of(renderer.observation("1", StopReason.EOS)) == (
        "<|tool|>0000000001<|end|><|assistant|>"
    )


# ------------------------------------------------------------------------------- later turns


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            START
            + "{% if m.role == 'tool' and loop.index == 3 %}<first>{% endif %}"
            + TURN
            + CLOSE,
            r"output after turn 2 as it writes the first one: '\|tool\|>.* instead of 'first>",
        ),
        (
            START
            + "<|{{ m.role }}|>{% if m.role == 'assistant' %}<think></think>{% endif %}"
            + "{{ m.content }}<|end|>"
            + CLOSE,
            r"it writes turn 1 as '<think></think><think>.+thought 0",
        ),
        (
            START + TURN + "{% endfor %}",
            r"it writes turn 1 as '<\|assistant\|><think>.*it ignores add_generation_prompt",
        ),
    ],
    ids=["frames the first output", "empty thoughts before thoughts", "no generation prompt"],
)
def test_a_template_that_writes_later_turns_in_another_way_is_refused(template, reason):
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        Renderer(tokenizer_with(template))


def test_a_template_that_ends_all_texts_with_the_end_token_only_appends():
    ends = CLOSE.replace("{% endif %}", "{% else %}<|end|>{% endif %}")
    Renderer(tokenizer_with(START + TURN.replace("<|end|>", "<|pad|>") + ends))


@pytest.mark.parametrize(
    ("strip", "stripped"),
    [("| trim", "1 2"), (".lstrip()", "1 2 \n"), (".rstrip()", "\n 1 2"), ("", "\n 1 2 \n")],
)
def test_contents_are_stripped_as_the_template_strips_them(strip, stripped):
    content = "{{ m.content " + strip + " }}" if "|" in strip else "{{ m.content" + strip + " }}"
    template = START + TURN.replace("{{ m.content }}", content) + CLOSE
    renderer = Renderer(tokenizer_with(template))
    assert text_of(renderer.prompt("\n 1 2 \n")) == f"<|user|>{stripped}<|end|><|assistant|>"
    assert text_of(renderer.observation("\n 1 2 \n", StopReason.EOS)) == (
        f"<|tool|>{stripped}<|end|><|assistant|>"
    )


# ------------------------------------------------------------------------------ native calls


def test_a_call_that_is_marked_otherwise_after_words_is_refused():
    marked = (
        "{% if m.tool_calls %}[py]{{ m.content }}[/py]"
        + HERMES_CALL.replace("<tool_call>\n", "").replace("\n</tool_call>", "")
        + "{% else %}{{ m.content }}{% endif %}"
    )
    template = SHOWS_TOOLS + START + "<|{{ m.role }}|>" + marked + "<|end|>" + CLOSE
    with pytest.raises(ValueError, match=r"'\[py\]\[/py\]' before a call alone and '\[/py\]'"):
        Renderer(tokenizer_with(template), call_format="tool_call", tools=(ONE,))


def test_a_template_that_cannot_do_without_tools_is_accepted_with_them():
    template = "<|system|>{{ tools[0].function.name + '' }}<|end|>" + START + TURN + CLOSE
    template = template.replace("{{ m.content }}", "{{ m.content }}" + HERMES_CALL)
    tokenizer = tokenizer_with(template)
    renderer = Renderer(tokenizer, call_format="tool_call", tools=(ONE,))
    assert text_of(renderer.prompt("ab")) == "<|system|>search<|end|><|user|>ab<|end|><|assistant|>"


# --------------------------------------------------------------------- templates without tools

USER_AND_ASSISTANT = (
    START
    + "{% if m.role not in ('user', 'assistant') %}{{ raise_exception('only two roles') }}"
    + "{% endif %}"
    + TURN.replace("<|end|>", "\n<|pad|>")
    + CLOSE
)


def test_a_template_of_two_roles_is_enough_for_one_turn_without_calls():
    tokenizer = tokenizer_with(USER_AND_ASSISTANT)
    with pytest.raises(ValueError, match="only two roles"):
        Renderer(tokenizer)
    renderer = Renderer(tokenizer, call_format="none")
    assert text_of(renderer.prompt("ab")) == "<|user|>ab\n<|pad|><|assistant|>"
    assert renderer.stop_token_ids == {tokenizer.eos_token_id, tokenizer.pad_token_id}
    with pytest.raises(ValueError, match="only two roles"):
        renderer.observation("1", StopReason.EOS)

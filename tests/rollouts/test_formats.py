"""Forms of calls: found in templates, read, written, and where generation stops."""

import pytest
from transformers.utils.chat_parsing_utils import recursive_parse

from tests.fuzz.templates import tokenizer_for
from tests.rollouts.call_templates import FAMILIES
from tir_alp.rollouts.formats import FORMS, HERMES, ParameterTypes, canonical, read_calls
from tir_alp.rollouts.renderer import Renderer
from tir_alp.tools.calls import BadCall, ToolCall, find_calls
from tir_alp.types import StopReason

PARAMETERS = {
    "code": {"type": "string"},
    "n": {"type": "integer"},
    "on": {"type": "boolean"},
    "items": {"type": "array"},
}
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "parameters": {"properties": PARAMETERS}}}
    for name in ("python", "search")
)
TYPES = ParameterTypes.of(TOOLS)
CALL = ToolCall(
    "python",
    {"code": 'x = "1"\n  print(x, {})', "n": 3, "on": True, "items": [1, "a", {"b": None}]},
)
OTHER = ToolCall("search", {"code": "12", "n": -1})
BY_NAME = {form.name: form for form in FORMS}


def renderer_of(family: str, **settings) -> Renderer:
    tokenizer = tokenizer_for(FAMILIES[family][1])
    return Renderer(
        tokenizer,
        call_format="tool_call",
        tools=TOOLS,
        rewritten_history="append",
        **settings,
    )


def tokens(renderer: Renderer, text: str) -> list[int]:
    return renderer.template.tokenizer.encode(text, add_special_tokens=False)


def text_of(renderer: Renderer, ids) -> str:
    return renderer.template.tokenizer.decode(list(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_is_written_as_it_is_read(family):
    renderer = renderer_of(family)
    assert renderer.form.name == FAMILIES[family][0]
    ids, stop = renderer.demonstrated("", CALL, before_tool=True)
    action = renderer.action(ids)
    assert find_calls(action, "tool_call") == (CALL,)
    assert (stop is StopReason.EOS) == (ids[-1] in renderer.stop_token_ids)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llama_json", "harmony"}))
def test_generation_stops_at_the_token_that_completes_the_last_call(family):
    renderers = {most: renderer_of(family, max_calls=most) for most in (1, 2)}
    one, _ = renderers[1].demonstrated("", CALL, before_tool=True)
    whole = text_of(renderers[1], one)
    form = renderers[1].form
    is_list = form.name in ("json", "pythonic", "lfm2", "phi4", "granite")
    if is_list:  # the calls of a turn are one list: they end together
        return
    second, _ = renderers[1].demonstrated("", OTHER, before_tool=True)
    text = whole + text_of(renderers[1], second).removeprefix(form.section_start) + " and more"
    for most, expected in ((1, (CALL,)), (2, (CALL, OTHER))):
        matches = renderers[most].stop_matcher()
        ids = tokens(renderers[most], text)
        end = next(index for index, token in enumerate(ids, start=1) if matches(token))
        assert text_of(renderers[most], ids[:end]).endswith(form.closing or "}")
        assert find_calls(renderers[most].action(ids[:end]), "tool_call") == expected


def test_the_end_of_the_section_of_calls_stops_generation_and_is_not_added_again():
    renderer = renderer_of("deepseek_v31", max_calls=3)
    form = renderer.form
    ids, _ = renderer_of("deepseek_v31").demonstrated("", CALL, before_tool=True)
    text = text_of(renderer, ids)
    section = tokens(renderer, f"{text}{form.section_end}<|end|>")
    matches = renderer.stop_matcher()
    end = next(index for index, token in enumerate(section, start=1) if matches(token))
    assert text_of(renderer, section[:end]) == text + form.section_end
    follows = "<|end|><|tool|>42<|end|><|assistant|>"
    stopped = renderer.observation("42", StopReason.STOP, section[:end])
    assert text_of(renderer, stopped.token_ids) == follows
    cut = renderer.observation("42", StopReason.LENGTH, ids)
    assert text_of(renderer, cut.token_ids) == form.section_end + follows
    ended = renderer.observation("42", StopReason.EOS, section)
    assert text_of(renderer, ended.token_ids) == follows.removeprefix("<|end|>")


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("qwen3_coder", "<tool_call>python(1)</tool_call>", "written as <function=NAME>"),
        (
            "qwen3_coder",
            "<tool_call><function=python><parameter=code>1</function></tool_call>",
            "a parameter is not complete",
        ),
        (
            "qwen3_coder",
            "<tool_call><function=python><parameter=n>1</parameter><parameter=n>2</parameter>"
            "</function></tool_call>",
            "'n' is written twice",
        ),
        (
            "qwen3_coder",
            "<tool_call><function=python></function>",
            "does not end with </tool_call>",
        ),
        ("glm", "<tool_call>a b\n</tool_call>", "'a b' is no name of a tool"),
        ("kimi", "<|tool_call_begin|>functions.python:0{}<|tool_call_end|>", "is written as"),
        (
            "kimi",
            "<|tool_call_begin|>functions.python:0<|tool_call_argument_begin|>[]<|tool_call_end|>",
            "must be a JSON object",
        ),
        ("mistral", "[TOOL_CALLS]python[ARGS]{1}", "not JSON: Expecting property name"),
        ("mistral", "[TOOL_CALLS]python", "is written as [TOOL_CALLS]NAME[ARGS]{...}"),
        ("pythonic", "[python('1')]", "each argument has a key"),
        ("pythonic", "[python(code=open('x'))]", "calls are written as"),
        ("pythonic", "[python(code=b'x')]", "with values that JSON has too"),
        ("pythonic", f"[python(n={'(' * 300}1{')' * 300})]", "too many nested parentheses"),
        ("harmony", "to=functions.python<|channel|>x<|message|>{", None),
        ("harmony", " to=functions.python<|channel|>x<|message|>oops", "are not JSON"),
        ("minimax", '<invoke name="x"></invoke>', None),
    ],
)
def test_what_is_wrong_with_a_call_is_told(name, text, error):
    (read,) = read_calls(text, BY_NAME[name], TYPES)
    if error is None:
        assert isinstance(read.call, ToolCall)
        return
    assert isinstance(read.call, BadCall) and error in read.call.error
    assert find_calls(canonical(text, BY_NAME[name], TYPES), "tool_call") == (read.call,)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pythonic", "[1, 2, 3]"),
        ("pythonic", "So [python(code='1')]"),
        ("harmony", "<|channel|>analysis<|message|>not to=functions.python yet<|end|>"),
        (
            "harmony",
            "<|channel|>analysis<|message|>to=functions.python?<|end|><|start|>assistant"
            "<|channel|>final<|message|>4",
        ),
        ("harmony", "<|channel|>final<|message|>4, not to=functions.python"),
        ("mistral", '<tool_call>{"name": "python"}</tool_call>'),
    ],
)
def test_what_only_resembles_a_call_is_none(name, text):
    assert read_calls(text, BY_NAME[name], TYPES) == ()
    assert find_calls(canonical(text, BY_NAME[name], TYPES), "tool_call") == ()


def test_a_recipient_after_a_channel_is_read_too():
    text = (
        "<|channel|>analysis<|message|>Run it.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.python <|constrain|>json<|message|>{"n": 1}'
    )
    (read,) = read_calls(text, BY_NAME["harmony"], TYPES)
    assert read.call == ToolCall("python", {"n": 1})


def test_types_come_from_the_schema():
    values = {"code": "12", "n": "12", "on": "True", "items": "[1", "unknown": "12"}
    found = {key: TYPES.value("python", key, text) for key, text in values.items()}
    assert found == {"code": "12", "n": 12, "on": True, "items": "[1", "unknown": "12"}


def test_the_ids_that_the_model_wrote_stand_with_the_outputs_in_order():
    renderer = renderer_of("kimi", max_calls=2)
    calls = "".join(
        f"<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>{{}}"
        "<|tool_call_end|>"
        for name, number in [("search", 7), ("python", 8)]
    )
    ids = tokens(renderer, f"<|tool_calls_section_begin|>{calls}")
    shown = text_of(renderer, renderer.observation(("a", "b"), StopReason.STOP, ids).token_ids)
    assert shown == (
        "<|tool_calls_section_end|><|end|><|tool|>## Return of functions.search:7\na<|end|>"
        "<|tool|>## Return of functions.python:8\nb<|end|><|assistant|>"
    )
    forged = tokens(
        renderer,
        "<|tool_call_begin|>functions.python:0<|end|><|tool_call_argument_begin|>{}"
        "<|tool_call_end|>",
    )
    shown = text_of(renderer, renderer.observation("a", StopReason.STOP, forged).token_ids)
    assert "Return of 000000000\na" in shown


SCHEMAS = {
    "hermes": {
        "x-regex-iterator": r"<tool_call>(.*?)</tool_call>",
        "type": "array",
        "items": {"type": "object", "x-parser": "json"},
    },
    "qwen3_coder": {
        "x-regex-iterator": r"<function=(?P<name>[^>\n]+)>(?P<arguments>.*?)</function>",
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "arguments": {
                    "type": "object",
                    "x-regex-key-value": (
                        r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"
                    ),
                },
            },
        },
    },
}
"""Response schemas, in the language of transformers."""


@pytest.mark.parametrize("family", SCHEMAS)
def test_transformers_reads_the_same_calls_by_a_response_schema(family):
    renderer = renderer_of(family)
    calls = [ToolCall("python", {"code": "print(1)"}), ToolCall("search", {"code": "a b"})]
    text = "\n".join(
        text_of(renderer, renderer.demonstrated("", call, before_tool=True)[0]) for call in calls
    )
    read = read_calls(text, renderer.form, TYPES)
    assert [each.call for each in read] == calls
    assert recursive_parse(text, SCHEMAS[family]) == [
        {"name": call.name, "arguments": dict(call.arguments)} for call in calls
    ]


def test_hermes_is_what_environments_read():
    text = 'So <tool_call>{"name": "a", "arguments": {}}</tool_call><tool_call>{'
    assert [each.call for each in read_calls(text, HERMES, TYPES)] == [
        *find_calls(text, "tool_call")
    ]

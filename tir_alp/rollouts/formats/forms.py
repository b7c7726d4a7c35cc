"""The forms of calls that are known by name. A new one is an entry in `FORMS`."""

from __future__ import annotations

from tir_alp.rollouts.formats.form import CallForm
from tir_alp.rollouts.formats.readers import (
    HarmonyReader,
    HeadedReader,
    JsonReader,
    TaggedReader,
    read_python,
)
from tir_alp.tools.calls import CLOSING, OPENING

HERMES = CallForm("hermes", OPENING, CLOSING, JsonReader())

_SEP = "<\uff5ctool\u2581sep\uff5c>"
_DSML = "\uff5cDSML\uff5c"


def _invoke(name: str, prefix: str, section: str) -> CallForm:
    """Return a form of `<invoke name="...">` and `<parameter name="...">`."""
    return CallForm(
        name,
        opening=f'<{prefix}invoke name="',
        closing=f"</{prefix}invoke>",
        read=TaggedReader(
            f'<{prefix}invoke name="NAME"><{prefix}parameter name="KEY">VALUE'
            f"</{prefix}parameter></{prefix}invoke>",
            name_open="",
            name_close='">',
            key_open=f'<{prefix}parameter name="',
            key_close='"',
            value_open=">",
            value_close=f"</{prefix}parameter>",
        ),
        section_start=f"<{section}>",
        section_end=f"</{section}>",
    )


def _function(name: str, opening: str, closing: str, *, is_on_lines: bool) -> CallForm:
    """Return a form of `<function=...>` and `<parameter=...>`."""
    reader = TaggedReader(
        "<function=NAME><parameter=KEY>VALUE</parameter></function>",
        name_open="<function=",
        name_close=">",
        key_open="<parameter=",
        key_close=">",
        value_open="",
        value_close="</parameter>",
        is_on_lines=is_on_lines,
    )
    return CallForm(name, opening, closing, reader)


FORMS: tuple[CallForm, ...] = (
    _function("qwen3_coder", OPENING, CLOSING, is_on_lines=True),
    _function("seed", "<seed:tool_call>", "</seed:tool_call>", is_on_lines=False),
    CallForm(
        "glm",
        OPENING,
        CLOSING,
        TaggedReader(
            "NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>",
            name_open="",
            name_close="",
            key_open="<arg_key>",
            key_close="</arg_key>",
            value_open="<arg_value>",
            value_close="</arg_value>",
        ),
        inner_marks=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    CallForm(
        "kimi",
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        HeadedReader(
            "<|tool_call_argument_begin|>",
            "functions.NAME:NUMBER<|tool_call_argument_begin|>{...}",
            numbered=True,
        ),
        section_start="<|tool_calls_section_begin|>",
        section_end="<|tool_calls_section_end|>",
        inner_marks=("<|tool_call_argument_begin|>",),
    ),
    CallForm(
        "deepseek",
        "<\uff5ctool\u2581call\u2581begin\uff5c>",
        "<\uff5ctool\u2581call\u2581end\uff5c>",
        HeadedReader(_SEP, f"NAME{_SEP}{{...}}", kind_before_name="function"),
        section_start="<\uff5ctool\u2581calls\u2581begin\uff5c>",
        section_end="<\uff5ctool\u2581calls\u2581end\uff5c>",
        inner_marks=(_SEP,),
    ),
    _invoke("deepseek_dsml", _DSML, f"{_DSML}function_calls"),
    _invoke("minimax", "", "minimax:tool_call"),
    CallForm(
        "mistral",
        "[TOOL_CALLS]",
        "",
        HeadedReader("[ARGS]", "[TOOL_CALLS]NAME[ARGS]{...}", id_mark="[CALL_ID]"),
        body_mark="[ARGS]",
        inner_marks=("[CALL_ID]",),
    ),
    CallForm(
        "harmony",
        "to=functions.",
        "<|call|>",
        HarmonyReader("to=functions.", "<|message|>", "<|start|>", "<|end|>"),
        ends_turn=True,
        inner_marks=("<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|end|>"),
        one_per_turn=True,
    ),
    CallForm("lfm2", "<|tool_call_start|>", "<|tool_call_end|>", read_python),
    CallForm("pythonic_marked", "<|python_start|>", "<|python_end|>", read_python),
    CallForm("pythonic", "", "", read_python, starts="["),
)
"""Forms other than JSON between marks, which are found in the template itself."""

TOLD: tuple[tuple[str, CallForm], ...] = (
    (
        "<|/tool|>",
        CallForm("phi4", "<|tool_call|>", "<|/tool_call|>", JsonReader(in_list=True)),
    ),
    ("<|tool_call|>", CallForm("granite", "<|tool_call|>", "", JsonReader(in_list=True))),
)
"""Forms of models whose templates show no calls, each with a text in their prompts by which it is
recognised: the mark around the tools, or what the prompt says about calls."""

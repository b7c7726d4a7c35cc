"""Finds the form of calls in a chat template, by rendering calls and reading them back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tir_alp.rollouts.chat_template import ASSISTANT, ChatTemplate, MadeCall, user, words
from tir_alp.rollouts.formats.form import CallForm, ParameterTypes
from tir_alp.rollouts.formats.forms import FORMS, HERMES, TOLD
from tir_alp.rollouts.formats.readers import JsonReader
from tir_alp.rollouts.formats.scan import find_blocks, read_calls
from tir_alp.tools.calls import ToolCall

_NAME, _KEY, _VALUE = "probe_tool", "probe_key", "probe_value"
PROBE: Mapping[str, Any] = {_KEY: _VALUE}
"""Arguments of a call that is rendered to see how the template writes it."""
_OTHER = "other_tool"
_FENCES = 'or calls in fences: env.kwargs.call_format = "fenced"'
_TOOLS_TEXT = """\
You may call these tools:
{schemas}
To call one, write
{example}
and stop; you are shown the result."""


def with_tools_shown(template: ChatTemplate) -> ChatTemplate:
    """Return the template, with the tools in the system message if it does not show them itself.

    There the templates of Phi-4 look for them. A template that writes calls but shows no tools,
    such as DeepSeek's, leaves it to the system prompt to show them.

    Raises:
        ValueError: The template writes no calls either.
    """
    if not template.tools or template.shows_tools():
        return template
    for show in (_in_system_message, _in_system_prompt):
        with contextlib.suppress(ValueError):  # a template may refuse the message
            if (shown := show(template)) is not None:
                return shown
    raise ValueError(
        f"the chat template of {template.tokenizer.name_or_path!r} does not show the model its "
        "tools; use one that does, or let the environment do so: env.kwargs.tools_in_prompt = true"
    )


def _in_system_message(template: ChatTemplate) -> ChatTemplate | None:
    inside = replace(template, is_in_system_message=True)
    return inside if inside.shows_tools() and _told(inside) is not None else None


def _in_system_prompt(template: ChatTemplate) -> ChatTemplate | None:
    written = _written(template, [MadeCall("NAME", {"KEY": "VALUE"})]).strip()
    if "NAME" not in written:
        return None
    schemas = [json.dumps(each.get("function", each)) for each in template.tools]
    text = _TOOLS_TEXT.format(schemas="\n".join(schemas), example=written)
    shown = replace(template, system=f"{template.system}\n\n{text}".strip())
    return shown if schemas[0] in shown.render([user()]) else None


def find_form(template: ChatTemplate) -> CallForm:
    """Find out how the template writes a tool call.

    Raises:
        ValueError: It writes calls in no form that is known.
    """
    if not template.tools:
        return HERMES
    written = _written(template, [MadeCall(_NAME, PROBE)])
    known = next((each for each in FORMS if _reads(each, written, [_NAME])), None)
    form = known or _json_form(template, written)
    if form is None:
        told = _told(template)
        if told is not None:
            return replace(told, is_in_history=False)
        name = template.tokenizer.name_or_path
        if not written.strip():
            raise ValueError(
                f"the chat template of {name!r} writes no calls; use another template, {_FENCES}"
            )
        raise ValueError(
            f"the chat template of {name!r} writes a call as {written[:200]!r}, which is none of "
            f"the forms that are known; use another template, {_FENCES}"
        )
    try:
        both = _written(template, [MadeCall(_NAME, PROBE), MadeCall(_OTHER, PROBE)])
    except ValueError:
        both = ""
    has_several = _reads(form, both, [_NAME, _OTHER])
    return replace(form, one_per_turn=form.one_per_turn or not has_several)


def written_call(template: ChatTemplate, form: CallForm, text: str, call: ToolCall) -> str:
    """Return a turn with a native call as the template writes it, up to the end of the call.

    Args:
        template: The template.
        form: What `find_form` found.
        text: Words before the call.
        call: The call.
    """
    types = ParameterTypes.of(template.tools)
    made = MadeCall(call.name, dict(call.arguments))
    if form.is_in_history:
        prompt = template.render([user()], generation=True)
        whole = template.render([user(), template.calls([made], text)])
        is_kept = whole.startswith(prompt)  # a prompt may begin a thought, which is not kept
        body = whole[len(prompt) if is_kept else start_of_turn(template, whole) :]
        blocks = [*find_blocks(body, form, types)]
        if blocks and [each.call for each in blocks[0].calls] == [call]:
            end = blocks[0].end - (len(form.closing) if form.ends_turn else 0)
            return body[:end]
    if isinstance(form.read, JsonReader):
        reader = form.read
        value: Any = {reader.name_key: call.name, reader.arguments_key: made.arguments}
        value = [value] if reader.in_list else value
        return f"{text}{form.opening}{json.dumps(value, ensure_ascii=False)}{form.closing}"
    raise ValueError(
        f"the chat template of {template.tokenizer.name_or_path!r} does not write this call of "
        f"{call.name!r} so that it is read as the same call: {made.arguments!r:.80}"
    )


def start_of_turn(template: ChatTemplate, text: str) -> int:
    """Return where the assistant's turn begins in a conversation that has one, after a task.

    It is where the text first differs from that with a turn of words, but not within a mark:
    `<think>` and `<tool_call>` begin with the same characters.
    """
    head = template.render([user(), words()]).partition(ASSISTANT)[0]
    pairs = enumerate(zip(head, text, strict=False))
    start = next((index for index, (a, b) in pairs if a != b), len(head))
    mark = max(head.rfind(each, 0, start) for each in "<[")
    return mark if mark >= 0 and not set(head[mark:start]) & set(">]\n") else start


def _written(template: ChatTemplate, calls: list[MadeCall]) -> str:
    """Return how the template writes a turn that consists of calls, without the end of the turn."""
    end_of_turn = template.render([user(), words()]).partition(ASSISTANT)[2]
    text = template.render([user(), template.calls(calls)])
    return text[start_of_turn(template, text) :].removesuffix(end_of_turn)


def _reads(form: CallForm, written: str, names: list[str]) -> bool:
    """Whether the calls of the probes are read, and nothing else."""
    found = [each.call for each in read_calls(written, form, ParameterTypes())]
    return found == [ToolCall(each, PROBE) for each in names]


def _told(template: ChatTemplate) -> CallForm | None:
    prompt = template.render([user()], generation=True)
    return next((form for hint, form in TOLD if hint in prompt), None)


def _json_form(template: ChatTemplate, written: str) -> CallForm | None:
    """Return a form of JSON with the marks that the template writes around it; None if none."""
    start, end, call = _find_json(written, _NAME)
    if not call:
        return None
    opening, closing = written[:start].strip(), written[end:].strip()
    after_words = _opening_after_words(template)
    if after_words not in (None, opening):
        raise ValueError(
            f"the chat template of {template.tokenizer.name_or_path!r} writes {opening!r} before a "
            f"call alone and {after_words!r} between words and a call; use another template, "
            f"{_FENCES}"
        )
    in_list = opening.endswith("[") and closing.startswith("]")
    reader = JsonReader(
        name_key=next(key for key, value in call.items() if value == _NAME),
        arguments_key=next(key for key, value in call.items() if _VALUE in json.dumps(value)),
        in_list=in_list,
    )
    opening = opening[:-1].strip() if in_list else opening
    closing = closing[1:].strip() if in_list else closing
    if (opening, closing, reader) == (HERMES.opening, HERMES.closing, HERMES.read):
        return HERMES
    starts = "" if opening else "[" if in_list else "{"
    return CallForm("json", opening, closing, reader, starts=starts)


def _opening_after_words(template: ChatTemplate) -> str | None:
    """What stands between words and a call; None if the template does not write both."""
    try:
        text = template.render([user(), template.calls([MadeCall(_NAME, PROBE)], ASSISTANT)])
    except ValueError:
        return None
    start, _, _ = _find_json(text, _NAME)
    place = text.find(ASSISTANT)
    return text[place + len(ASSISTANT) : start].strip() if 0 <= place < start else None


def _find_json(text: str, name: str) -> tuple[int, int, dict[str, Any]]:
    """Return start, end and value of the JSON object that calls `name`; (0, 0, {}) if none."""
    decoder, position = json.JSONDecoder(), text.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except ValueError:
            value, end = None, position
        if isinstance(value, dict) and name in value.values() and _VALUE in text[position:end]:
            return position, end, value
        position = text.find("{", position + 1)
    return 0, 0, {}

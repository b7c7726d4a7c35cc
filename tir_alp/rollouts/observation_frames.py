"""The text that a chat template writes between two completions, around the outputs of tools."""

from __future__ import annotations

from collections.abc import Sequence

from tir_alp.rollouts.chat_template import (
    ASSISTANT,
    CALL_ID,
    ChatTemplate,
    Frame,
    MadeCall,
    tool,
    user,
    words,
)
from tir_alp.rollouts.formats.detect import PROBE, start_of_turn
from tir_alp.rollouts.formats.form import CallForm, ParameterTypes
from tir_alp.rollouts.formats.scan import find_blocks

_OUTPUT = '\u2068tool"\n{}\u2069'  # the quote and line end show whether it is written as JSON


def observation_frames(
    template: ChatTemplate,
    form: CallForm | None,
    names: Sequence[str],
    call_ids: Sequence[str] = (),
) -> tuple[Frame, ...]:
    """Return the text around each of some outputs, from the end of the last call.

    The text before the first output counts from there, that before another one from the end of the
    output before it. Only the last frame has a text after it.

    Args:
        template: The template.
        form: How native calls are written; None if calls are ordinary text.
        names: The names of the tools, one per output.
        call_ids: The ids of the calls, one per output; empty: that of a call without an id.

    Raises:
        ValueError: The template refuses or changes an output or an id.
    """
    ids = [each or CALL_ID for each in call_ids or ("",) * len(names)]
    contents = [_OUTPUT.format(index) for index in range(len(names))]
    outputs = [
        tool(content, name, call_id)
        for content, name, call_id in zip(contents, names, ids, strict=True)
    ]
    if not template.tools or form is None or not form.is_in_history:
        return template.frames([user(), words(), *outputs], contents, after=ASSISTANT)
    calls = [MadeCall(name, PROBE, call_id) for name, call_id in zip(names, ids, strict=True)]
    messages = [user(), template.calls(calls), *outputs]
    text = template.render(messages, generation=True)
    begin = start_of_turn(template, text)
    called: list[str] = []
    end = begin
    for block in find_blocks(text[begin:], form, ParameterTypes()):
        called += [each.name for each in block.calls]
        end = begin + block.end - (len(form.closing) if form.ends_turn else 0)
        if len(called) >= len(names):
            break
    if called != [*names]:
        raise ValueError(
            f"the chat template of {template.tokenizer.name_or_path!r} does not write "
            f"{len(names)} calls in one turn as {form.name} calls; use env.kwargs.max_calls = 1"
        )
    return template.frames(messages, contents, start=end)

"""Finds out whether a chat template only appends as a conversation grows. Text, no tokens.

An episode is trained on as it was sampled, thinking included. What a template rewrites, the
deployed model would see differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from tir_alp.rollouts.chat_template import ChatTemplate, Frame, MadeCall, Message, tool, user
from tir_alp.rollouts.formats import find_form
from tir_alp.rollouts.formats.detect import PROBE
from tir_alp.rollouts.observation_frames import observation_frames

_LAST_WORDS = "\u2068words\u2069"
_NUM_CALLS = 8  # in the conversation that reveals rewriting: some templates drop only early turns


@dataclass(frozen=True, slots=True)
class GrowingConversation:
    """How a template renders a conversation of several calls and an answer as it grows."""

    thoughts: tuple[str, ...]
    """The assistant's thinking before each call and before the answer."""
    outputs: tuple[str, ...]
    """The tools' outputs, which are long."""
    texts: tuple[str, ...]
    """The conversation after each message."""
    prompts: tuple[str, ...]
    """The conversation before each turn of the assistant, with the generation prompt."""
    contents: tuple[str, ...]
    """The text of each turn of the assistant, without a call in the template's own form."""
    has_calls: bool
    """Whether all turns but the last end with a call in the template's own form."""


def grow_conversation(template: ChatTemplate) -> GrowingConversation:
    """Render an episode of eight calls, with thinking and long outputs, and an answer. Pure.

    Raises:
        ValueError: The template refuses one of the messages.
    """
    name = template.tool_names[0]
    thoughts = [f"\u2068thought {turn}\u2069" for turn in range(_NUM_CALLS + 1)]
    outputs = [f"\u2068output {turn}\u2069{100 * ' of some words'}" for turn in range(_NUM_CALLS)]
    contents = [f"<think>\n{each}\n</think>\n\n{_LAST_WORDS}" for each in thoughts]
    turns: list[Message] = [{"role": "assistant", "content": each} for each in contents]
    form = find_form(template)
    made = (MadeCall(name, PROBE),)
    if template.tools and form.opening and form.is_in_history:
        turns[:-1] = [template.calls(made, each) for each in contents[:-1]]
    elif template.tools and form.is_in_history:  # a message with a call contains nothing else
        turns[:-1], thoughts = [template.calls(made)] * _NUM_CALLS, thoughts[-1:]
        contents[:-1] = [""] * _NUM_CALLS
    messages: list[Message] = [user()]
    for turn, output in zip(turns, outputs, strict=False):
        messages += [turn, tool(output, name)]
    messages.append(turns[-1])
    return GrowingConversation(
        thoughts=tuple(thoughts),
        outputs=tuple(outputs),
        texts=tuple(template.render(messages[: n + 1]) for n in range(len(messages))),
        prompts=tuple(
            template.render(messages[:n], generation=True) for n in range(1, len(messages), 2)
        ),
        contents=tuple(contents),
        has_calls=bool(template.tools) and form.is_in_history,
    )


def check_prefix_stability(template: ChatTemplate) -> tuple[str, ...]:
    """Find out whether a chat template only appends as a conversation grows. Pure.

    An episode is trained on as it was sampled, thinking included. A template that drops or changes
    some of it would show the deployed model something else. `Renderer` calls this when it is
    constructed, and the doctor calls it before a run.

    Returns:
        One sentence per kind of rewriting, about its first instance; empty if the template only
        appends.
    """
    try:
        grown = grow_conversation(template)
        frame = observation_frames(template, find_form(template), [template.tool_names[0]])[0]
    except ValueError as error:
        return (str(error),)
    deviation = next(_deviations(grown, frame), None)
    if deviation is None:
        return ()
    # Some templates end a text without generation prompt with the end of all texts.
    texts = tuple(text.removesuffix(template.tokenizer.eos_token) for text in grown.texts)
    kinds = (
        (
            f"it drops the thinking of a turn ({thought[1:-1]!r} is not in the conversation)"
            for thought in grown.thoughts
            if thought not in texts[-1]
        ),
        (
            f"it shortens a long output of a tool ({output[1:9]!r} is not complete in it)"
            for output in grown.outputs
            if output not in texts[-1]
        ),
        (
            f"message {length} changes the text before it: {_difference(shorter, longer)}"
            for length, (shorter, longer) in enumerate(pairwise(texts), start=2)
            if not longer.startswith(shorter)
        ),
        (
            f"it does not keep the prompt for turn {turn}: {_difference(prompt, text)}"
            for turn, (prompt, text) in enumerate(
                zip(grown.prompts, texts[1::2], strict=True), start=1
            )
            if not text.startswith(prompt)
        ),
    )
    first = (next(sentences, None) for sentences in kinds)
    return tuple(sentence for sentence in first if sentence is not None) or (deviation,)


def _deviations(grown: GrowingConversation, frame: Frame) -> Iterator[str]:
    """Describe where a conversation differs from what the renderer makes of it by appending.

    Only the assistant's own turns may differ, in white space: it samples them in the form that it
    has been trained on.
    """
    for turn, (prompt, longer) in enumerate(pairwise(grown.prompts), start=1):
        observation = frame.before + frame.written(grown.outputs[turn - 1]) + frame.after
        if not longer.startswith(prompt):
            yield f"it does not keep the prompt for turn {turn}: {_difference(prompt, longer)}"
        if not longer.endswith(observation):
            words = grown.contents[turn - 1][-len(_LAST_WORDS) :]
            written = longer.rpartition(words)[2] if words else longer[-len(observation) :]
            yield (
                f"it does not write the output after turn {turn} as it writes the first one: "
                f"{_difference(observation, written)}"
            )
        written = longer[len(prompt) : len(longer) - len(observation)]
        if not _is_written(grown.contents[turn - 1], prompt, written, grown.has_calls):
            ignores = " (it ignores add_generation_prompt)" if prompt == grown.texts[0] else ""
            yield (
                f"it writes turn {turn} as {written[:80]!r} instead of "
                f"{grown.contents[turn - 1][:80]!r}{ignores}"
            )


def _is_written(content: str, prompt: str, written: str, has_call: bool) -> bool:
    """Return whether a turn has the given content, white space apart.

    Args:
        content: The content, without a call in the template's own form.
        prompt: The text before the turn, which may end with the beginning of the content.
        written: The turn.
        has_call: Whether a call may follow the content.
    """
    expected, before, found = ("".join(text.split()) for text in (content, prompt, written))
    longest = next(n for n in range(len(expected), -1, -1) if before.endswith(expected[:n]))
    rests = (expected, expected[longest:])
    return any(found.startswith(rest) if has_call else found == rest for rest in rests)


def _difference(expected: str, found: str) -> str:
    position = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b),
        min(len(expected), len(found)),
    )
    end = position + 40
    return f"{found[position:end]!r} instead of {expected[position:end]!r}"

"""Finds what a tokenizer's chat template puts around messages, by rendering some. Text, no tokens.

A template is rendered with stand-ins for contents, once, at start-up. From then on a conversation
is only appended to. That is correct for a template that itself only appends;
`check_prefix_stability` reports what any other template rewrites.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError

from tir_alp.tools.calls import HERMES, CallMarks

# Stand-ins. The quote and line end in the tool's output show whether it is written as JSON.
_USER, _ASSISTANT, _TOOL = "\u2068user\u2069", "\u2068assistant\u2069", '\u2068tool"\n\u2069'
_NAME, _KEY, _VALUE = "probe_tool", "probe_key", "probe_value"
_ID = "call00000"  # Mistral's templates want nine letters or digits
_NUM_CALLS = 8  # in the conversation that reveals rewriting: some templates drop only early turns

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Frame:
    """The text that a template puts before and after a content."""

    before: str
    after: str
    as_json: bool = False
    """Whether the content is written as the inside of a JSON string."""
    left: str = ""
    """The conversation up to `before`."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The chat template of a tokenizer, with the system prompt and tools of every conversation.

    Args:
        tokenizer: A Hugging Face tokenizer with a template that knows the role `tool`.
        system: System prompt; empty for none.
        tools: JSON schemas of functions, as for `apply_chat_template`; empty for none.
        clock: Local time that a template is given which asks for the time; None: the real time. A
            run freezes it: prompts must be the same when the run is resumed or audited.
    """

    tokenizer: Any
    system: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    clock: datetime | None = None

    def render(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        """Render a conversation.

        Raises:
            ValueError: The template refuses a message; the text contains the template's reason.
        """
        opening = [{"role": "system", "content": self.system}] if self.system else []
        try:
            return self.tokenizer.apply_chat_template(
                [*opening, *messages],
                tools=list(self.tools) or None,
                tokenize=False,
                add_generation_prompt=generation,
                **({} if self.clock is None else {"strftime_now": self.clock.strftime}),
            )
        except (TemplateError, TypeError) as error:
            name = self.tokenizer.name_or_path
            raise ValueError(f"the chat template of {name!r} refuses a message: {error}") from error

    def prompt_frame(self) -> Frame:
        """The text around a task, up to the start of the first completion."""
        return self._frame([_user()], _USER)

    def observation_frame(self, marks: CallMarks | None = None) -> Frame:
        """The text around a tool's output, between two completions.

        Args:
            marks: How native calls are written; None if calls are ordinary text.
        """
        if not self.tools or marks is None:
            messages = [_user(), {"role": "assistant", "content": _ASSISTANT}, _tool(_TOOL)]
            return self._frame(messages, _TOOL, after=_ASSISTANT)
        called = self.call()
        text = self.render([_user(), called, _tool(_TOOL)], generation=True)
        _, end, _ = _find_json(text, _NAME)
        closing = text.find(marks.closing, end) + len(marks.closing)
        if marks.in_list and not marks.closing:
            closing = text.find("]", end) + 1
        return self._frame([_user(), called, _tool(_TOOL)], _TOOL, start=max(end, closing))

    def call_marks(self) -> CallMarks:
        """Find out how the template writes a tool call.

        Raises:
            ValueError: The template takes no tools, or writes calls in a form other than JSON.
        """
        name = self.tokenizer.name_or_path
        if not self.tools:
            return HERMES
        if self.render([_user()]) == ChatTemplate(
            self.tokenizer, self.system, (), self.clock
        ).render([_user()]):
            raise ValueError(
                f"the chat template of {name!r} does not show the model its tools; use one that "
                "does, or let the environment do so: env.kwargs.tools_in_prompt = true"
            )
        plain = self.render([_user(), {"role": "assistant", "content": _ASSISTANT}])
        head, _, end_of_turn = plain.partition(_ASSISTANT)
        text = self.render([_user(), self.call()])
        same = next((i for i, (a, b) in enumerate(zip(head, text, strict=False)) if a != b), None)
        written = text[len(head) if same is None else same :].removesuffix(end_of_turn)
        start, end, call = _find_json(written, _NAME)
        if not call:
            raise ValueError(
                f"the chat template of {name!r} writes a call as {written[:200]!r}, which is not "
                'JSON; use another template, or calls in fences: env.kwargs.call_format = "fenced"'
            )
        opening, closing = written[:start].strip(), written[end:].strip()
        in_list = opening.endswith("[") and closing.startswith("]")
        return CallMarks(
            opening=opening[:-1].strip() if in_list else opening,
            closing=closing[1:].strip() if in_list else closing,
            name_key=next(key for key, value in call.items() if value == _NAME),
            arguments_key=next(key for key, value in call.items() if _VALUE in json.dumps(value)),
            in_list=in_list,
        )

    def call(self, words: str = "") -> Message:
        """Return a message with a tool call, its arguments in the form that the template wants.

        Args:
            words: Text of the message, before the call.
        """
        arguments: dict[str, str] = {_KEY: _VALUE}
        try:
            self.render([_user(), _call(words, arguments)])
        except ValueError:
            return _call(words, json.dumps(arguments))
        return _call(words, arguments)

    def _frame(
        self, messages: Sequence[Message], content: str, *, after: str = "", start: int = 0
    ) -> Frame:
        """Split a rendered conversation around a content.

        What comes before the content counts from `start`, or from the end of the text `after`.
        """
        text = self.render(messages, generation=True)
        written, as_json = content, False
        if content not in text:
            written, as_json = json.dumps(content, ensure_ascii=False)[1:-1], True
        if text.count(written) != 1 or after not in text:
            role = messages[-1]["role"]
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not keep the content "
                f"of a {role!r} message as it is; use a template that does"
            )
        if after:
            start = text.index(after) + len(after)
        prefix, suffix = text[start:].split(written)
        return Frame(prefix, suffix, as_json, left=text[:start])


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


def grow_conversation(template: ChatTemplate) -> GrowingConversation:
    """Render an episode of eight calls, with thinking and long outputs, and an answer. Pure.

    Raises:
        ValueError: The template refuses one of the messages.
    """
    thoughts = [f"\u2068thought {turn}\u2069" for turn in range(_NUM_CALLS + 1)]
    outputs = [f"\u2068output {turn}\u2069{100 * ' of some words'}" for turn in range(_NUM_CALLS)]
    contents = [f"<think>\n{each}\n</think>\n\n\u2068words\u2069" for each in thoughts]
    turns: list[Message] = [{"role": "assistant", "content": each} for each in contents]
    if template.tools and template.call_marks().opening:
        turns[:-1] = [template.call(each) for each in contents[:-1]]
    elif template.tools:  # in this form, a message with a call contains nothing else
        turns[:-1], thoughts = [template.call()] * _NUM_CALLS, thoughts[-1:]
    messages = [_user()]
    for turn, output in zip(turns, outputs, strict=False):
        messages += [turn, _tool(output)]
    messages.append(turns[-1])
    return GrowingConversation(
        thoughts=tuple(thoughts),
        outputs=tuple(outputs),
        texts=tuple(template.render(messages[: n + 1]) for n in range(len(messages))),
        prompts=tuple(
            template.render(messages[:n], generation=True) for n in range(1, len(messages), 2)
        ),
    )


def check_prefix_stability(
    tokenizer: Any,
    *,
    system: str = "",
    tools: Sequence[Mapping[str, Any]] = (),
    clock: datetime | None = None,
) -> tuple[str, ...]:
    """Find out whether a chat template only appends as a conversation grows. Pure.

    An episode is trained on as it was sampled, thinking included. A template that drops or changes
    some of it would show the deployed model something else. `Renderer` calls this when it is
    constructed, and the doctor calls it before a run.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        system: System prompt; empty for none.
        tools: JSON schemas of functions, if calls are written in the template's own form.
        clock: Local time that the template is given; None: the real time.

    Returns:
        One sentence per kind of rewriting, about its first instance; empty if the template only
        appends.
    """
    try:
        grown = grow_conversation(ChatTemplate(tokenizer, system, tuple(tools), clock))
    except ValueError as error:
        return (str(error),)
    texts = grown.texts
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
    return tuple(sentence for sentence in first if sentence is not None)


def _difference(expected: str, found: str) -> str:
    position = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b),
        min(len(expected), len(found)),
    )
    end = position + 40
    return f"{found[position:end]!r} instead of {expected[position:end]!r}"


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


def _user() -> Message:
    return {"role": "user", "content": _USER}


def _tool(content: str) -> Message:
    return {"role": "tool", "content": content, "name": _NAME, "tool_call_id": _ID}


def _call(content: str, arguments: Mapping[str, str] | str) -> Message:
    function = {"name": _NAME, "arguments": arguments}
    calls = [{"type": "function", "id": _ID, "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls}

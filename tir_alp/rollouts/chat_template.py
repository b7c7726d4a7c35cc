"""Finds what a tokenizer's chat template puts around messages, by rendering some. Text, no tokens.

A template is rendered with stand-ins for contents, once, at start-up. From then on a conversation
is only appended to. That is correct for a template that itself only appends;
`check_prefix_stability` reports what any other template rewrites.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from typing import Any

from tir_alp.tools.calls import HERMES, CallMarks, ToolCall, call_blocks, read_call

# Stand-ins. The quote and line end in the tool's output show whether it is written as JSON.
_USER, _ASSISTANT, _TOOL = "\u2068user\u2069", "\u2068assistant\u2069", '\u2068tool"\n\u2069'
_FOLLOW_UP = "\u2068follow up\u2069"
_NAME, _KEY, _VALUE = "probe_tool", "probe_key", "probe_value"
_ID = "000000000"  # the id of every call; Mistral's templates want nine letters or digits
_PADDING = ("\t\n", "\n\t")  # around a content, to see whether a template strips it
_FENCED_TOOL = "python"  # the tool that fenced code calls
_LAST_WORDS = "\u2068words\u2069"
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
    strips: tuple[bool, bool] = (False, False)
    """Whether white space at the beginning and at the end of the content is dropped."""

    def written(self, content: str) -> str:
        """Return a content as the template writes it."""
        at_start, at_end = self.strips
        content = content.lstrip() if at_start else content
        content = content.rstrip() if at_end else content
        return json.dumps(content, ensure_ascii=False)[1:-1] if self.as_json else content


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
        except Exception as error:  # a template is a program, which may raise anything
            name = self.tokenizer.name_or_path
            raise ValueError(f"the chat template of {name!r} refuses a message: {error}") from error

    def prompt_frame(self) -> Frame:
        """The text around a task, up to the start of the first completion."""
        return self._frame([_user()], _USER)

    def observation_frame(self, marks: CallMarks | None = None) -> Frame:
        """The text around a tool's output, between two completions.

        Args:
            marks: How native calls are written; None if calls are ordinary text.

        Raises:
            ValueError: The template refuses or changes a tool's output, or it writes the name of
                the tool, which is not known: there are several.
        """
        frames = [self._observation_frame(marks, name) for name in self.tool_names]
        if any(replace(each, left=frames[0].left) != frames[0] for each in frames):
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} writes a tool's name before "
                f"its output, and there are several tools: {', '.join(self.tool_names)}. Use "
                "another template, or an environment with one tool"
            )
        return frames[0]

    def _observation_frame(self, marks: CallMarks | None, name: str) -> Frame:
        output = _tool(_TOOL, name)
        if not self.tools or marks is None:
            messages = [_user(), {"role": "assistant", "content": _ASSISTANT}, output]
            return self._frame(messages, _TOOL, after=_ASSISTANT)
        called = self.call(name=name)
        text = self.render([_user(), called, output], generation=True)
        _, end, _ = _find_json(text, name)
        closing = text.find(marks.closing, end) + len(marks.closing)
        if marks.in_list and not marks.closing:
            closing = text.find("]", end) + 1
        return self._frame([_user(), called, output], _TOOL, start=max(end, closing))

    def follow_up_frame(self) -> Frame:
        """The text around a user's message between two completions.

        Raises:
            ValueError: The template refuses or changes it.
        """
        words = {"role": "assistant", "content": _ASSISTANT}
        second = {"role": "user", "content": _FOLLOW_UP}
        return self._frame([_user(), words, second], _FOLLOW_UP, after=_ASSISTANT)

    def written_call(self, words: str, call: ToolCall, marks: CallMarks) -> str:
        """Return a turn with a native call as the template writes it, up to the end of the call.

        Args:
            words: Text before the call.
            call: The call.
            marks: What `call_marks` found.
        """
        arguments: Any = dict(call.arguments)
        named = {marks.name_key: call.name, marks.arguments_key: arguments}
        content = json.dumps([named] if marks.in_list else named, ensure_ascii=False)
        plain = f"{words}{marks.opening}{content}{marks.closing}"
        prompt = self.render([_user()], generation=True)
        for given in (arguments, json.dumps(arguments, ensure_ascii=False)):
            try:
                text = self.render([_user(), _call(words, given, call.name)])
            except ValueError:
                continue
            body = text.removeprefix(prompt)
            end = body.rfind(marks.closing) + len(marks.closing) if marks.closing else 0
            if body == text or (marks.closing and end < len(marks.closing)):
                continue
            body = body[:end] if end else body[: body.rfind("]" if marks.in_list else "}") + 1]
            found = next(call_blocks(body, marks), None)
            if found is not None and read_call(found.content, marks) == call:
                return body
        return plain

    def end_of_turn(self) -> Frame:
        """The text after the assistant's last turn, in `before`; there is no content after it."""
        text = self.render([_user(), {"role": "assistant", "content": _ASSISTANT}])
        left, words, after = text.rpartition(_ASSISTANT)
        return Frame(after, "", left=left + words)

    @property
    def tool_names(self) -> tuple[str, ...]:
        """The names of the tools; that of the tool for fenced code if there are no schemas."""
        functions = (each.get("function", each) for each in self.tools)
        names = tuple(str(each["name"]) for each in functions if "name" in each)
        return names or (_FENCED_TOOL,)

    def call_marks(self) -> CallMarks:
        """Find out how the template writes a tool call.

        Raises:
            ValueError: The template takes no tools, or writes calls in a form other than JSON.
        """
        name = self.tokenizer.name_or_path
        if not self.tools:
            return HERMES
        if not self._shows_tools():
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
        if not written.strip():
            raise ValueError(
                f"the chat template of {name!r} writes no calls; use another template, or calls in "
                'fences: env.kwargs.call_format = "fenced"'
            )
        if not call:
            raise ValueError(
                f"the chat template of {name!r} writes a call as {written[:200]!r}, which is not "
                'JSON; use another template, or calls in fences: env.kwargs.call_format = "fenced"'
            )
        opening, closing = written[:start].strip(), written[end:].strip()
        after_words = self._opening_after_words()
        if after_words not in (None, opening):
            raise ValueError(
                f"the chat template of {name!r} writes {opening!r} before a call alone and "
                f"{after_words!r} between words and a call; use another template, or calls in "
                'fences: env.kwargs.call_format = "fenced"'
            )
        in_list = opening.endswith("[") and closing.startswith("]")
        return CallMarks(
            opening=opening[:-1].strip() if in_list else opening,
            closing=closing[1:].strip() if in_list else closing,
            name_key=next(key for key, value in call.items() if value == _NAME),
            arguments_key=next(key for key, value in call.items() if _VALUE in json.dumps(value)),
            in_list=in_list,
        )

    def _shows_tools(self) -> bool:
        without = ChatTemplate(self.tokenizer, self.system, (), self.clock)
        try:
            return self.render([_user()]) != without.render([_user()])
        except ValueError:
            self.render([_user()])  # a template that cannot do without tools shows them
            return True

    def _opening_after_words(self) -> str | None:
        """What stands between words and a call; None if the template does not write both."""
        try:
            text = self.render([_user(), self.call(_ASSISTANT)])
        except ValueError:
            return None
        start, _, _ = _find_json(text, _NAME)
        words = text.find(_ASSISTANT)
        return text[words + len(_ASSISTANT) : start].strip() if 0 <= words < start else None

    def call(self, words: str = "", name: str = _NAME) -> Message:
        """Return a message with a tool call, its arguments in the form that the template wants.

        Args:
            words: Text of the message, before the call.
            name: Name of the tool.
        """
        arguments: dict[str, str] = {_KEY: _VALUE}
        try:
            self.render([_user(), _call(words, arguments, name)])
        except ValueError:
            return _call(words, json.dumps(arguments), name)
        return _call(words, arguments, name)

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
        frame = Frame(prefix, suffix, as_json, left=text[:start])
        padded = content.join(_PADDING)
        text = self.render(
            [
                {**each, "content": padded} if each["content"] == content else each
                for each in messages
            ],
            generation=True,
        )
        for at_start, at_end in itertools.product((False, True), repeat=2):
            stripping = replace(frame, strips=(at_start, at_end))
            if f"{prefix}{stripping.written(padded)}{suffix}" in text:
                return stripping
        return frame


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
    if template.tools and template.call_marks().opening:
        turns[:-1] = [template.call(each, name) for each in contents[:-1]]
    elif template.tools:  # in this form, a message with a call contains nothing else
        turns[:-1], thoughts = [template.call(name=name)] * _NUM_CALLS, thoughts[-1:]
        contents[:-1] = [""] * _NUM_CALLS
    messages = [_user()]
    for turn, output in zip(turns, outputs, strict=False):
        messages += [turn, _tool(output, name)]
    messages.append(turns[-1])
    return GrowingConversation(
        thoughts=tuple(thoughts),
        outputs=tuple(outputs),
        texts=tuple(template.render(messages[: n + 1]) for n in range(len(messages))),
        prompts=tuple(
            template.render(messages[:n], generation=True) for n in range(1, len(messages), 2)
        ),
        contents=tuple(contents),
        has_calls=bool(template.tools),
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
        frame = template.observation_frame(template.call_marks() if template.tools else None)
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


def _tool(content: str, name: str) -> Message:
    return {"role": "tool", "content": content, "name": name, "tool_call_id": _ID}


def _call(content: str, arguments: Mapping[str, Any] | str, name: str) -> Message:
    function = {"name": name, "arguments": arguments}
    calls = [{"type": "function", "id": _ID, "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls}

"""Finds what a tokenizer's chat template puts around messages, by rendering some. Text, no tokens.

A template is rendered with stand-ins for contents, once, at start-up. From then on a conversation
is only appended to. That is correct for a template that itself only appends; `prefix_stability`
reports what any other template rewrites.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

USER, ASSISTANT = "\u2068user\u2069", "\u2068assistant\u2069"  # stand-ins for contents
FOLLOW_UP = "\u2068follow up\u2069"
CALL_ID = "000000000"  # of a call without an id; Mistral's templates want nine letters or digits
_PADDING = ("\t\n", "\n\t")  # around a content, to see whether a template strips it
_FENCED_TOOL = "python"  # the tool that fenced code calls

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

    def read(self, written: str) -> str:
        """Return the content of what `written` returned; as it is, if that was cut."""
        try:
            return str(json.loads(f'"{written}"')) if self.as_json else written
        except ValueError:
            return written


@dataclass(frozen=True, slots=True)
class MadeCall:
    """A tool call to render."""

    name: str
    arguments: Mapping[str, Any]
    call_id: str = CALL_ID


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The chat template of a tokenizer, with the system prompt and tools of every conversation.

    Args:
        tokenizer: A Hugging Face tokenizer with a template that knows the role `tool`.
        system: System prompt; empty for none.
        tools: JSON schemas of functions, as for `apply_chat_template`; empty for none.
        clock: Local time that a template is given which asks for the time; None: the real time. A
            run freezes it: prompts must be the same when the run is resumed or audited.
        is_in_system_message: Whether the tools are also given as a key of the system message, where
            the templates of Phi-4 look for them.
    """

    tokenizer: Any
    system: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    clock: datetime | None = None
    is_in_system_message: bool = False

    def render(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        """Render a conversation.

        Raises:
            ValueError: The template refuses a message; the text contains the template's reason.
        """
        opening: list[Message] = []
        if self.system or self.is_in_system_message:
            opening = [{"role": "system", "content": self.system}]
        if self.is_in_system_message:
            functions = [each.get("function", each) for each in self.tools]
            opening = [{**opening[0], "tools": json.dumps(functions, ensure_ascii=False)}]
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
        return self.frames([user()], [USER])[0]

    def follow_up_frame(self) -> Frame:
        """The text around a user's message between two completions.

        Raises:
            ValueError: The template refuses or changes it.
        """
        second = {"role": "user", "content": FOLLOW_UP}
        return self.frames([user(), words(), second], [FOLLOW_UP], after=ASSISTANT)[0]

    def end_of_turn(self) -> Frame:
        """The text after the assistant's last turn, in `before`; there is no content after it."""
        text = self.render([user(), words()])
        left, written, after = text.rpartition(ASSISTANT)
        return Frame(after, "", left=left + written)

    @property
    def tool_names(self) -> tuple[str, ...]:
        """The names of the tools; that of the tool for fenced code if there are no schemas."""
        functions = (each.get("function", each) for each in self.tools)
        names = tuple(str(each["name"]) for each in functions if "name" in each)
        return names or (_FENCED_TOOL,)

    def shows_tools(self) -> bool:
        """Whether the prompt depends on the tools."""
        without = replace(self, tools=(), is_in_system_message=False)
        try:
            return self.render([user()]) != without.render([user()])
        except ValueError:
            self.render([user()])  # a template that cannot do without tools shows them
            return True

    def calls(self, calls: Sequence[MadeCall], words: str = "") -> Message:
        """Return a message with tool calls, their arguments in the form that the template wants.

        Args:
            calls: The calls.
            words: Text of the message, before the calls.
        """
        try:
            self.render([user(), _calling(words, calls, as_text=False)])
        except ValueError:
            return _calling(words, calls, as_text=True)
        return _calling(words, calls, as_text=False)

    def frames(
        self,
        messages: Sequence[Message],
        contents: Sequence[str],
        *,
        after: str = "",
        start: int = 0,
    ) -> tuple[Frame, ...]:
        """Split a rendered conversation around contents; only the last frame has a text `after`.

        What comes before the first content counts from `start`, or from the end of the text
        `after`.

        Raises:
            ValueError: The template drops or changes a content.
        """
        text = self.render(messages, generation=True)
        written = [each if each in text else _as_json(each) for each in contents]
        places = [text.find(each, start) for each in written]
        is_kept = all(text.count(each) == 1 for each in written) and places == sorted(places)
        if not is_kept or after not in text:
            role = messages[-1]["role"]
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not keep the content "
                f"of a {role!r} message as it is; use a template that does"
            )
        if after:
            start = text.index(after) + len(after)
        starts = [start, *(place + len(each) for place, each in zip(places, written, strict=True))]
        befores = [text[begin:place] for begin, place in zip(starts, places, strict=False)]
        rest = text[starts[-1] :]
        found = [
            Frame(before, "", as_json=each not in text, left=text[:begin])
            for before, each, begin in zip(befores, contents, starts, strict=False)
        ]
        padded = {each: each.join(_PADDING) for each in contents}
        around = self.render(
            [
                {**each, "content": padded.get(each["content"], each["content"])}
                for each in messages
            ],
            generation=True,
        )
        stripping = [
            _stripping(frame, padded[content], follows, around)
            for frame, content, follows in zip(found, contents, (*befores[1:], rest), strict=True)
        ]
        return (*stripping[:-1], replace(stripping[-1], after=rest))


def _stripping(frame: Frame, padded: str, follows: str, text: str) -> Frame:
    """Return a frame that strips its content as the template strips it in a text."""
    for at_start, at_end in itertools.product((False, True), repeat=2):
        stripping = replace(frame, strips=(at_start, at_end))
        if f"{frame.before}{stripping.written(padded)}{follows}" in text:
            return stripping
    return frame


def _as_json(content: str) -> str:
    return json.dumps(content, ensure_ascii=False)[1:-1]


def user() -> Message:
    """Return the stand-in for a task."""
    return {"role": "user", "content": USER}


def words() -> Message:
    """Return the stand-in for a turn of the assistant without a call."""
    return {"role": "assistant", "content": ASSISTANT}


def tool(content: str, name: str, call_id: str = CALL_ID) -> Message:
    """Return a message with a tool's output."""
    return {"role": "tool", "content": content, "name": name, "tool_call_id": call_id}


def _calling(content: str, calls: Sequence[MadeCall], *, as_text: bool) -> Message:
    made = [
        {
            "type": "function",
            "id": each.call_id,
            "function": {
                "name": each.name,
                "arguments": (
                    json.dumps(each.arguments, ensure_ascii=False) if as_text else each.arguments
                ),
            },
        }
        for each in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}

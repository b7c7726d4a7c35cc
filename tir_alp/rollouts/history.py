"""Writes a conversation as its chat template does now, and compares that with what was sampled.

A conversation is told turn by turn. As long as the template writes what was said before as the
policy has seen it, a trace of tokens goes on. Where it writes something else, e.g. without the
thoughts of earlier turns, the next completion belongs to a new trace, whose prompt is the text of
the template. Text in, text out; `Renderer.following` encodes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from tir_alp.rollouts.chat_template import (
    ASSISTANT,
    CALL_ID,
    ChatTemplate,
    Frame,
    MadeCall,
    Message,
    tool,
    user,
)
from tir_alp.rollouts.formats import (
    PROBE,
    CallForm,
    ParameterTypes,
    find_blocks,
    read_calls,
    written_call,
)
from tir_alp.rollouts.mark_guard import GuardedTexts, MarkGuard, mapped
from tir_alp.rollouts.text_encoder import Ids
from tir_alp.tools.calls import ToolCall
from tir_alp.types import TokenSpan

_THOUGHT = "\u2068thought\u2069"
_OUTPUT = "\u2068output\u2069"
_ANALYSIS = re.compile(r"<\|channel\|>analysis<\|message\|>(.*?)(?:<\|end\|>|$)", re.DOTALL)
_FINAL = re.compile(r"<\|channel\|>final<\|message\|>(.*)", re.DOTALL)

Role = Literal["tool", "user"]


@dataclass(frozen=True, slots=True)
class SaidTurn:
    """One turn of the assistant, and what followed it, as text."""

    text: str
    """What the policy wrote, without the token that ended the turn."""
    answers: tuple[str, ...]
    """The outputs of the calls, or one message, as they are shown: long ones without their middle.
    """
    role: Role = "tool"
    """Whose message the answer is."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was said so far."""

    opening: tuple[Message, ...]
    """The messages with which it began: the task, or those that an environment put in its place."""
    turns: tuple[SaidTurn, ...] = ()

    @classmethod
    def about(cls, task: str) -> Conversation:
        """Return a conversation that consists of a task."""
        return cls(({"role": "user", "content": task},))

    def and_then(self, turn: SaidTurn) -> Conversation:
        """Return the conversation with one more turn."""
        return replace(self, turns=(*self.turns, turn))


@dataclass(frozen=True, slots=True)
class Following:
    """What the policy reads before its next completion."""

    span: TokenSpan
    """An observation, which the trace has next, or the prompt of a new trace."""
    begins: bool
    """Whether a new trace begins."""


def checked_messages(messages: Any) -> tuple[Message, ...]:
    """Check the messages that an environment puts in place of a conversation.

    Args:
        messages: A list of `{"role": "user" or "assistant", "content": TEXT}`, which begins and
            ends with a message of the user.

    Raises:
        ValueError: They are something else.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"info['messages'] is {messages!r:.60}, which is no list of messages")
    for each in messages:
        is_message = isinstance(each, Mapping) and each.keys() == {"role", "content"}
        if not is_message or each["role"] not in ("user", "assistant"):
            raise ValueError(
                f"info['messages'] has {each!r:.60}; a message has 'role', which is 'user' or "
                "'assistant', and 'content', and nothing else"
            )
        if not isinstance(each["content"], str):
            raise ValueError(f"info['messages'] has the content {each['content']!r:.60}: no text")
    if messages[0]["role"] != "user" or messages[-1]["role"] != "user":
        raise ValueError("info['messages'] begins and ends with a message of the user")
    return tuple(dict(each) for each in messages)


class History:
    """Writes conversations with the chat template of a run.

    Args:
        template: The template.
        guard: Keeps marks out of messages.
        form: How native calls are written; None if calls are ordinary text.
        types: Parameter types of the tools.
    """

    def __init__(
        self,
        template: ChatTemplate,
        guard: MarkGuard,
        form: CallForm | None,
        types: ParameterTypes,
    ) -> None:
        self._template, self._guard, self._types = template, guard, types
        self._form = form if form is not None and form.is_in_history else None
        self._marks = form.all_marks if form is not None else ()

    def prompt(self, conversation: Conversation) -> Ids:
        """Encode a conversation as the template writes it, up to the next completion.

        Raises:
            ValueError: The template refuses it.
        """
        texts = self._guarded(conversation)
        return texts.encoded(self._written(conversation, texts), begins=True)

    def rewritten(
        self, before: Conversation, now: Conversation, frames: Sequence[Frame]
    ) -> Ids | None:
        """Encode a conversation if the template rewrites what was said; None if it only appends.

        A template that refuses the conversation writes nothing: it goes on as it was sampled.

        Args:
            before: The conversation before the last turn.
            now: The conversation.
            frames: The text around each answer of the last turn.
        """
        texts = self._guarded(now)
        try:
            known, whole = self._written(before, texts), self._written(now, texts)
        except ValueError:
            return None
        if whole == known + self._said(now.turns[-1], frames, texts):
            return None
        return texts.encoded(whole, begins=True)

    def _guarded(self, conversation: Conversation) -> GuardedTexts:
        texts = [str(each["content"]) for each in conversation.opening]
        for turn in conversation.turns:
            texts += [turn.text, *turn.answers, *self._argument_texts(turn.text)]
        return self._guard.over(texts)

    def _written(self, conversation: Conversation, texts: GuardedTexts) -> str:
        """Return the conversation as the template writes it, up to the next completion."""
        return self._template.render([*self._messages(conversation, texts)], generation=True)

    def _said(self, turn: SaidTurn, frames: Sequence[Frame], texts: GuardedTexts) -> str:
        """Return a turn and its answers as a trace has them."""
        written = ""
        for answer, frame in zip(turn.answers, frames, strict=True):
            written += frame.before + frame.written(texts.outside(answer))
        mark = self._form.section_end if self._form else ""
        if mark and turn.text.endswith(mark) and mark in frames[0].before:
            written = written.partition(mark)[2]  # the policy wrote it
        return texts.written(turn.text, self._marks) + written + frames[-1].after

    def _called(self, turn: SaidTurn) -> list[tuple[str, str]]:
        """Return the name of the tool and the id of the call for each answer of a turn."""
        calls = read_calls(turn.text, self._form, self._types) if self._form else ()
        known = self._template.tool_names
        found = [
            (each.name if each.name in known else known[0], each.call_id or CALL_ID)
            for each in calls[: len(turn.answers)]
        ]
        return found + [(known[0], CALL_ID)] * (len(turn.answers) - len(found))

    def _messages(self, conversation: Conversation, texts: GuardedTexts) -> Iterator[Message]:
        for message in conversation.opening:
            keeps = message["role"] == "assistant"
            content = (texts.written if keeps else texts.outside)(str(message["content"]))
            yield {**message, "content": content}
        for turn in conversation.turns:
            yield self._turn(turn.text, texts)
            if turn.role == "user":
                yield from ({"role": "user", "content": texts.outside(e)} for e in turn.answers)
                continue
            for answer, (name, call_id) in zip(turn.answers, self._called(turn), strict=True):
                yield tool(texts.outside(answer), name, texts.outside(call_id))

    # ------------------------------------------------------------------- turns of the assistant

    def _turn(self, text: str, texts: GuardedTexts) -> Message:
        """Return a turn of the assistant as the message that the template is given."""
        form = self._form
        if form is None or self._keeps_calls:
            return self._words(texts.written(text, self._marks))
        blocks = [*find_blocks(text, form, self._types)]
        reads = [each for block in blocks for each in block.calls]
        made = [
            MadeCall(
                each.call.name, mapped(each.call.arguments, texts.written), each.call_id or CALL_ID
            )
            for each in reads
            if isinstance(each.call, ToolCall)
        ]
        if form.name == "harmony":
            return self._channels(text, made, texts)
        if not made or len(made) < len(reads):
            return self._words(texts.written(text, self._marks))
        before = text[: blocks[0].start].rstrip().removesuffix(form.section_start).rstrip()
        words = self._words(texts.written(before))
        return {**self._template.calls(made, str(words["content"])), **words}

    def _words(self, text: str) -> dict[str, Any]:
        """Return a message with text, its thought apart if the template wants that."""
        message: dict[str, Any] = {"role": "assistant", "content": text}
        thought, mark, rest = text.partition("</think>")
        if not mark or not self._wants_thoughts_apart:
            return message
        thought = thought.rpartition("<think>")[2].strip("\n")
        return message | {"content": rest.lstrip("\n"), "reasoning_content": thought}

    def _channels(self, text: str, made: Sequence[MadeCall], texts: GuardedTexts) -> Message:
        """Return a turn in the channels of gpt-oss, whose template is given them apart."""
        thought = texts.written("\n".join(_ANALYSIS.findall(text)))
        if made:
            return {**self._template.calls(made), "thinking": thought}
        final = _FINAL.search(text)
        content = texts.written(text if final is None else final[1])
        return {"role": "assistant", "content": content, "thinking": thought}

    def _argument_texts(self, text: str) -> Iterator[str]:
        """The arguments of the calls in a turn, in which escaped characters are not."""
        if self._form is None:
            return
        for each in read_calls(text, self._form, self._types):
            if isinstance(each.call, ToolCall):
                yield json.dumps(dict(each.call.arguments), ensure_ascii=False)

    @cached_property
    def _keeps_calls(self) -> bool:
        """Whether a call may be given to the template as text of the turn, as it was written."""
        assert self._form is not None
        name = self._template.tool_names[0]
        output = tool(_OUTPUT, name)
        try:
            text = written_call(self._template, self._form, ASSISTANT, ToolCall(name, PROBE))
            call = self._template.calls([MadeCall(name, PROBE)], ASSISTANT)
            apart = self._template.render([user(), call, output], generation=True)
            as_text = {"role": "assistant", "content": text}
            return apart == self._template.render([user(), as_text, output], generation=True)
        except ValueError:
            return False

    @cached_property
    def _wants_thoughts_apart(self) -> bool:
        """Whether the template takes thoughts apart, and does not find them in the text."""
        if "reasoning_content" not in str(self._template.tokenizer.chat_template):
            return False
        text = f"<think>\n{_THOUGHT}\n</think>\n\n{ASSISTANT}"
        try:
            prompt = self._template.render([user()], generation=True)
            whole = self._template.render([user(), {"role": "assistant", "content": text}])
        except ValueError:
            return False
        return not _writes(whole, prompt, text)


def _writes(whole: str, prompt: str, text: str) -> bool:
    """Whether a conversation goes on after the prompt with a turn, white space apart."""
    found, before, due = ("".join(each.split()) for each in (whole, prompt, text))
    overlap = next((n for n in range(len(due), 0, -1) if before.endswith(due[:n])), 0)
    return found.startswith(before + due[overlap:])

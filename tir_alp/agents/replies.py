"""What a model wrote, as the message that a client gets. Pure.

This is the one place of the wing where calls are read from a model's text and where the rule is
made that ends a completion.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tir_alp.agents.messages import Call, Message
from tir_alp.rollouts.formats import CallForm, ParameterTypes, find_blocks, watcher
from tir_alp.rollouts.stop_rule import Watch
from tir_alp.tools.calls import ToolCall, call_watcher
from tir_alp.tools.fenced import code_blocks

_ID_LENGTH = 9  # letters and digits: Mistral's templates take no other ids


@dataclass(frozen=True, slots=True)
class CallStyle:
    """How a model writes the calls of one request.

    Args:
        form: How a call is written; None: a Python block between fences is a call.
        types: Which parameters of the tools are texts.
        fenced_tool: Name of the tool that a Python block calls, and of its argument.
    """

    form: CallForm | None
    types: ParameterTypes = field(default_factory=ParameterTypes)
    fenced_tool: tuple[str, str] = ("python", "code")


@dataclass(frozen=True, slots=True)
class ReplyRule:
    """How a completion ends, and how it is read."""

    style: CallStyle | None = None
    """None: nothing is a call."""
    forced: str = ""
    """Text of the reply that the model did not write but was given, for a call that it must make.
    """
    one_call: bool = False
    """Whether the completion ends after its first call."""
    stops: tuple[str, ...] = ()
    """Texts that end the completion; what is returned ends before them."""

    def watch(self) -> Watch | None:
        """Return a function to feed the text to, which finds where it must end; None: nowhere."""
        watches = [_stop_watch(self.stops)] if self.stops else []
        if self.style is not None and self.style.form is None:
            watches.append(call_watcher("fenced"))
        elif self.style is not None and self.style.form is not None and self.one_call:
            watch = watcher(self.style.form, self.style.types, max_calls=1)
            watch(self.forced)
            watches.append(watch)
        if not watches:
            return None
        return lambda piece: any([each(piece) for each in watches])  # each has to read every piece


def read_reply(text: str, rule: ReplyRule, name: str) -> Message:
    """Return the message that a text is to the client.

    Text around calls is its content. A call that cannot be read makes the whole text content, as
    does a call that the end of the text cuts.

    Args:
        text: What the model wrote, without the token that ended the turn.
        rule: The rule of the request.
        name: Identity of the completion within the episode, from which ids of calls are made.
    """
    if (stop := found_stop(text, rule)) is not None:
        text = text[: text.index(stop)]
    text = rule.forced + text
    content, calls = text, []
    if rule.style is not None:
        content, calls = _calls_in(text, rule.style)
    return Message(
        "assistant",
        "" if calls and not content.strip() else content,
        tuple(
            Call(
                _call_id(name, number),
                each.name,
                json.dumps(dict(each.arguments), ensure_ascii=False),
            )
            for number, each in enumerate(calls)
        ),
    )


def found_stop(text: str, rule: ReplyRule) -> str | None:
    """Return the stop text that comes first in a text; None if there is none."""
    found = [each for each in rule.stops if each in text]
    return min(found, key=text.index, default=None)


def _calls_in(text: str, style: CallStyle) -> tuple[str, list[ToolCall]]:
    """Return the text around the calls, and the calls."""
    form = style.form
    if form is None:
        block = next((each for each in code_blocks(text) if each.is_python), None)
        if block is None:
            return text, []
        tool, argument = style.fenced_tool
        return text[: block.start] + text[block.end :], [ToolCall(tool, {argument: block.code})]
    calls: list[ToolCall] = []
    words, position = "", 0
    for found in find_blocks(text, form, style.types):
        read = [each.call for each in found.calls if isinstance(each.call, ToolCall)]
        if len(read) < len(found.calls):
            return text, []
        words += text[position : found.start]
        position = found.end
        calls += read
    words += text[position:]
    if calls:
        for mark in filter(None, (form.section_start, form.section_end)):
            words = words.replace(mark, "")
    return words, calls


def _call_id(name: str, number: int) -> str:
    return hashlib.blake2b(f"{name}/{number}".encode()).hexdigest()[:_ID_LENGTH]


def _stop_watch(stops: Sequence[str]) -> Callable[[str], bool]:
    longest = max(map(len, stops))
    rest = ""

    def watch(piece: str) -> bool:
        nonlocal rest
        text = rest + piece
        rest = text[max(0, len(text) - longest + 1) :] if longest > 1 else ""
        return any(each in text for each in stops)

    return watch

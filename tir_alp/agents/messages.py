"""Messages of a conversation in one form, whichever API they came through. Pure.

Two messages are the same if they say the same: the arguments of a call are compared as JSON values,
since clients parse them and write them again. Everything else is compared as it is.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

Role = Literal["system", "user", "assistant", "tool", "text"]
"""Who wrote a message; "text": nobody in a conversation, it is a part of a prompt as it stands."""

_ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Call:
    """A call that an assistant's message makes."""

    call_id: str
    name: str
    arguments: str
    """The arguments as JSON text, as they were received or sent."""

    @property
    def identity(self) -> tuple[str, str, str]:
        """Equal for calls that say the same."""
        return self.call_id, self.name, _canonical(self.arguments)


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Example: `Message("tool", "42", call_id="a1b2c3d4e")`.
    """

    role: Role
    content: str = ""
    calls: tuple[Call, ...] = ()
    """The calls of an assistant's message."""
    call_id: str = ""
    """In a tool's message, the id of the call that it answers."""
    name: str = ""
    """Name of the participant, where the client gives one."""
    ending: str = ""
    """What ended a reply to a text as it stands, and was not sent: a stop text, or the text of a
    mark."""

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for messages that say the same."""
        calls = tuple(each.identity for each in self.calls)
        return self.role, self.content, calls, self.call_id, self.name, self.ending


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What a request asks the model to go on with."""

    messages: tuple[Message, ...]
    tools: str = ""
    """The tools that the model is shown, as canonical JSON of a list of OpenAI's function schemas;
    empty for none."""

    @property
    def num_chars(self) -> int:
        """About how long it is written: its texts, and a few marks for each message and call."""
        calls = [call for each in self.messages for call in each.calls]
        texts = sum(len(each.content) for each in self.messages)
        return (
            len(self.tools)
            + texts
            + sum(len(each.arguments) for each in calls)
            + 16 * (len(self.messages) + len(calls))
        )

    @property
    def is_text(self) -> bool:
        """Whether it is one text as it stands, in parts: what the client wrote, and replies."""
        return bool(self.messages) and self.messages[0].role == "text"

    def text(self, num_known: int = 0) -> str:
        """Return the text that its messages are, without the first ones."""
        return "".join(each.content + each.ending for each in self.messages[num_known:])

    def tool_schemas(self) -> list[dict[str, Any]]:
        """Return the schemas."""
        return json.loads(self.tools) if self.tools else []


def tools_text(schemas: Sequence[Mapping[str, Any]]) -> str:
    """Return schemas as `Dialogue.tools` has them."""
    return json.dumps([*schemas], ensure_ascii=False) if schemas else ""


def num_common(left: Sequence[Message], right: Sequence[Message]) -> int:
    """Return the number of messages with which both conversations begin."""
    number = 0
    for one, other in zip(left, right, strict=False):
        if one.identity != other.identity:
            break
        number += 1
    return number


def difference(known: Message, given: Message) -> str:
    """Say in what a message differs from the one that the trace has in its place."""
    if known.role != given.role:
        return f"the role is {given.role!r}, and was {known.role!r}"
    if known.content != given.content:
        at = next(
            (
                index
                for index, (a, b) in enumerate(zip(known.content, given.content, strict=False))
                if a != b
            ),
            min(len(known.content), len(given.content)),
        )
        there = given.content[at : at + 20]
        return f"the content differs from character {at} on ({there!r} in place of " + (
            f"{known.content[at : at + 20]!r})"
        )
    if known.call_id != given.call_id or known.name != given.name:
        return "it answers another call" if known.call_id != given.call_id else "the name differs"
    return f"it has the calls {_named(given)}, and had {_named(known)}"


def to_record(message: Message) -> dict[str, Any]:
    """Return a message as `json.dumps` takes it, without empty fields."""
    record: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        record["calls"] = [[each.call_id, each.name, each.arguments] for each in message.calls]
    for field in ("call_id", "name", "ending"):
        if value := getattr(message, field):
            record[field] = value
    return record


def from_record(record: Mapping[str, Any]) -> Message:
    """Return the message of a record.

    Raises:
        ValueError: The record is not that of a message.
    """
    try:
        calls = tuple(Call(*map(_text, each)) for each in record.get("calls", ()))
        rest = {key: _text(value) for key, value in record.items() if key != "calls"}
        role = rest.pop("role")
        if role not in _ROLES:
            raise ValueError(f"the role is {role!r}")
        return Message(cast(Role, role), calls=calls, **rest)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a message: {record!r:.80} ({error!r})") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.60} is not a text")
    return value


def _named(message: Message) -> str:
    return ", ".join(f"{each.name}({each.arguments:.40})" for each in message.calls) or "none"


@functools.lru_cache(4096)
def _canonical(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments

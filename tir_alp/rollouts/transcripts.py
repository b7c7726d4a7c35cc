"""Conversations to imitate: read from the forms in which data sets hold them. Text, no tokens.

Three forms are told apart by their keys:

* OpenAI's chat form, which verl's multi-turn data has as well: `messages`, each with `role`,
  `content`, `tool_calls` and optionally `weight` (0: not to be learnt);
* ShareGPT's form: `conversations`, each with `from` and `value`, calls as JSON in a message from
  `function_call`, and optionally `system` beside it;
* `prompt` and `completion`, both texts or both messages.

A row may have `tools`, a list of JSON schemas (or its JSON) that the chat template shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from tir_alp.tools.calls import ToolCall

Role = Literal["system", "user", "assistant", "tool"]

_SHAREGPT: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
_SAME: dict[str, Role] = {"developer": "system", "function": "tool"}
_COLUMNS = ("messages", "conversations")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    text: str
    call: ToolCall | None = None
    """The tool call that follows the text, for the assistant."""
    trainable: bool = True
    """Whether the assistant's message is to be learnt."""


@dataclass(frozen=True, slots=True)
class Transcript:
    r"""A conversation that begins with a user and ends with the assistant.

    Example: a question, a call, its result and the answer:

        Transcript("rows.jsonl:7", "", (
            Message("user", "What is 6*7?"),
            Message("assistant", "", ToolCall("python", {"code": "print(6*7)"})),
            Message("tool", "42"),
            Message("assistant", r"\boxed{42}"),
        ))
    """

    transcript_id: str
    """File and row."""
    system: str
    """The system message; empty if there is none."""
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the tools, if the row has some of its own."""


def read_transcript(row: Any, location: str, column: str | None = None) -> Transcript:
    """Convert a row to a conversation.

    Args:
        row: An object with one of the forms above.
        location: File and row, for messages.
        column: Column that holds the messages; None: `messages` or `conversations`.

    Raises:
        ValueError: The row is broken; the message begins with its location.
    """
    try:
        found = _messages(_listed(row, column))
        system = row.get("system") or ""
        if not isinstance(system, str):
            raise ValueError(f"'system' must be a text, not {system!r:.60}")
        if found and found[0].role == "system":
            system, found = found[0].text, found[1:]
        _check_order(found)
        return Transcript(location, system, tuple(found), _tools(row.get("tools")))
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from None


def _listed(row: Any, column: str | None) -> Sequence[Any]:
    """The messages of a row, unparsed."""
    if not isinstance(row, Mapping):
        raise ValueError('not an object: write {"messages": [...]}')
    if column is None and "prompt" in row and "completion" in row:
        asked, written = row["prompt"], row["completion"]
        asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        if isinstance(written, str):
            written = [{"role": "assistant", "content": written}]
        if isinstance(asked, list) and isinstance(written, list):
            shown = [{**each, "weight": 0} if _is_written(each) else each for each in asked]
            return [*shown, *written]
        raise ValueError("'prompt' and 'completion' must both be texts or lists of messages")
    names = _COLUMNS if column is None else (column,)
    name = next((each for each in names if each in row), None)
    if name is None:
        there = ", ".join(map(repr, [*row][:20])) or "none"
        raise ValueError(
            f"there is no column {' or '.join(map(repr, names))}; the row has {there}: set "
            "data.column"
        )
    messages = row[name]
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise ValueError(f"{name!r} is a text that is not JSON ({error})") from None
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{name!r} must be a list of messages that is not empty")
    return messages


def _is_written(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "assistant"


def _messages(listed: Sequence[Any]) -> list[Message]:
    found: list[Message] = []
    for number, each in enumerate(listed, start=1):
        try:
            message = _message(each)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
        before = found[-1] if found else None
        if (  # ShareGPT has a call as a message of its own, after the words before it
            before is not None
            and before.role == message.role == "assistant"
            and before.call is None
            and not message.text
        ):
            found[-1] = Message("assistant", before.text, message.call, before.trainable)
        else:
            found.append(message)
    return found


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"must be an object, not {message!r:.60}")
    if "from" in message:
        author, content = message["from"], message.get("value")
        role = _SHAREGPT.get(author) if isinstance(author, str) else None
        if role is None:
            raise ValueError(f"there is no author {author!r:.60}: use one of {[*_SHAREGPT]}")
        if author == "function_call":
            return Message("assistant", "", _call(_loaded(content, "the call")))
        return Message(role, _text(content))
    author = message.get("role")
    role = _SAME.get(author, author) if isinstance(author, str) else None
    if role not in ("system", "user", "assistant", "tool"):
        raise ValueError(f"there is no role {author!r:.60}: use system, user, assistant or tool")
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, Sequence):
        raise ValueError(f"'tool_calls' must be a list, not {calls!r:.60}")
    if calls and role != "assistant":
        raise ValueError(f"a message of the {role!r} makes a call: only the assistant can")
    if calls and len(calls) > 1:
        raise ValueError(f"makes {len(calls)} calls: an episode makes one call per message")
    call = None
    if calls:
        made = calls[0]
        call = _call(made.get("function", made) if isinstance(made, Mapping) else made)
    weight = message.get("weight")
    if weight is not None and weight not in (0, 1):
        raise ValueError(f"'weight' must be 0 or 1, not {weight!r:.60}")
    content = message.get("content")
    text = "" if content is None and (call is not None or role == "tool") else _text(content)
    return Message(role, text, call, weight != 0)


def _text(content: Any) -> str:
    """The text of a message, also where it is a list of pieces."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"the content must be a text, not {content!r:.60}")
    pieces = []
    for each in content:
        text = each.get("text") if isinstance(each, Mapping) else None
        if not isinstance(text, str):
            kind = each.get("type") if isinstance(each, Mapping) else each
            raise ValueError(f"only text can be learnt, and a piece of the content is {kind!r:.60}")
        pieces.append(text)
    return "".join(pieces)


def _call(call: Any) -> ToolCall:
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise ValueError(f'a call is {{"name": ..., "arguments": ...}}, not {call!r:.60}')
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _loaded(arguments, f"the arguments of {call['name']!r}")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of {call['name']!r} must be an object")
    # Parquet files give every call every key of the column, with null where it was absent.
    return ToolCall(call["name"], {k: v for k, v in arguments.items() if v is not None})


def _loaded(text: Any, what: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be JSON ({error})") from None


def _check_order(messages: Sequence[Message]) -> None:
    """Raise ValueError unless users, assistant and tools take turns as in an episode."""
    roles = [each.role for each in messages]
    if roles[:1] != ["user"]:
        raise ValueError(f"a conversation begins with a user, not with {roles[:1]}")
    if roles[-1] != "assistant":
        raise ValueError(f"a conversation ends with the assistant, not with {roles[-1]!r}")
    for number, (role, after) in enumerate(pairwise(roles), start=1):
        if (role == "assistant") == (after == "assistant") or after == "system":
            raise ValueError(f"message {number + 1} is of {after!r}, right after one of {role!r}")
    if not any(each.trainable for each in messages if each.role == "assistant"):
        raise ValueError("no message of the assistant is to be learnt: all have weight 0")


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(tools, str) and tools.strip():
        tools = _loaded(tools, "'tools'")
    if not tools:
        return ()
    if not isinstance(tools, Sequence) or not all(isinstance(each, Mapping) for each in tools):
        raise ValueError(f"'tools' must be a list of JSON schemas, not {tools!r:.60}")
    return tuple(tools)

"""`POST /v1/messages`, Anthropic's API: requests read, replies written. Pure.

A message of Anthropic's is a list of blocks. Results of tools stand in messages of the user; here
each becomes a message of its own, as the model's chat template wants them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anthropic.types import (
    InputJSONDelta,
    RawContentBlockDeltaEvent,
    RawContentBlockStartEvent,
    RawContentBlockStopEvent,
    RawMessageDeltaEvent,
    RawMessageStartEvent,
    RawMessageStopEvent,
    TextBlock,
    TextDelta,
    ToolUseBlock,
    Usage,
)
from anthropic.types import Message as AnthropicMessage

from tir_alp.agents.messages import Call, Dialogue, Message, tools_text
from tir_alp.agents.session import Answer, ApiError, Request
from tir_alp.agents.wire import (
    event,
    field,
    function_schema,
    no_media,
    number,
    pieces,
    refuse,
    stop_texts,
)

_KNOWN = {
    *("model", "messages", "system", "tools", "tool_choice", "max_tokens", "stop_sequences"),
    *("temperature", "top_p", "stream", "metadata", "service_tier", "inference_geo"),
    *("cache_control", "container", "betas", "context_management", "output_config"),
}
_REFUSED: Mapping[str, Sequence[Any]] = {
    "thinking": ({"type": "disabled"}, None),
    "mcp_servers": ([], None),
}
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@dataclass(frozen=True, slots=True)
class MessagesRequest:
    """A request, and how its reply is written."""

    asked: Request
    model: str
    stream: bool = False


def read_messages_request(body: Mapping[str, Any]) -> MessagesRequest:
    """Read a request. Raises ApiError."""
    refuse(body, _KNOWN, _REFUSED)
    limit = number(body, "max_tokens", 1, 1 << 31, whole=True)
    if limit is None:
        raise ApiError(400, "max_tokens: Field required", param="max_tokens")
    tools = _tools(body)
    choice, one_call = _tool_choice(body, tools)
    return MessagesRequest(
        Request(
            dialogue=Dialogue(_messages(body), tools_text(tools)),
            max_tokens=limit,
            temperature=number(body, "temperature", 0, 1),
            top_p=number(body, "top_p", 1e-6, 1),
            stops=stop_texts(body, "stop_sequences"),
            tool_choice=choice,
            one_call=one_call,
        ),
        model=field(body, "model", str, ""),
        stream=field(body, "stream", bool, False),
    )


def _messages(body: Mapping[str, Any]) -> tuple[Message, ...]:
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise ApiError(400, "messages: at least one message is required", param="messages")
    system = body.get("system")
    messages = [Message("system", _text(system, "system"))] if system else []
    for index, each in enumerate(given):
        messages += _read(each, f"messages.{index}")
    if messages[-1].role == "assistant":
        raise ApiError(
            400,
            "messages: the last message is the assistant's, and a reply cannot be begun for the "
            "model",
            param="messages",
        )
    return tuple(messages)


def _read(given: Any, where: str) -> list[Message]:
    """Return the messages that a message of Anthropic's is."""
    role = given.get("role") if isinstance(given, dict) else None
    content = given.get("content") if isinstance(given, dict) else None
    if role not in ("user", "assistant", "system"):
        raise ApiError(400, f"{where}.role is {role!r:.40}; it must be user or assistant")
    if isinstance(content, str):
        return [Message(role, content)]
    if not isinstance(content, list):
        raise ApiError(400, f"{where}.content is neither text nor a list of blocks", param=where)
    if role == "assistant":
        return [_reply_of(content, where)]
    messages: list[Message] = []
    texts: list[str] = []
    for index, block in enumerate(content):
        here = f"{where}.content.{index}"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append(_block_text(block, here))
        elif kind == "tool_result" and role == "user":
            if texts:
                messages.append(Message(role, "\n".join(texts)))
                texts = []
            output = _text(block.get("content") or "", f"{here}.content")
            call_id = field(block, "tool_use_id", str, "")
            messages.append(Message("tool", output, call_id=call_id))
        else:
            raise no_media(str(kind), here)
    if texts or not messages:
        messages.append(Message(role, "\n".join(texts)))
    return messages


def _reply_of(blocks: Sequence[Any], where: str) -> Message:
    content, calls = "", []
    for index, block in enumerate(blocks):
        here = f"{where}.content.{index}"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            content += _block_text(block, here)
        elif kind == "tool_use":
            if not isinstance(block.get("name"), str) or not isinstance(block.get("input"), dict):
                raise ApiError(400, f"{here} is not a call: {block!r:.80}", param=here)
            arguments = json.dumps(block["input"], ensure_ascii=False)
            calls.append(Call(field(block, "id", str, ""), block["name"], arguments))
        else:
            raise no_media(str(kind), here)
    return Message("assistant", content, tuple(calls))


def _text(given: Any, where: str) -> str:
    """Return a text that may be given as a list of blocks of text."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise ApiError(400, f"{where} is neither text nor a list of blocks", param=where)
    return "\n".join(_block_text(each, f"{where}.{index}") for index, each in enumerate(given))


def _block_text(block: Any, where: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind != "text" or not isinstance(block.get("text"), str):
        raise no_media(str(kind), where)
    return block["text"]


def _tools(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tools of a request as OpenAI's function schemas."""
    tools = []
    for index, tool in enumerate(field(body, "tools", list, [])):
        is_own = isinstance(tool, dict) and tool.get("type", "custom") in ("custom", None)
        if not is_own:
            raise ApiError(
                400, f"tools.{index} is not a tool of the client: {tool!r:.80}", param="tools"
            )
        name, description, schema = map(tool.get, ("name", "description", "input_schema"))
        tools.append(function_schema(name, description, schema, f"tools.{index}"))
    return tools


def _tool_choice(body: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    choice = field(body, "tool_choice", dict, {})
    kind = choice.get("type", "auto")
    one_call = bool(choice.get("disable_parallel_tool_use"))
    if kind in ("auto", "none"):
        return kind, one_call
    names = [each["function"]["name"] for each in tools]
    if kind == "any" and tools:
        return "required", one_call
    if kind == "tool" and choice.get("name") in names:
        return f"={choice['name']}", one_call
    raise ApiError(400, f"tool_choice names no tool: {choice!r:.80}", param="tool_choice")


# ------------------------------------------------------------------------------------- replies


def write_message(
    request: MessagesRequest,
    answers: Sequence[Answer],
    name: str,
    created: int,
    text: Callable[[int], str],
) -> str:
    """Write the reply as JSON; for the arguments see `openai_chat.write_chat`."""
    (answer,) = answers
    reply = answer.exchange.reply
    content: list[Any] = [TextBlock(type="text", text=reply.content)] if reply.content else []
    content += [
        ToolUseBlock(
            type="tool_use", id=each.call_id, name=each.name, input=json.loads(each.arguments)
        )
        for each in reply.calls
    ]
    reason, sequence = _stop(answer)
    return (
        _empty(request, answer, name)
        .model_copy(
            update={
                "content": content,
                "stop_reason": reason,
                "stop_sequence": sequence,
                "usage": Usage(input_tokens=answer.num_context, output_tokens=answer.num_sampled),
            }
        )
        .model_dump_json(exclude_unset=True)
    )


def message_events(
    request: MessagesRequest,
    answers: Sequence[Answer],
    name: str,
    created: int,
    text: Callable[[int], str],
) -> Iterator[bytes]:
    """Write the reply as server-sent events; for the arguments see `openai_chat.write_chat`."""
    (answer,) = answers
    reply = answer.exchange.reply

    def sent(made: Any) -> bytes:
        return event(made.model_dump_json(exclude_unset=True), made.type)

    yield sent(RawMessageStartEvent(type="message_start", message=_empty(request, answer, name)))
    blocks: list[tuple[Any, list[Any]]] = []
    if reply.content:
        deltas = [TextDelta(type="text_delta", text=each) for each in pieces(reply.content)]
        blocks.append((TextBlock(type="text", text=""), deltas))
    for call in reply.calls:
        deltas = [
            InputJSONDelta(type="input_json_delta", partial_json=each)
            for each in pieces(call.arguments)
        ]
        begun = ToolUseBlock(type="tool_use", id=call.call_id, name=call.name, input={})
        blocks.append((begun, deltas))
    for index, (begun, deltas) in enumerate(blocks):
        yield sent(
            RawContentBlockStartEvent(type="content_block_start", index=index, content_block=begun)
        )
        for delta in deltas:
            yield sent(
                RawContentBlockDeltaEvent(type="content_block_delta", index=index, delta=delta)
            )
        yield sent(RawContentBlockStopEvent(type="content_block_stop", index=index))
    reason, sequence = _stop(answer)
    yield sent(
        RawMessageDeltaEvent.model_validate(
            {
                "type": "message_delta",
                "delta": {"stop_reason": reason, "stop_sequence": sequence},
                "usage": {
                    "input_tokens": answer.num_context,
                    "output_tokens": answer.num_sampled,
                },
            }
        )
    )
    yield sent(RawMessageStopEvent(type="message_stop"))


def _empty(request: MessagesRequest, answer: Answer, name: str) -> AnthropicMessage:
    return AnthropicMessage(
        id=name,
        type="message",
        role="assistant",
        model=request.model,
        content=[],
        stop_reason=None,
        stop_sequence=None,
        usage=Usage(input_tokens=answer.num_context, output_tokens=0),
    )


def _stop(answer: Answer) -> tuple[str, str | None]:
    """Return why a reply ended in Anthropic's words, and the stop sequence that ended it."""
    if answer.exchange.reply.calls:
        return "tool_use", None
    if answer.is_cut:
        return "max_tokens", None
    if answer.stop is not None:
        return "stop_sequence", answer.stop
    return "end_turn", None


def error_body(error: ApiError) -> dict[str, Any]:
    """Return an error in Anthropic's form."""
    kind = _KINDS.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}

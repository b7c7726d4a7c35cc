"""`POST /v1/responses`, OpenAI's newer API: requests read, replies written. Pure.

Nothing is kept between requests: a client sends the whole conversation as its input. A reply with
words and calls is several items there, which become one message again when they come back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseCreatedEvent,
    ResponseFunctionCallArgumentsDeltaEvent,
    ResponseFunctionCallArgumentsDoneEvent,
    ResponseIncompleteEvent,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
)

from tir_alp.agents.messages import Dialogue, Message, tools_text
from tir_alp.agents.session import Answer, ApiError, Request
from tir_alp.agents.wire import (
    event,
    field,
    function_schema,
    no_media,
    number,
    pieces,
    read_call,
    refuse,
)

_KNOWN = {
    *("model", "input", "instructions", "tools", "tool_choice", "parallel_tool_calls"),
    *("max_output_tokens", "temperature", "top_p", "stream", "stream_options"),
    *("store", "include", "metadata", "user", "service_tier", "safety_identifier", "reasoning"),
    *("prompt_cache_key", "prompt_cache_retention", "truncation", "max_tool_calls"),
    *("top_logprobs", "text"),
}
_REFUSED: Mapping[str, Sequence[Any]] = {
    "previous_response_id": (None,),
    "conversation": (None,),
    "prompt": (None,),
    "background": (None, False),
}
_ROLES: Mapping[str, Any] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


@dataclass(frozen=True, slots=True)
class ResponsesRequest:
    """A request, and how its reply is written."""

    asked: Request
    model: str
    tools: Sequence[Mapping[str, Any]]
    """Name, description and parameters of each."""
    tool_choice: Any
    stream: bool = False


def read_responses_request(body: Mapping[str, Any]) -> ResponsesRequest:
    """Read a request. Raises ApiError."""
    refuse(body, _KNOWN, _REFUSED)
    form = field(field(body, "text", dict, {}), "format", dict, {}).get("type", "text")
    if form != "text":
        raise ApiError(400, f"text.format is {form!r:.40}: replies are text", param="text.format")
    tools = [*map(_tool, field(body, "tools", list, []))]
    choice = body.get("tool_choice") or "auto"
    instructions = field(body, "instructions", str, "")
    first = [Message("system", instructions)] if instructions else []
    messages = (*first, *_input(body))
    if not messages or messages[-1].role == "assistant":
        raise ApiError(
            400, "the input ends with the assistant: there is nothing to reply to", param="input"
        )
    return ResponsesRequest(
        Request(
            dialogue=Dialogue(
                messages, tools_text([{"type": "function", "function": each} for each in tools])
            ),
            max_tokens=number(body, "max_output_tokens", 1, 1 << 31, whole=True),
            temperature=number(body, "temperature", 0, 2),
            top_p=number(body, "top_p", 1e-6, 1),
            tool_choice=_tool_choice(choice, tools),
            one_call=not field(body, "parallel_tool_calls", bool, True),
        ),
        model=field(body, "model", str, ""),
        tools=tools,
        tool_choice={"type": "function", "name": choice["name"]}
        if isinstance(choice, dict)
        else choice,
        stream=field(body, "stream", bool, False),
    )


def _input(body: Mapping[str, Any]) -> list[Message]:
    given = body.get("input")
    if isinstance(given, str):
        return [Message("user", given)]
    if not isinstance(given, list):
        raise ApiError(400, "input must be a text or a list of items", param="input")
    messages: list[Message] = []
    for index, item in enumerate(given):
        where = f"input[{index}]"
        kind = item.get("type", "message") if isinstance(item, dict) else None
        match kind:
            case "message" if (role := _ROLES.get(str(item.get("role")))) is not None:
                content = _content(item.get("content"), f"{where}.content")
                messages.append(Message(role, content))
            case "function_call":
                call = read_call({"id": item.get("call_id", ""), "function": item}, where)
                if messages and messages[-1].role == "assistant":
                    messages[-1] = replace(messages[-1], calls=(*messages[-1].calls, call))
                else:
                    messages.append(Message("assistant", "", (call,)))
            case "function_call_output":
                output = _content(item.get("output"), f"{where}.output")
                messages.append(Message("tool", output, call_id=field(item, "call_id", str, "")))
            case _:
                raise no_media(str(kind), where)
    return messages


def _content(given: Any, where: str) -> str:
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise ApiError(400, f"{where} is neither text nor a list of parts", param=where)
    texts = []
    for index, part in enumerate(given):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text") or not isinstance(
            part.get("text"), str
        ):
            raise no_media(str(kind), f"{where}[{index}]")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise ApiError(400, f"only tools of the type 'function': {tool!r:.80}", param="tools")
    name, description, schema = map(tool.get, ("name", "description", "parameters"))
    return function_schema(name, description, schema, "tools")["function"]


def _tool_choice(choice: Any, tools: Sequence[Mapping[str, Any]]) -> str:
    if choice in ("auto", "none") or (choice == "required" and tools):
        return choice
    name = choice.get("name") if isinstance(choice, dict) else None
    if name not in [each["name"] for each in tools]:
        raise ApiError(400, f"tool_choice names no tool: {choice!r:.80}", param="tool_choice")
    return f"={name}"


# ------------------------------------------------------------------------------------- replies


def write_response(
    request: ResponsesRequest,
    answers: Sequence[Answer],
    name: str,
    created: int,
    text: Callable[[int], str],
) -> str:
    """Write the reply as JSON; for the arguments see `openai_chat.write_chat`."""
    (answer,) = answers
    return _response(request, answer, name, created, _items(answer, name)).model_dump_json(
        exclude_unset=True
    )


def response_events(
    request: ResponsesRequest,
    answers: Sequence[Answer],
    name: str,
    created: int,
    text: Callable[[int], str],
) -> Iterator[bytes]:
    """Write the reply as server-sent events; for the arguments see `openai_chat.write_chat`."""
    (answer,) = answers
    items = _items(answer, name)
    number_ = 0

    def sent(model: Any, kind: str, **fields: Any) -> bytes:
        nonlocal number_
        made = model.model_validate({"type": kind, "sequence_number": number_, **fields})
        number_ += 1
        return event(made.model_dump_json(exclude_unset=True), kind)

    begun = _response(request, answer, name, created, []).model_dump(exclude_unset=True)
    begun |= {"status": "in_progress", "usage": None}
    yield sent(ResponseCreatedEvent, "response.created", response=begun)
    for index, item in enumerate(items):
        place = {"output_index": index, "item_id": item["id"]}
        is_words = item["type"] == "message"
        open_item = {
            "status": "in_progress",
            **({"content": []} if is_words else {"arguments": ""}),
        }
        yield sent(
            ResponseOutputItemAddedEvent,
            "response.output_item.added",
            output_index=index,
            item=item | open_item,
        )
        if is_words:
            (part,) = item["content"]
            place |= {"content_index": 0}
            empty = part | {"text": ""}
            kind = "response.content_part.added"
            yield sent(ResponseContentPartAddedEvent, kind, part=empty, **place)
            for piece in pieces(part["text"]):
                kind = "response.output_text.delta"
                yield sent(ResponseTextDeltaEvent, kind, delta=piece, logprobs=[], **place)
            kind, whole = "response.output_text.done", part["text"]
            yield sent(ResponseTextDoneEvent, kind, text=whole, logprobs=[], **place)
            kind = "response.content_part.done"
            yield sent(ResponseContentPartDoneEvent, kind, part=part, **place)
        else:
            for piece in pieces(item["arguments"]):
                kind = "response.function_call_arguments.delta"
                yield sent(ResponseFunctionCallArgumentsDeltaEvent, kind, delta=piece, **place)
            yield sent(
                ResponseFunctionCallArgumentsDoneEvent,
                "response.function_call_arguments.done",
                arguments=item["arguments"],
                name=item["name"],
                **place,
            )
        kind = "response.output_item.done"
        yield sent(ResponseOutputItemDoneEvent, kind, output_index=index, item=item)
    whole = _response(request, answer, name, created, items).model_dump(exclude_unset=True)
    if answer.is_cut:
        yield sent(ResponseIncompleteEvent, "response.incomplete", response=whole)
    else:
        yield sent(ResponseCompletedEvent, "response.completed", response=whole)


def _items(answer: Answer, name: str) -> list[dict[str, Any]]:
    """Return the reply as the API's items."""
    reply, suffix = answer.exchange.reply, name.removeprefix("resp_")
    items: list[dict[str, Any]] = []
    if reply.content or not reply.calls:
        part = {"type": "output_text", "text": reply.content, "annotations": [], "logprobs": []}
        items.append(
            {
                "id": f"msg_{suffix}",
                "type": "message",
                "role": "assistant",
                "status": "incomplete" if answer.is_cut else "completed",
                "content": [part],
            }
        )
    items += [
        {
            "id": f"fc_{suffix}_{index}",
            "type": "function_call",
            "call_id": call.call_id,
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
        }
        for index, call in enumerate(reply.calls)
    ]
    return items


def _response(
    request: ResponsesRequest,
    answer: Answer,
    name: str,
    created: int,
    items: Sequence[Mapping[str, Any]],
) -> Response:
    read, sampled = answer.num_context, answer.num_sampled
    return Response.model_validate(
        {
            "id": name,
            "object": "response",
            "created_at": created,
            "model": request.model,
            "status": "incomplete" if answer.is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if answer.is_cut else None,
            "error": None,
            "instructions": None,
            "metadata": {},
            "output": items,
            "parallel_tool_calls": not request.asked.one_call,
            "tool_choice": request.tool_choice,
            "tools": [{"type": "function", "strict": False, **each} for each in request.tools],
            "temperature": request.asked.temperature,
            "top_p": request.asked.top_p,
            "usage": {
                "input_tokens": read,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": sampled,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": read + sampled,
            },
        }
    )

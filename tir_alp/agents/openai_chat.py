"""`POST /v1/chat/completions`: requests read, replies written. Pure.

Replies are built with the types of the `openai` package. A stream is written when the completion
has ended: its pieces arrive together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from openai.types import CompletionUsage
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionMessageFunctionToolCall,
    ChatCompletionTokenLogprob,
)
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import (
    Choice as ChunkChoice,
)
from openai.types.chat.chat_completion_chunk import (
    ChoiceDelta,
    ChoiceDeltaToolCall,
    ChoiceDeltaToolCallFunction,
)
from openai.types.chat.chat_completion_message_function_tool_call import Function

from tir_alp.agents.messages import Dialogue, Message, tools_text
from tir_alp.agents.session import Answer, ApiError, Request
from tir_alp.agents.wire import (
    MOST_REPLIES,
    OpenAIRequest,
    event,
    field,
    function_schema,
    no_media,
    number,
    pieces,
    read_call,
    refuse,
    stop_texts,
)

_KNOWN = {
    *("model", "messages", "tools", "tool_choice", "parallel_tool_calls", "n", "stop", "seed"),
    *("max_tokens", "max_completion_tokens", "temperature", "top_p", "stream", "stream_options"),
    *("logprobs", "top_logprobs"),
}
_OF_NO_CONCERN = {
    *("user", "metadata", "store", "service_tier", "reasoning_effort", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "verbosity"),
}
_REFUSED: Mapping[str, Sequence[Any]] = {
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
    "audio": (None,),
    "functions": (None,),
    "function_call": (None, "auto", "none"),
    "prediction": (None,),
    "web_search_options": (None,),
}
_ROLES: Mapping[str, Literal["system", "user", "assistant", "tool"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}

Text = Callable[[int], str]
"""Decodes one token."""


def read_chat(body: Mapping[str, Any]) -> OpenAIRequest:
    """Read a request. Raises ApiError."""
    refuse(body, _KNOWN | _OF_NO_CONCERN, _REFUSED)
    tools = read_tools(body)
    if number(body, "top_logprobs", 0, 20, whole=True):
        raise ApiError(
            400,
            "top_logprobs: the engine reports the logprob of each sampled token and of no other",
            param="top_logprobs",
            code="unsupported_parameter",
        )
    limit = number(body, "max_completion_tokens", 1, 1 << 31, whole=True)
    options = field(body, "stream_options", dict, {})
    return OpenAIRequest(
        Request(
            dialogue=Dialogue(read_messages(body), tools_text(tools)),
            count=number(body, "n", 1, MOST_REPLIES, whole=True) or 1,
            max_tokens=limit or number(body, "max_tokens", 1, 1 << 31, whole=True),
            temperature=number(body, "temperature", 0, 2),
            top_p=number(body, "top_p", 1e-6, 1),
            seed=number(body, "seed", -(1 << 63), (1 << 63) - 1, whole=True),
            stops=stop_texts(body, "stop"),
            tool_choice=_tool_choice(body, tools),
            one_call=not field(body, "parallel_tool_calls", bool, True),
        ),
        model=field(body, "model", str, ""),
        stream=field(body, "stream", bool, False),
        with_usage=bool(options.get("include_usage")),
        with_logprobs=field(body, "logprobs", bool, False),
    )


def read_messages(body: Mapping[str, Any]) -> tuple[Message, ...]:
    """Read the messages of a request. Raises ApiError."""
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise ApiError(400, "messages must be a list of at least one message", param="messages")
    messages = tuple(_message(each, f"messages[{index}]") for index, each in enumerate(given))
    if messages[-1].role == "assistant":
        raise ApiError(
            400,
            "the last message is the assistant's: there is nothing to reply to, and a reply cannot "
            "be begun for the model",
            param="messages",
        )
    return messages


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, dict):
        raise ApiError(400, f"{where} is not a message: {given!r:.60}", param=where)
    role = _ROLES.get(str(given.get("role")))
    if role is None:
        roles = ", ".join(_ROLES)
        raise ApiError(
            400,
            f"{where}.role is {given.get('role')!r:.40}; it must be one of {roles}",
            param=where,
        )
    if given.get("function_call"):
        raise ApiError(400, f"{where}.function_call: use tool_calls", param=where)
    calls = field(given, "tool_calls", list, [])
    if calls and role != "assistant":
        raise ApiError(400, f"{where}: only the assistant makes calls", param=where)
    return Message(
        role,
        _content(given.get("content"), f"{where}.content"),
        tuple(read_call(each, f"{where}.tool_calls[{i}]") for i, each in enumerate(calls)),
        field(given, "tool_call_id", str, "") if role == "tool" else "",
        field(given, "name", str, "") if role != "assistant" else "",
    )


def _content(given: Any, where: str) -> str:
    if given is None or isinstance(given, str):
        return given or ""
    if not isinstance(given, list):
        raise ApiError(400, f"{where} is neither text nor a list of parts", param=where)
    texts = []
    for index, part in enumerate(given):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(kind) if isinstance(part, dict) and kind in ("text", "refusal") else None
        if not isinstance(text, str):
            raise no_media(str(kind), f"{where}[{index}]")
        texts.append(text)
    return "\n".join(texts)


def read_tools(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read the tools of a request. Raises ApiError."""
    tools = field(body, "tools", list, [])
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            raise ApiError(400, f"{where} is not a function: {tool!r:.80}", param=where)
        name, description, schema = map(function.get, ("name", "description", "parameters"))
        function_schema(name, description, schema, where)
    return tools


def _tool_choice(body: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> str:
    choice = body.get("tool_choice") or "auto"
    if choice in ("auto", "none"):
        return choice
    if not tools:
        raise ApiError(400, "tool_choice is only allowed with tools", param="tool_choice")
    if choice == "required":
        return choice
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in [each["function"]["name"] for each in tools]:
        raise ApiError(400, f"tool_choice names no tool: {choice!r:.80}", param="tool_choice")
    return f"={name}"


# ------------------------------------------------------------------------------------- replies


def write_chat(
    request: OpenAIRequest, answers: Sequence[Answer], name: str, created: int, text: Text
) -> str:
    """Write the replies as JSON.

    Args:
        request: The request.
        answers: The replies.
        name: Id of the response.
        created: Time in seconds since 1970.
        text: Decodes one token.
    """
    choices = [
        Choice(
            finish_reason=finish_reason(answer),
            index=index,
            logprobs=_logprobs(answer, text) if request.with_logprobs else None,
            message=_reply(answer.exchange.reply),
        )
        for index, answer in enumerate(answers)
    ]
    return ChatCompletion(
        id=name,
        choices=choices,
        created=created,
        model=request.model,
        object="chat.completion",
        usage=usage(answers),
    ).model_dump_json(exclude_unset=True)


def chat_events(
    request: OpenAIRequest, answers: Sequence[Answer], name: str, created: int, text: Text
) -> Iterator[bytes]:
    """Write the replies as server-sent events; for the arguments see `write_chat`."""

    def chunk(choices: list[ChunkChoice], **more: Any) -> bytes:
        made = ChatCompletionChunk(
            id=name,
            choices=choices,
            created=created,
            model=request.model,
            object="chat.completion.chunk",
            **more,
        )
        return event(made.model_dump_json(exclude_unset=True))

    for index, answer in enumerate(answers):
        logprobs: Any = _logprobs(answer, text) if request.with_logprobs else None
        for number_, delta in enumerate(_deltas(answer.exchange.reply)):
            extra: dict[str, Any] = {"logprobs": logprobs} if number_ == 0 and logprobs else {}
            yield chunk([ChunkChoice(delta=delta, index=index, finish_reason=None, **extra)])
        reason = finish_reason(answer)
        yield chunk([ChunkChoice(delta=ChoiceDelta(), index=index, finish_reason=reason)])
    if request.with_usage:
        yield chunk([], usage=usage(answers))
    yield event("[DONE]")


def _deltas(reply: Message) -> Iterator[ChoiceDelta]:
    yield ChoiceDelta(role="assistant", content="")
    for piece in pieces(reply.content):
        yield ChoiceDelta(content=piece)
    for index, call in enumerate(reply.calls):
        function = ChoiceDeltaToolCallFunction(name=call.name, arguments="")
        begun = ChoiceDeltaToolCall(
            index=index, id=call.call_id, type="function", function=function
        )
        yield ChoiceDelta(tool_calls=[begun])
        for piece in pieces(call.arguments):
            function = ChoiceDeltaToolCallFunction(arguments=piece)
            yield ChoiceDelta(tool_calls=[ChoiceDeltaToolCall(index=index, function=function)])


def finish_reason(answer: Answer) -> Literal["stop", "length", "tool_calls"]:
    """Return why a reply ended, in OpenAI's words."""
    if answer.exchange.reply.calls:
        return "tool_calls"
    return "length" if answer.is_cut else "stop"


def usage(answers: Sequence[Answer]) -> CompletionUsage:
    """Count tokens; the prompt of several replies counts once."""
    prompt, sampled = answers[0].num_context, sum(each.num_sampled for each in answers)
    return CompletionUsage(
        prompt_tokens=prompt, completion_tokens=sampled, total_tokens=prompt + sampled
    )


def _reply(reply: Message) -> ChatCompletionMessage:
    calls = [
        ChatCompletionMessageFunctionToolCall(
            id=call.call_id,
            type="function",
            function=Function(name=call.name, arguments=call.arguments),
        )
        for call in reply.calls
    ]
    more: dict[str, Any] = {"tool_calls": calls} if calls else {}
    content = None if calls and not reply.content else reply.content
    return ChatCompletionMessage(role="assistant", content=content, refusal=None, **more)


def _logprobs(answer: Answer, text: Text) -> ChoiceLogprobs:
    completion = answer.exchange.completion
    tokens = [
        (text(each), logprob)
        for each, logprob in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    return ChoiceLogprobs(
        content=[
            ChatCompletionTokenLogprob(
                token=token, bytes=[*token.encode()], logprob=logprob, top_logprobs=[]
            )
            for token, logprob in tokens
        ],
        refusal=None,
    )


_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def error_body(error: ApiError) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    default = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": _KINDS.get(error.status, default),
            "param": error.param,
            "code": error.code,
        }
    }

"""What the APIs have in common: reading fields of a request's JSON, with errors that name them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tir_alp.agents.messages import Call
from tir_alp.agents.session import ApiError, Request
from tir_alp.rollouts.mark_guard import mapped
from tir_alp.rollouts.surrogates import SURROGATE

T = TypeVar("T")

MOST_REPLIES = 128
_PIECE = 64  # characters of a streamed piece of text
_HALVES = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")  # of which one may stand alone

NEUTRAL: Mapping[str, Collection[Any]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "repetition_penalty": (1, None),
    "logit_bias": ({}, None),
    "top_k": (-1, 0, None),
    "min_p": (0, None),
}
"""Fields that would change the distribution which tokens are drawn from, and their values that do
not."""


@dataclass(frozen=True, slots=True)
class OpenAIRequest:
    """A request for completions, of chats or of texts, and how its reply is written."""

    asked: Request
    model: str
    stream: bool = False
    with_usage: bool = False
    with_logprobs: bool = False


def read_body(data: bytes) -> dict[str, Any]:
    """Read the JSON object of a request. Raises ApiError."""
    try:
        body = json.loads(data)
        if _HALVES.search(data):
            body = mapped(body, lambda text: SURROGATE.sub("\ufffd", text))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body of the request is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body of the request is not a JSON object: {body!r:.60}")
    return body


def field(body: Mapping[str, Any], name: str, kind: type[T] | tuple[type[T], ...], default: T) -> T:
    """Return a field of a request; the default if it is missing or null. Raises ApiError."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ApiError(400, f"{name} cannot be {value!r:.60}", param=name)
    return value


def number(
    body: Mapping[str, Any], name: str, least: float, most: float, *, whole: bool = False
) -> Any:
    """Return a number of a request; None if it is missing or null. Raises ApiError."""
    kind: Any = int if whole else (int, float)
    value = field(body, name, kind, None)
    if value is not None and not (math.isfinite(value) and least <= value <= most):
        raise ApiError(400, f"{name} is {value}; it must be from {least:g} to {most:g}", param=name)
    return value


def stop_texts(body: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return the stop sequences of a request. Raises ApiError."""
    value = body.get(name)
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise ApiError(400, f"{name} must be texts, not {value!r:.60}", param=name)
    if len(texts) > 16:
        raise ApiError(400, f"{name} has {len(texts)} texts; 16 are allowed", param=name)
    return tuple(each for each in texts if each)


def refuse(
    body: Mapping[str, Any], known: Collection[str], refused: Mapping[str, Collection[Any]]
) -> None:
    """Refuse fields that are unknown, or that ask for what cannot be done. Raises ApiError.

    Args:
        body: The request.
        known: Fields that are read, or that ask for nothing that concerns sampling.
        refused: Fields that can only have certain values.
    """
    for name, allowed in (*NEUTRAL.items(), *refused.items()):
        if name in body and body[name] not in allowed:
            raise ApiError(
                400,
                f"{name} is {body[name]!r:.60}, which is not supported here: tokens are drawn from "
                "the model's own distribution, and replies are text. Leave it out",
                param=name,
                code="unsupported_parameter",
            )
    for name in body:
        if name not in known and name not in NEUTRAL and name not in refused:
            raise ApiError(400, f"unknown field {name!r}", param=name, code="unknown_parameter")


def function_schema(name: Any, description: Any, parameters: Any, where: str) -> dict[str, Any]:
    """Return a function in OpenAI's form, given its parts. Raises ApiError.

    Args:
        name: Name of the function.
        description: What the model reads about it; None: nothing.
        parameters: JSON schema of its arguments; None: it takes none.
        where: Place of the function in the request.
    """
    if parameters in (None, {}):
        parameters = {"type": "object", "properties": {}}
    is_read = isinstance(name, str) and isinstance(description, str | None)
    if is_read and isinstance(parameters, dict):
        properties, required = parameters.get("properties", {}), parameters.get("required", [])
        are_named = isinstance(required, list) and all(isinstance(each, str) for each in required)
        if are_named and isinstance(properties, dict):
            function = {"name": name, "description": description or "", "parameters": parameters}
            return {"type": "function", "function": function}
    raise ApiError(
        400,
        f"{where} must have a name, and its parameters must be the JSON schema of an object: "
        f"{name!r:.40}, {parameters!r:.80}",
        param=where,
    )


def read_call(call: Any, where: str) -> Call:
    """Read a call in OpenAI's form. Raises ApiError."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{where} is not a call of a function: {call!r:.80}", param=where)
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str) or not isinstance(call.get("id", ""), str):
        raise ApiError(400, f"{where} has arguments or an id that are no text", param=where)
    return Call(call.get("id", ""), function["name"], arguments)


def no_media(kind: str, where: str) -> ApiError:
    """Return the error for a part of a message that is no text."""
    return ApiError(
        400,
        f"{where} is of the type {kind!r}: this model reads text only, no images, audio or files. "
        "Send parts of the type 'text'",
        param=where,
        code="unsupported_content",
    )


def pieces(text: str) -> list[str]:
    """Cut a text into the pieces in which it is streamed."""
    return [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]


def event(data: str, name: str = "") -> bytes:
    """Return a server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data}\n\n".encode()

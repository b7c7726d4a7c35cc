"""`POST /v1/completions`: a text that the model goes on with, as it stands. Pure.

The client writes the whole sequence itself, marks of the conversation included. A prompt that
begins with everything that a trace has, replies and their end marks included, goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs

from tir_alp.agents.messages import Dialogue, Message
from tir_alp.agents.openai_chat import usage
from tir_alp.agents.session import Answer, ApiError, Request
from tir_alp.agents.wire import (
    MOST_REPLIES,
    OpenAIRequest,
    event,
    field,
    number,
    pieces,
    refuse,
    stop_texts,
)

_KNOWN = {
    *("model", "prompt", "n", "best_of", "stop", "seed", "max_tokens", "temperature", "top_p"),
    *("stream", "stream_options", "logprobs", "user"),
}
_REFUSED: Mapping[str, Sequence[Any]] = {"echo": (False, None), "suffix": ("", None)}


def read_completion_request(body: Mapping[str, Any]) -> OpenAIRequest:
    """Read a request. Raises ApiError."""
    refuse(body, _KNOWN, _REFUSED)
    count = number(body, "n", 1, MOST_REPLIES, whole=True) or 1
    if (best_of := number(body, "best_of", 1, MOST_REPLIES, whole=True)) not in (None, count):
        raise ApiError(
            400, f"best_of is {best_of}: replies are not selected. Leave it out", param="best_of"
        )
    if (shown := number(body, "logprobs", 0, 5, whole=True)) not in (None, 0):
        raise ApiError(
            400,
            f"logprobs is {shown}: the engine reports the logprob of each sampled token and of no "
            "other, which is logprobs = 0",
            param="logprobs",
            code="unsupported_parameter",
        )
    options = field(body, "stream_options", dict, {})
    return OpenAIRequest(
        Request(
            dialogue=Dialogue((Message("text", _prompt(body)),)),
            count=count,
            max_tokens=number(body, "max_tokens", 1, 1 << 31, whole=True),
            temperature=number(body, "temperature", 0, 2),
            top_p=number(body, "top_p", 1e-6, 1),
            seed=number(body, "seed", -(1 << 63), (1 << 63) - 1, whole=True),
            stops=stop_texts(body, "stop"),
        ),
        model=field(body, "model", str, ""),
        stream=field(body, "stream", bool, False),
        with_usage=bool(options.get("include_usage")),
        with_logprobs=shown is not None,
    )


def _prompt(body: Mapping[str, Any]) -> str:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        (prompt,) = prompt
    if isinstance(prompt, str) and prompt:
        return prompt
    kind = "several prompts" if isinstance(prompt, list) and len(prompt) > 1 else f"{prompt!r:.60}"
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], str):
        kind = "token ids"
    raise ApiError(
        400,
        f"prompt must be one text that is not empty, not {kind}: send a request for each text. "
        "Texts that go on with a reply keep its tokens",
        param="prompt",
    )


# ------------------------------------------------------------------------------------- replies


def write_completion(
    request: OpenAIRequest,
    answers: Sequence[Answer],
    name: str,
    created: int,
    text: Callable[[int], str],
) -> str:
    """Write the replies as JSON; for the arguments see `write_chat`."""
    choices = [
        CompletionChoice(
            finish_reason=_finish_reason(answer),
            index=index,
            logprobs=_logprobs(answer, text) if request.with_logprobs else None,
            text=answer.exchange.reply.content,
        )
        for index, answer in enumerate(answers)
    ]
    return _response(request, choices, name, created, usage=usage(answers))


def completion_events(
    request: OpenAIRequest,
    answers: Sequence[Answer],
    name: str,
    created: int,
    text: Callable[[int], str],
) -> Iterator[bytes]:
    """Write the replies as server-sent events; for the arguments see `write_chat`."""
    for index, answer in enumerate(answers):
        parts = pieces(answer.exchange.reply.content) or [""]
        for place, piece in enumerate(parts):
            is_last = place == len(parts) - 1
            choice = CompletionChoice.model_construct(
                index=index,
                text=piece,
                finish_reason=_finish_reason(answer) if is_last else None,
                logprobs=_logprobs(answer, text) if request.with_logprobs and is_last else None,
            )
            yield event(_response(request, [choice], name, created))
    if request.with_usage:
        yield event(_response(request, [], name, created, usage=usage(answers)))
    yield event("[DONE]")


def _response(
    request: OpenAIRequest,
    choices: list[CompletionChoice],
    name: str,
    created: int,
    **more: Any,
) -> str:
    made = Completion.model_construct(
        id=name,
        choices=choices,
        created=created,
        model=request.model,
        object="text_completion",
        **more,
    )
    return made.model_dump_json(exclude_unset=True)


def _finish_reason(answer: Answer) -> Literal["stop", "length"]:
    return "length" if answer.is_cut else "stop"


def _logprobs(answer: Answer, text: Callable[[int], str]) -> Logprobs:
    completion = answer.exchange.completion
    tokens = [*map(text, completion.token_ids)]
    offsets = accumulate(map(len, tokens[:-1]), initial=0)
    return Logprobs(
        tokens=tokens,
        token_logprobs=[*completion.logprobs],
        text_offset=[*offsets] if tokens else [],
        top_logprobs=None,
    )

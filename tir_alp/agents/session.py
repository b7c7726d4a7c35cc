"""One episode of the gateway: requests become completions, which the capture keeps.

A session knows nothing of HTTP. Requests of one client may run at the same time; each reserves its
place in the capture before it waits for the engine, so that no two continue the same trace.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from tir_alp.agents import capture as captures
from tir_alp.agents.capture import Capture, CaptureFull, Exchange, Pending
from tir_alp.agents.dialogue_encoder import DialogueEncoder, Unsuitable
from tir_alp.agents.messages import Dialogue
from tir_alp.agents.replies import ReplyRule, found_stop
from tir_alp.engines.base import Completion, Generate, Sampling
from tir_alp.rollouts.stop_rule import cut_at, token_watcher
from tir_alp.types import StopReason, trace_uid

T = TypeVar("T")

Begin = Callable[[Capture], tuple[Capture, Pending]]
"""Reserves the place of one reply in a capture."""


class ApiError(Exception):
    """A request that cannot be answered.

    Args:
        status: HTTP status.
        message: Says what is wrong and what to do.
        param: The field of the request that is wrong.
        code: OpenAI's name of the fault, if it has one.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """What holds for all requests of an episode."""

    uid: int = 0
    """Uid of the sequence; sampling depends on it."""
    seed: int = 0
    """Root seed of sampling."""
    temperature: float | None = None
    """Sampling temperature in place of the client's, and no truncation and no seed of the client's;
    None: what the client asks for."""
    max_context_tokens: int = 16384
    """Limit of a trace, in tokens."""
    max_turn_tokens: int = 2048
    """Limit of a completion, in tokens; the client may ask for less."""
    timeout_s: float = 600.0
    """Deadline of a completion, in seconds."""
    max_running: int = 32
    """Completions of the episode that are sampled at the same time; others wait."""
    max_waiting: int = 256
    """Completions that may wait; a request beyond them is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client asks for, whichever API it uses."""

    dialogue: Dialogue
    count: int = 1
    """Number of replies."""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()
    tool_choice: str = "auto"
    """"auto", "none", "required", or "=NAME" for a certain tool."""
    one_call: bool = False
    """Whether a reply may have one call at most."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One reply."""

    exchange: Exchange
    num_context: int
    """Number of tokens that the model continued."""
    stop: str | None = None
    """The stop text of the request that ended it."""

    @property
    def num_sampled(self) -> int:
        """Number of tokens that it sampled."""
        return len(self.exchange.completion.token_ids)

    @property
    def is_cut(self) -> bool:
        """Whether a limit ended it."""
        return self.exchange.completion.stop_reason is StopReason.LENGTH


class Session:
    """Answers the requests of one episode.

    Args:
        generate: Samples completions.
        encoder: Encodes messages.
        settings: Settings of the episode.
    """

    def __init__(
        self, generate: Generate, encoder: DialogueEncoder, settings: SessionSettings
    ) -> None:
        self._generate, self._encoder, self.settings = generate, encoder, settings
        self.capture = Capture()
        self.failures: list[str] = []
        """What the engine failed at; an episode with failures is not to be trained on."""
        self._slots = asyncio.Semaphore(settings.max_running)
        self._num_open = 0
        self._running: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    async def answer(self, request: Request) -> list[Answer]:
        """Answer a request with as many replies as it asks for.

        Raises:
            ApiError: It cannot be answered.
        """
        if self._is_closed:
            raise ApiError(401, "the episode of this key has ended", code="invalid_api_key")
        most = self.settings.max_running + self.settings.max_waiting
        if self._num_open + request.count > most:
            raise ApiError(
                429,
                f"the episode has {self._num_open} replies to come already, and {most} are allowed "
                "at the same time; try later",
            )
        self._num_open += request.count
        try:
            return await self._answer(request)
        finally:
            self._num_open -= request.count

    async def _answer(self, request: Request) -> list[Answer]:
        self._check_size(request.dialogue)
        if request.dialogue.is_text:
            divided = captures.resume_text(self.capture, request.dialogue)
            request = replace(request, dialogue=divided)
        rule = _allowed(lambda: self._rule(request))
        pending: list[Pending] = []
        tasks: list[asyncio.Task[Answer]] = []
        try:
            begin = await self._encoded(request, rule)
            for _ in range(request.count):
                pending.append(self._begin(begin))
            tasks += [self._track(self._complete(each, request)) for each in pending]
            return [*await asyncio.gather(*tasks)]
        finally:
            for each in tasks:
                each.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            ended += [None] * (len(pending) - len(ended))  # of those that were never begun
            for each, how in zip(pending, ended, strict=True):
                if not isinstance(how, Answer):
                    self.capture = captures.give_up(self.capture, each)

    async def close(self) -> Capture:
        """Refuse further requests, end those that run, and return what was captured."""
        self._is_closed = True
        running = [*self._running]
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        return self.capture

    def _track(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def _rule(self, request: Request) -> ReplyRule:
        dialogue, choice = request.dialogue, request.tool_choice
        style = self._encoder.style(dialogue)
        if style is None or choice == "none":
            return ReplyRule(stops=request.stops)
        forced = ""
        if choice != "auto":
            name = choice.removeprefix("=") if choice.startswith("=") else None
            forced = self._encoder.forced_call(dialogue, name)
        return ReplyRule(style, forced, request.one_call, request.stops)

    async def _encoded(self, request: Request, rule: ReplyRule) -> Begin:
        """Encode the messages of a request; return what reserves the place of a reply to it."""
        kept: dict[tuple[int, StopReason], Any] = {}

        def encode(dialogue: Dialogue, num_known: int, ended: StopReason) -> Any:
            key = num_known, ended
            if key not in kept and num_known == 0:
                kept[key] = self._encoder.opening(dialogue, rule.forced)
            elif key not in kept:
                kept[key] = self._encoder.extension(dialogue, num_known, ended, rule.forced)
            return kept[key]

        def begin(capture: Capture) -> tuple[Capture, Pending]:
            return _allowed(lambda: captures.begin(capture, request.dialogue, encode, rule))

        now = self.capture
        first = await self._encoder.while_encoding(request.dialogue, lambda: begin(now))
        return lambda capture: first if capture is now else begin(capture)

    def _begin(self, begin: Begin) -> Pending:
        """Reserve the place of one reply, if the context has room for it."""
        begun, pending = begin(self.capture)
        limit = self.settings.max_context_tokens
        if len(pending.context) >= limit:
            raise _too_long(limit, f"{len(pending.context)} tokens")
        self.capture = begun
        return pending

    def _check_size(self, dialogue: Dialogue) -> None:
        """Refuse what cannot fit, before it is encoded."""
        limit, num_messages = self.settings.max_context_tokens, len(dialogue.messages)
        if num_messages > limit:  # each has a mark at least
            raise _too_long(limit, f"{num_messages} messages")
        num_chars = sum(len(each.content) for each in dialogue.messages)
        if num_chars > limit * self._encoder.max_token_chars:
            raise _too_long(limit, f"{num_chars} characters")

    async def _complete(self, pending: Pending, request: Request) -> Answer:
        async with self._slots:
            completion = await self._sample(pending, request)
        reply = self._encoder.reply(
            request.dialogue, completion.token_ids, pending.rule, pending.name
        )
        self.capture = captures.finish(self.capture, pending, completion, reply)
        exchange = self.capture.traces[pending.trace].exchanges[-1]
        stop = None
        if pending.rule.stops:
            stop = found_stop(self._encoder.text(completion.token_ids), pending.rule)
        return Answer(exchange, len(pending.context), stop)

    async def _sample(self, pending: Pending, request: Request) -> Completion:
        sampling = self._sampling(pending, request)
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                completion = await self._generate(pending.context, sampling)
        except TimeoutError:
            limit = self.settings.timeout_s
            self.failures.append(f"the engine gave no completion within {limit:g} s")
            raise ApiError(504, self.failures[-1]) from None
        except (RuntimeError, ValueError) as error:
            self.failures.append(f"the engine failed: {error}")
            raise ApiError(500, self.failures[-1]) from error
        if completion.stop_reason is StopReason.ABORT:
            self.failures.append("the completion was aborted")
            raise ApiError(503, self.failures[-1])
        if sampling.stop_matcher is None:
            return completion
        return cut_at(completion, sampling.stop_matcher())

    def _sampling(self, pending: Pending, request: Request) -> Sampling:
        settings, rule = self.settings, pending.rule
        room = settings.max_context_tokens - len(pending.context)
        most = min(request.max_tokens or settings.max_turn_tokens, settings.max_turn_tokens, room)
        tokenizer = self._encoder.tokenizer
        has_rule = rule.watch() is not None
        sampling = Sampling(
            max_tokens=most,
            temperature=settings.temperature if settings.temperature is not None else 1.0,
            stop_token_ids=self._encoder.stop_token_ids,
            stop_matcher=(lambda: token_watcher(tokenizer, _watch(rule))) if has_rule else None,
            seed=settings.seed,
            sequence_uid=trace_uid(settings.uid, pending.trace),
        )
        if settings.temperature is not None:
            return sampling
        return replace(
            sampling,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=settings.seed if request.seed is None else abs(request.seed) % 2**63,
        )


def _too_long(limit: int, length: str) -> ApiError:
    return ApiError(
        400,
        f"This model's maximum context length is {limit} tokens. However, your messages have "
        f"{length}. Please reduce the length of the messages.",
        param="messages",
        code="context_length_exceeded",
    )


def _watch(rule: ReplyRule) -> Callable[[str], bool]:
    watch = rule.watch()
    assert watch is not None
    return watch


def _allowed(call: Callable[[], T]) -> T:
    """Turn what a client can fix into an error of the API."""
    try:
        return call()
    except CaptureFull as error:
        raise ApiError(429, str(error)) from error
    except Unsuitable as error:
        raise ApiError(400, str(error), param="messages") from error

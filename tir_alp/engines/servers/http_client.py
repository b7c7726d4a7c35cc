"""A server over HTTP: calls, and answers that arrive as a stream of events.

Not here: what each kind of server is asked, which server is asked, and what happens to one that
fails. Invariant: every call has a deadline and ends with an answer or with `ServerFailed`; nothing
is ever sent a second time.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp

from tir_alp.engines.base import EngineFailed

_HEALTH_TIMEOUT_S = 25.0  # the server itself allows its scheduler 20 s to answer


class ServerFailed(EngineFailed):
    """A server did not do what it was asked to do.

    Args:
        message: What happened, with the server's address.
        ran: False if the request certainly did not run, and may be sent to another server.
        refused: Whether the request was at fault, and not the server.
    """

    def __init__(self, message: str, *, ran: bool = True, refused: bool = False) -> None:
        super().__init__(message)
        self.ran, self.refused = ran, refused


class ServerClient:
    """Talks to one server.

    Args:
        session: HTTP session, which several clients may share.
        url: Address of the server.
        api_key: The server's API key; None: it asks for none.
        stall_timeout_s: Deadline of each event of a stream, and of short calls.
        load_timeout_s: Deadline of calls that move weights.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        api_key: str | None,
        *,
        stall_timeout_s: float,
        load_timeout_s: float,
    ) -> None:
        self.url = url.rstrip("/")
        self.load_timeout_s = load_timeout_s
        self._session = session
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._stall_timeout_s = stall_timeout_s
        self.last_answer_s = time.monotonic()
        """Time of the server's last sign of life, by the monotonic clock."""

    async def stream(
        self,
        path: str,
        payload: Mapping[str, Any],
        is_last: Callable[[dict[str, Any]], bool],
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[dict[str, Any]]:
        """Send a request, and yield the events of the answer up to the last one.

        Args:
            path: Path of the URL.
            payload: Body of the request, sent as JSON.
            is_last: Whether an event is the last one.
            headers: Headers of this request.

        Raises:
            ServerFailed: If the server refuses, breaks off, or is silent for too long.
        """
        asked = self._ask("POST", path, payload, self._stall_timeout_s, headers)
        async with asked as response:
            buffer, is_complete = b"", False
            while not is_complete:
                async with self._deadline("sent no event", self._stall_timeout_s):
                    while b"\n\n" not in buffer:
                        piece = await response.content.readany()
                        if not piece:
                            raise ServerFailed(f"{self.url} broke off in the middle of an answer")
                        buffer += piece
                event, _, buffer = buffer.partition(b"\n\n")
                answer = self._parse(event.removeprefix(b"data: "))
                if "error" in answer:
                    message = answer["error"].get("message", answer["error"])
                    raise ServerFailed(f"{self.url} refused: {message}", ran=False, refused=True)
                self.last_answer_s = time.monotonic()
                yield answer
                is_complete = is_last(answer)
                await asyncio.sleep(0)  # if many events are here already, others have their turn
            async with self._deadline("did not end its answer", self._stall_timeout_s):
                await response.read()  # so that the connection can be reused

    async def call(
        self, path: str, timeout_s: float | None = None, **payload: Any
    ) -> dict[str, Any] | list[Any] | None:
        """Send a request that is answered at once; returns the answer, None if it is empty.

        Args:
            path: Path of the URL.
            timeout_s: Deadline; None: the client's `stall_timeout_s`.
            payload: Body of the request, sent as JSON.

        Raises:
            ServerFailed: If there is no answer, or it reports a failure.
        """
        return await self._call("POST", path, timeout_s, payload)

    async def get(self, path: str) -> dict[str, Any] | list[Any] | None:
        """Read something; as `call`."""
        return await self._call("GET", path, None, None)

    async def delete(self, path: str) -> None:
        """Delete something; as `call`."""
        await self._call("DELETE", path, None, None)

    async def _call(
        self, verb: str, path: str, timeout_s: float | None, payload: Mapping[str, Any] | None
    ) -> dict[str, Any] | list[Any] | None:
        timeout_s = self._stall_timeout_s if timeout_s is None else timeout_s
        async with (
            self._ask(verb, path, payload, timeout_s) as response,
            self._deadline(f"did not answer {path}", timeout_s),
        ):
            body = await response.read()
            answer = self._parse(body) if body and "json" in response.content_type else None
            if isinstance(answer, dict) and answer.get("success") is False:
                raise ServerFailed(f"{self.url}{path}: {answer.get('message')}")
            self.last_answer_s = time.monotonic()
            return answer

    async def is_healthy(self) -> bool:
        """Whether the server's scheduler answers."""
        url = f"{self.url}/health"
        limit = min(_HEALTH_TIMEOUT_S, self._stall_timeout_s)
        with suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with asyncio.timeout(limit):
                async with self._session.get(url, headers=self._headers) as response:
                    if response.status == 200:
                        self.last_answer_s = time.monotonic()
                        return True
        return False

    @asynccontextmanager
    async def _ask(
        self,
        verb: str,
        path: str,
        payload: Mapping[str, Any] | None,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {**self._headers, **(headers or {})}
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._session.request(
                    verb, self.url + path, json=payload, headers=headers
                )
        except TimeoutError:
            raise ServerFailed(f"{self.url}{path}: no answer within {timeout_s:g} s") from None
        except aiohttp.ClientConnectorError as error:  # nothing was sent
            raise ServerFailed(f"{self.url} cannot be reached: {error}", ran=False) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerFailed(f"{self.url}{path} broke off: {error!r}") from error
        try:
            if response.status not in (200, 202):  # 202: accepted, and done later
                async with self._deadline("did not send the reason of its refusal", timeout_s):
                    why = (await response.text(errors="replace"))[:500]
                status = response.status
                raise ServerFailed(
                    f"{self.url}{path} answered {status}: {why}",
                    ran=status not in (400, 401, 503),  # 503: it is not ready, and accepted nothing
                    refused=400 <= status < 500,
                )
            yield response
        except (aiohttp.ClientError, OSError) as error:
            raise ServerFailed(f"{self.url}{path} broke off: {error!r}") from error
        finally:
            response.close()  # a connection that was not read to its end cannot be reused

    @asynccontextmanager
    async def _deadline(self, what: str, timeout_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise ServerFailed(f"{self.url} {what} within {timeout_s:g} s") from None

    def _parse(self, body: bytes) -> Any:
        try:
            return json.loads(body)
        except ValueError as error:
            raise ServerFailed(f"{self.url} sent what is not JSON: {body[:200]!r}") from error

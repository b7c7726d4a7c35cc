"""One completion by an SGLang server: from the request's JSON to a `Completion`, cut by token.

The server sends tokens as it samples them. They are fed to the stop rule one by one. When the rule
holds the server is asked to stop; the ids, logprobs and versions of tokens that it sampled
meanwhile are dropped. The server never sees or makes text.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

from tir_alp.engines.base import Completion, Sampling
from tir_alp.engines.servers.http_client import ServerFailed
from tir_alp.engines.sglang.client import SGLangClient, read_label
from tir_alp.engines.sglang.routing import RoutingShape, read_routing
from tir_alp.types import StopReason, VersionSpan, cut_version_spans

_MOST_CANDIDATES = 4096
"""Most tokens that a truncated distribution can have for SGLang to report exact logprobs."""


class SGLangRequest:
    """A completion in the making.

    Args:
        token_ids: The sequence that is continued.
        sampling: How it is sampled.
        end_token_ids: Tokens at which the server ends a completion of its own accord. If not all of
            them are stop tokens, it is asked to ignore them, and the completion is cut here.
        routing: Shape of a token's routing, which the server is asked for; None: it is not.
    """

    def __init__(
        self,
        token_ids: tuple[int, ...],
        sampling: Sampling,
        end_token_ids: frozenset[int] = frozenset(),
        routing: RoutingShape | None = None,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.token_ids, self.sampling = token_ids, sampling
        self.is_aborted = False
        self._routing = routing
        self.server: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """Index of the server that has it: chosen here, or read from the answer."""
        self.cached_tokens = 0
        """Tokens of its prompt whose keys and values the server still had."""
        self._goes_on = not end_token_ids <= sampling.stop_token_ids
        self._matches = sampling.stop_matcher() if sampling.stop_matcher else None
        self._sampled: list[int] = []
        self._logprobs: list[float] = []
        self._stop: tuple[int, StopReason] | None = None

    def aborted_before(self, version: int) -> Completion:
        """The completion of a request that was aborted before a server had it."""
        return Completion(
            token_ids=(), logprobs=(), stop_reason=StopReason.ABORT, policy_version=version
        )

    async def run(
        self, client: SGLangClient, take_back: Callable[[SGLangRequest], Awaitable[None]]
    ) -> Completion:
        """Have a server sample it, once.

        Args:
            client: Client of the server, or of a router.
            take_back: Asks the server to stop.

        Raises:
            ServerFailed: If the server refuses or fails, or its answer contradicts itself.
        """
        key = str(self.sampling.sequence_uid)
        async with aclosing(client.events(self._payload() | client.chosen, key)) as events:
            async for event in events:
                if not self.server.done():
                    self.server.set_result(_labelled(event["meta_info"], client.url)[1])
                self._take(event, client.url)
                reason = event["meta_info"]["finish_reason"]
                if reason is not None:
                    return self._completion(event["meta_info"], reason, client.url)
                if self._stop is not None or self.is_aborted:
                    await take_back(self)
        raise ServerFailed(f"{client.url} ended an answer before its end")

    def _payload(self) -> dict[str, Any]:
        sampling = self.sampling
        parameters: dict[str, Any] = {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "stop_token_ids": sorted(sampling.stop_token_ids),
            "ignore_eos": self._goes_on,
        }
        payload = {
            "rid": self.id,
            "input_ids": list(self.token_ids),
            "sampling_params": parameters,
            "return_logprob": True,
            "stream": True,
        }
        if self._routing is not None:
            payload["return_routed_experts"] = True
        if self.is_truncated:
            # Ordinary logprobs are those before truncation; others come with the sampling mask.
            parameters |= {"top_p": sampling.top_p, "top_k": _MOST_CANDIDATES}
            payload["return_sampling_mask"] = True
        return payload

    @property
    def is_truncated(self) -> bool:
        """Whether the logprob of each token depends on which tokens the truncation leaves."""
        return self.sampling.top_p < 1 and self.sampling.temperature > 0

    def _take(self, event: Mapping[str, Any], url: str) -> None:
        """Add the tokens of an event, and find where the completion ends."""
        meta = event["meta_info"]
        new_ids = list(event["output_ids"])
        entries = meta["output_token_logprobs"]
        num_all = meta["completion_tokens"]
        if len(new_ids) == num_all and self._sampled:  # cumulative events
            new_ids = new_ids[len(self._sampled) :]
        entries = entries[len(entries) - len(new_ids) :]
        if [entry[1] for entry in entries] != new_ids:
            raise ServerFailed(f"{url} gave logprobs of other tokens than it sampled")
        logprobs = [entry[0] for entry in entries]
        if self.is_truncated:
            logprobs = meta["output_token_sampling_logprobs"]
            logprobs = logprobs[len(logprobs) - len(new_ids) :]
        if self.sampling.temperature == 0:
            logprobs = [0.0] * len(new_ids)  # only one token could be sampled
        self._sampled += new_ids
        self._logprobs += logprobs
        if not len(self._sampled) == len(self._logprobs) == num_all:
            raise ServerFailed(
                f"{url} reports {num_all} sampled tokens, and sent {len(self._sampled)} with "
                f"{len(self._logprobs)} logprobs"
            )
        for index in range(num_all - len(new_ids), num_all):
            if self._stop is not None:
                return
            if self._sampled[index] in self.sampling.stop_token_ids:
                self._stop = (index + 1, StopReason.EOS)
            elif self._matches is not None and self._matches(self._sampled[index]):
                self._stop = (index + 1, StopReason.STOP)

    def _completion(
        self, meta: Mapping[str, Any], reason: Mapping[str, Any], url: str
    ) -> Completion:
        self.cached_tokens = meta["cached_tokens"]
        num_tokens, stop_reason = self._stop or (len(self._sampled), self._ending(reason, url))
        try:
            spans = cut_version_spans(version_spans(meta["weight_versions"]), num_tokens)
            return Completion(
                token_ids=tuple(self._sampled[:num_tokens]),
                logprobs=tuple(self._logprobs[:num_tokens]),
                stop_reason=stop_reason,
                policy_version=spans[0].version if spans else _labelled(meta, url)[0],
                version_spans=spans if len(spans) > 1 else (),
                routing=read_routing(meta, self._routing),
                queue_s=float(meta.get("queue_time") or 0.0),
            )
        except (KeyError, ValueError) as error:
            raise ServerFailed(
                f"{url} does not report which weights sampled which tokens: {error}"
            ) from error

    def _ending(self, reason: Mapping[str, Any], url: str) -> StopReason:
        match reason["type"]:
            case "length":
                return StopReason.LENGTH
            case "abort" if self.is_aborted:
                return StopReason.ABORT
        refused = reason.get("status_code") == 400
        raise ServerFailed(f"{url} gave a request up: {reason}", ran=not refused, refused=refused)


def version_spans(reported: list[Mapping[str, Any]]) -> tuple[VersionSpan, ...]:
    """The versions that a server reports, as spans; neighbours of one version are joined."""
    spans: list[VersionSpan] = []
    for each in reported:
        version, start, stop = read_label(each["version"])[0], each["start"], each["end"]
        if start == stop:
            continue
        if spans and spans[-1].version == version and spans[-1].stop == start:
            start = spans.pop().start
        spans.append(VersionSpan(version, start, stop))
    return tuple(spans)


def _labelled(meta: Mapping[str, Any], url: str) -> tuple[int, int]:
    """Policy version and server index that an event names."""
    try:
        return read_label(meta["weight_version"])
    except (KeyError, ValueError) as error:
        raise ServerFailed(
            f"{url} does not report which weights sampled which tokens: {error}"
        ) from error

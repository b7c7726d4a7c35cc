"""One vLLM server and one completion by it, cut by token: requests, and what answers mean."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from tir_alp.engines.base import Completion, Sampling
from tir_alp.engines.servers.http_client import ServerClient, ServerFailed
from tir_alp.types import StopReason

_RETRY_S = 0.2


class VLLMClient(ServerClient):
    """Talks to the server."""

    adapter: str | None = None
    """Name of the adapter that the server samples with; None: its weights alone."""

    @property
    def chosen(self) -> dict[str, Any]:
        """What a request has to say for the adapter to be used."""
        return {} if self.adapter is None else {"model": self.adapter}

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Logprob of each token but the first, given those before it, at temperature 1."""
        parameters = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        answer = await self.call(
            "/inference/v1/generate",
            token_ids=list(token_ids),
            sampling_params=parameters,
            **self.chosen,
        )
        assert isinstance(answer, dict)
        rows = zip(token_ids[1:], answer["prompt_logprobs"][1:], strict=True)
        return [row[str(token_id)]["logprob"] for token_id, row in rows]

    async def load(self, path: Path, version: int) -> None:
        """Read weights from a folder, drop the keys and values of the old ones, set the version."""
        await self.call(
            "/collective_rpc",
            self.load_timeout_s,
            method="reload_weights",
            kwargs={"weights_path": str(path)},
        )
        await self._forget_old_weights(version)

    async def load_adapter(self, path: Path, version: int) -> None:
        """Read an adapter from a folder, in place of the one before it, and set the version."""
        if self.adapter is not None:
            old, self.adapter = self.adapter, None
            await self.call("/v1/unload_lora_adapter", self.load_timeout_s, lora_name=old)
        name = str(version)
        await self.call(
            "/v1/load_lora_adapter", self.load_timeout_s, lora_name=name, lora_path=str(path)
        )
        self.adapter = name
        await self._forget_old_weights(version)

    async def _forget_old_weights(self, version: int) -> None:
        async with self._deadline("did not empty its cache", self._stall_timeout_s):
            while True:  # a request that was aborted may hold some of it for a moment
                with suppress(ServerFailed):
                    await self.call("/reset_prefix_cache")
                    break
                await asyncio.sleep(_RETRY_S)
        await self.call("/update_weight_version", new_version=str(version))


class VLLMRequest:
    """A completion in the making."""

    def __init__(self, token_ids: tuple[int, ...], sampling: Sampling) -> None:
        self.id = uuid.uuid4().hex
        self.token_ids, self.sampling = token_ids, sampling
        self.aborted = asyncio.Event()
        self._matches = sampling.stop_matcher() if sampling.stop_matcher else None
        self._sampled: list[int] = []
        self._logprobs: list[float] = []
        self._stop: StopReason | None = None

    async def run(self, client: VLLMClient, version: int) -> Completion:
        """Have the server sample it, once.

        Raises:
            ServerFailed: If the server refuses or fails, or samples with other weights than those
                of `version`.
        """
        sampling = self.sampling
        payload = {
            "request_id": self.id,
            "token_ids": list(self.token_ids),
            "stream": True,
            "sampling_params": {
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "stop_token_ids": sorted(sampling.stop_token_ids),
                "ignore_eos": True,  # only the stop tokens end a completion
                "logprobs": 0,  # those of the sampled tokens alone
            },
            **client.chosen,
        }
        last = None
        events = client.stream("/inference/v1/generate", payload, _is_last)
        async with aclosing(events):
            async for event in events:
                last = event["choices"][0]
                self._take(last, client.url)
                if self._stop is not None:
                    break
                if self.aborted.is_set():
                    self._stop = StopReason.ABORT
                    break
        assert last is not None  # a stream without an event fails
        if self._stop is None:
            self._stop = self._ending(last, client.url, version)
        return self.completion(version)

    def completion(self, version: int) -> Completion:
        """What it has: nothing if it was aborted before it ran."""
        return Completion(
            token_ids=tuple(self._sampled),
            logprobs=tuple(self._logprobs),
            stop_reason=self._stop or StopReason.ABORT,
            policy_version=version,
        )

    def _take(self, choice: Mapping[str, Any], url: str) -> None:
        """Add the tokens of an event, up to the end of the completion."""
        new_ids = choice["token_ids"] or []
        entries = choice["logprobs"]["content"] if choice["logprobs"] else []
        if [entry["token_id"] for entry in entries] != new_ids:
            raise ServerFailed(f"{url} gave logprobs of other tokens than it sampled")
        for entry in entries:
            self._sampled.append(entry["token_id"])
            # At temperature 0 only one token could be sampled.
            self._logprobs.append(entry["logprob"] if self.sampling.temperature > 0 else 0.0)
            if entry["token_id"] in self.sampling.stop_token_ids:
                self._stop = StopReason.EOS
            elif self._matches is not None and self._matches(entry["token_id"]):
                self._stop = StopReason.STOP
            if self._stop is not None:
                return

    def _ending(self, choice: Mapping[str, Any], url: str, version: int) -> StopReason:
        by = {each["version"] for each in choice["weight_versions"] or ()}
        if by != {str(version)}:
            raise ServerFailed(f"{url} sampled with weights of {sorted(by)}, not of {version}")
        if choice["finish_reason"] == "abort" and self.aborted.is_set():
            return StopReason.ABORT
        if choice["finish_reason"] != "length":
            raise ServerFailed(f"{url} gave a request up: {choice['finish_reason']}")
        if len(self._sampled) < self.sampling.max_tokens:  # vLLM cuts a completion that is too long
            raise ServerFailed(
                f"a sequence of {len(self.token_ids)} tokens with {self.sampling.max_tokens} to "
                "sample does not fit into the server's context; see --max-model-len, or lower "
                "rollout.max_context_tokens",
                refused=True,
            )
        return StopReason.LENGTH


def _is_last(event: Mapping[str, Any]) -> bool:
    return event["choices"][0]["finish_reason"] is not None

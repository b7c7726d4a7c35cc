"""One SGLang server: its requests, and what its answers mean."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from tir_alp.engines.servers.http_client import ServerClient, ServerFailed

_MEMORY = ["kv_cache", "weights"]


def label(version: int, index: int) -> str:
    """The name of a version's weights on the server with this index."""
    return f"{version}@{index}"


def read_label(label: str) -> tuple[int, int]:
    """Policy version and server index of a label. Raises ValueError if it is not a label."""
    version, _, index = label.partition("@")
    return int(version), int(index)


class SGLangClient(ServerClient):
    """Talks to one server, or to a router in front of several.

    Args:
        arguments: Arguments of `ServerClient`.
        index: Index of the server in its fleet; for a router it has no meaning.
        more: Keyword arguments of `ServerClient`.
    """

    def __init__(self, *arguments: Any, index: int = 0, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._index = index
        self.adapter: str | None = None
        """Name of the adapter that the server samples with; None: its weights alone."""

    def label(self, version: int) -> str:
        """The server's name for weights of a version. What it samples carries it."""
        return label(version, self._index)

    def events(self, payload: Mapping[str, Any], key: str) -> AsyncGenerator[dict[str, Any]]:
        """Start a generation and yield its events up to the one that has a `finish_reason`.

        Args:
            payload: The request.
            key: A router sends requests with equal keys to one server; a server ignores it.

        Raises:
            ServerFailed: If the server refuses, breaks off, or is silent for too long.
        """
        return self.stream(
            "/generate",
            payload,
            lambda event: event["meta_info"]["finish_reason"] is not None,
            {"X-SMG-Routing-Key": key},
        )

    @property
    def chosen(self) -> dict[str, Any]:
        """What a request has to say for the adapter to be used."""
        return {} if self.adapter is None else {"lora_path": self.adapter}

    async def abort(self, request_id: str) -> None:
        """End one request; its stream ends with the tokens that it has."""
        await self.call("/abort_request", rid=request_id)

    async def pause(self) -> None:
        """Stop sampling; running requests are queued, and will be read again from the start."""
        await self.call("/pause_generation", mode="retract")

    async def resume(self) -> None:
        """Sample again."""
        await self.call("/continue_generation")

    async def release_memory(self) -> None:
        """Forget all prefixes, and free the memory of weights and cache.

        Running requests have half of the deadline to end: releasing memory while one runs would
        crash the server.
        """
        await self.call(f"/flush_cache?timeout={self._stall_timeout_s / 2:g}")
        await self.call("/release_memory_occupation", tags=_MEMORY)

    async def resume_memory(self) -> None:
        """Allocate the memory again; weights have to be loaded into it."""
        await self.call("/resume_memory_occupation", tags=_MEMORY)

    async def weights_by_name(self, name: str, num_rows: int) -> list[Any] | None:
        """The first rows of a tensor, or None if the model's class does not report them."""
        try:
            answer = await self.call(
                "/get_weights_by_name", self.load_timeout_s, name=name, truncate_size=num_rows
            )
        except ServerFailed as error:
            if not error.refused:
                raise
            return None  # the class, e.g. Qwen3's, does not implement it
        return answer if isinstance(answer, list) else None

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Logprob of each token but the first, given those before it, at temperature 1."""
        answer = await self.call(
            "/generate",
            input_ids=list(token_ids),
            return_logprob=True,
            logprob_start_len=0,
            sampling_params={"max_new_tokens": 0, "temperature": 1.0},
            **self.chosen,
        )
        assert isinstance(answer, dict)
        return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]

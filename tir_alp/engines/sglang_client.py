"""One SGLang server: what is said to it, and what its answers mean."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from tir_alp.engines.http_client import ServerClient, ServerFailed


class SGLangClient(ServerClient):
    """Talks to one server."""

    def events(self, payload: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Begin a generation and yield its events up to the one that has a `finish_reason`.

        Raises:
            ServerFailed: If the server refuses, breaks off, or is silent for too long.
        """
        return self.stream(
            "/generate", payload, lambda said: said["meta_info"]["finish_reason"] is not None
        )

    async def abort(self, request_id: str) -> None:
        """End one request; its stream ends with what it has."""
        await self.call("/abort_request", rid=request_id)

    async def pause(self) -> None:
        """Stop sampling; what runs goes back to the queue and will be read again from the start."""
        await self.call("/pause_generation", mode="retract")

    async def go_on(self) -> None:
        """Sample again."""
        await self.call("/continue_generation")

    async def flush_cache(self) -> None:
        """Forget all prefixes."""
        await self.call("/flush_cache")

    async def weights_by_name(self, name: str, num_rows: int) -> list[Any] | None:
        """The first rows of a tensor, or None where the model's class does not tell."""
        try:
            said = await self.call(
                "/get_weights_by_name", self.load_timeout_s, name=name, truncate_size=num_rows
            )
        except ServerFailed as error:
            if not error.refused:
                raise
            return None  # how it says that the class, e.g. Qwen3's, does not know how
        return said if isinstance(said, list) else None

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Logprob of each token but the first, given those before it, at temperature 1."""
        said = await self.call(
            "/generate",
            input_ids=list(token_ids),
            return_logprob=True,
            logprob_start_len=0,
            sampling_params={"max_new_tokens": 0, "temperature": 1.0},
        )
        assert isinstance(said, dict)
        return [entry[0] for entry in said["meta_info"]["input_token_logprobs"][1:]]

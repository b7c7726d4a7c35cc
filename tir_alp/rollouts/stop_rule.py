"""Ends a completion where a text that is watched for is complete, token by token.

The end of a call may be spread over several tokens, and a token may extend past it; the token that
completes it is the last one to keep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tokenizers.decoders import DecodeStream

from tir_alp.engines.base import Completion
from tir_alp.types import StopReason, cut_version_spans

_MAX_PENDING = 16  # tokens that are no whole character yet

Watch = Callable[[str], bool]
"""Is fed a text piece by piece; returns True for a piece that completes what it waits for."""


def token_watcher(tokenizer: Any, watch: Watch) -> Callable[[int], bool]:
    """Return a function to call with each token; it returns True where `watch` does."""
    stream = DecodeStream(skip_special_tokens=False)
    num_pending = 0

    def feed(token_id: int) -> bool:
        nonlocal stream, num_pending
        piece = stream.step(tokenizer.backend_tokenizer, token_id)
        if piece is None:  # part of a character
            num_pending += 1
            if num_pending < _MAX_PENDING:
                return False
            # No character is that long: a stream would decode all of it again and again.
            stream, piece = DecodeStream(skip_special_tokens=False), "\ufffd"
        num_pending = 0
        return watch(piece)

    return feed


def cut_at(completion: Completion, matches: Callable[[int], bool]) -> Completion:
    """Drop the tokens after the first one that matches, with their logprobs and versions."""
    for index, token_id in enumerate(completion.token_ids):
        if matches(token_id):
            return replace(
                completion,
                token_ids=completion.token_ids[: index + 1],
                logprobs=completion.logprobs[: index + 1],
                stop_reason=StopReason.STOP,
                version_spans=cut_version_spans(completion.version_spans, index + 1),
            )
    return completion

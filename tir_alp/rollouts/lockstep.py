"""Makes rollouts repeatable: work is admitted in logical order, not as it happens to arrive.

Which sequences share a forward decides the last bits of their logprobs, and how long tools take
decides which sequences those are. Here every episode waits until all the others wait too; then all
go on together, in the order of their uids. That costs the overlap of tools and sampling, so it is
for tests, for debugging, and for proving that a resumed run equals one that was never stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from tir_alp.engines.base import Completion, Generate, Sampling


class LogicalOrder:
    """A `generate` that lets all episodes of a step pass together.

    It holds as long as all episodes that are to run together enter before the first of them asks
    for a completion. Episodes begin with a hop to a thread, and those of a synchronous step are all
    begun in one turn of the event loop, so they do.
    """

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self._num_episodes = 0
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    @contextmanager
    def episode(self) -> Iterator[None]:
        """Count as one of those to wait for."""
        self._num_episodes += 1
        try:
            yield
        finally:
            self._num_episodes -= 1
            self._open_if_complete()

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        """Wait for the others, then sample."""
        loop = asyncio.get_running_loop()
        passed = loop.create_future()
        entry = (sampling.sequence_uid, passed)
        self._waiting.append(entry)
        loop.call_soon(self._open_if_complete)  # not now: whoever comes last is to wait, too
        try:
            await passed
        finally:
            if entry in self._waiting:  # its deadline came before the others did
                self._waiting.remove(entry)
        return await self._generate(token_ids, sampling)

    def _open_if_complete(self) -> None:
        if len(self._waiting) < self._num_episodes:
            return
        waiting, self._waiting = sorted(self._waiting, key=lambda entry: entry[0]), []
        for _, passed in waiting:
            if not passed.done():
                passed.set_result(None)

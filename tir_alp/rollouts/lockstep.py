"""Makes rollouts repeatable: episodes sample in lockstep instead of whenever they are ready.

Which sequences share a forward pass decides the last bits of their logprobs, and the duration of
tool calls decides which sequences share one. Here every episode waits until all others wait as
well; then all continue together, in the order of their uids. Tools and sampling no longer overlap,
so this is for tests, for debugging, and for proving that a resumed run equals one that was never
stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from tir_alp.engines.base import Completion, Generate, Sampling


class Lockstep:
    """A gate that lets the completions of all running episodes start together.

    It works if all episodes that run together enter `episode` before the first of them asks for a
    completion. They do: each begins with a hop to a thread, and a synchronous step starts all of
    its episodes within one turn of the event loop.
    """

    def __init__(self) -> None:
        self._num_episodes = 0
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    @contextmanager
    def episode(self) -> Iterator[None]:
        """Count as a running episode, for which the others wait."""
        self._num_episodes += 1
        try:
            yield
        finally:
            self._num_episodes -= 1
            self._open_if_complete()

    def in_step(self, generate: Generate) -> Generate:
        """Wrap a `generate` so that each call first waits for all running episodes."""

        async def wait_then_generate(token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
            await self._wait(sampling.sequence_uid)
            return await generate(token_ids, sampling)

        return wait_then_generate

    async def _wait(self, uid: int) -> None:
        loop = asyncio.get_running_loop()
        entry = (uid, loop.create_future())
        self._waiting.append(entry)
        loop.call_soon(self._open_if_complete)  # not now: the last to arrive waits as well
        try:
            await entry[1]
        finally:
            if entry in self._waiting:  # its deadline passed before the others arrived
                self._waiting.remove(entry)

    def _open_if_complete(self) -> None:
        if len(self._waiting) < self._num_episodes:
            return
        waiting, self._waiting = sorted(self._waiting, key=lambda entry: entry[0]), []
        for _, passed in waiting:
            if not passed.done():
                passed.set_result(None)

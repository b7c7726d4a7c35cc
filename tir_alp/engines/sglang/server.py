"""One SGLang server as its fleet sees it: its state, its process, and what runs on it."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterator
from contextlib import contextmanager

from tir_alp.engines.sglang.client import SGLangClient
from tir_alp.engines.sglang.process import SGLangProcess
from tir_alp.engines.sglang.request import SGLangRequest


class ServerState(enum.Enum):
    """Where a server is between its start and its loss.

    STARTING -> SERVING <-> HELD; SERVING or HELD -> LOST -> STARTING.
    """

    STARTING = enum.auto()
    """It is started, or started again, and gets its first weights."""
    SERVING = enum.auto()
    """It samples from verified weights."""
    HELD = enum.auto()
    """It gets no request, and no completion of it is returned: it loads new weights, or has lent
    its memory. It is not asked for its health."""
    LOST = enum.auto()
    """Its process ended, it was silent, or it failed. `lost` has the reason."""


class Server:
    """One server of a fleet.

    Args:
        index: Index of the server in its fleet.
        name: Name for messages.
        process: The process that the run starts; None: the server runs already.
    """

    def __init__(self, index: int, name: str, process: SGLangProcess | None) -> None:
        self.index, self.name, self.process = index, name, process
        self.connection: SGLangClient | None = None
        """None until it has an address."""
        self.requests: set[SGLangRequest] = set()
        """What it samples now."""
        self.versions: set[int] = set()
        """Policy versions that it has had and that were verified, since its process started."""
        self.failures = 0
        """Requests that failed in a row."""
        self.starts = 0
        """Restarts in a row without a completion between them."""
        self.tensors_compared = -1
        """Tensors compared to verify the newest weights; -1 before the first update."""
        self.probe_difference = 0.0
        """Mean |difference of logprobs| of the newest weights' probe, in nats per token."""
        self.memory_is_lent = False
        """Whether it has freed its memory. A server that the run did not start stays without
        memory when it is lost."""
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Resolved with the reason when it is lost; made anew when it is back."""
        self._state = ServerState.STARTING
        self._serving = asyncio.Event()

    @property
    def state(self) -> ServerState:
        """Where it is between its start and its loss."""
        return self._state

    @property
    def serves(self) -> bool:
        """Whether it samples from verified weights, and can be asked."""
        return self._state is ServerState.SERVING

    @property
    def is_up(self) -> bool:
        """Whether it has been verified once since its start, and is not lost."""
        return self._state in (ServerState.SERVING, ServerState.HELD)

    @property
    def client(self) -> SGLangClient:
        """The connection of a server that has an address."""
        assert self.connection is not None
        return self.connection

    def begin_start(self) -> None:
        """It is about to be started, for the first time or after a loss."""
        self._state = ServerState.STARTING

    def hold(self) -> None:
        """Keep requests and completions back until `serve`. One that starts is held anyway."""
        if self._state is ServerState.SERVING:
            self._state = ServerState.HELD
            self._serving.clear()

    def serve(self, version: int) -> None:
        """Its weights of a version are verified: let it sample, and return what it sampled."""
        if self.lost.done():  # it is back from a loss
            self.lost = asyncio.get_running_loop().create_future()
        self.versions.add(version)
        self._state = ServerState.SERVING
        self._serving.set()

    def lose(self, reason: str) -> bool:
        """Count it as lost; returns False if it was not up."""
        if not self.is_up:
            return False
        self._state = ServerState.LOST
        self._serving.clear()
        self.lost.set_result(reason)
        return True

    async def until_serving(self, lost: asyncio.Future[str]) -> bool:
        """Wait until it serves; returns False as soon as `lost` is resolved.

        Args:
            lost: The `lost` of the server when the caller's request began.
        """
        if not self.serves and not lost.done():
            serving = asyncio.create_task(self._serving.wait())
            await asyncio.wait({serving, lost}, return_when=asyncio.FIRST_COMPLETED)
            serving.cancel()
        return not lost.done()

    @contextmanager
    def sampling(self, request: SGLangRequest) -> Iterator[None]:
        """The server has the request while the block runs."""
        self.requests.add(request)
        try:
            yield
        finally:
            self.requests.discard(request)

"""The sandbox for code that is not asynchronous, such as a Gymnasium environment.

One event loop in one thread of its own serves every thread of the process, and all who ask for the
same config share one sandbox. It ends with the process; if the process is killed, the kernel ends
the jail with it.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from tir_alp.tools.sandbox.base import Sandbox, Session
from tir_alp.tools.sandbox.config import Limits, SandboxConfig
from tir_alp.tools.sandbox.create import create_sandbox
from tir_alp.tools.sandbox.result import RunResult, SandboxError, SandboxReport, failed_result

_T = TypeVar("_T")
_START_TIMEOUT_S = 180.0
_MARGIN_S = 60.0
"""What a call may take beyond its wall limit and its wait, to have its interpreter rebuilt."""


class BlockingSandbox:
    """One sandbox and the thread that serves it. Get it from `shared_sandbox`."""

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        self._loop = asyncio.new_event_loop()
        self._exit = contextlib.AsyncExitStack()
        # A daemon, so that an interpreter that exits does not wait for it; atexit comes first.
        self._thread = threading.Thread(target=self._loop.run_forever, name="sandbox", daemon=True)
        self._thread.start()
        try:
            self._sandbox: Sandbox = self.wait_for(
                self._exit.enter_async_context(create_sandbox(config)), _START_TIMEOUT_S
            )
        except BaseException:
            self._stop_loop()
            raise

    @property
    def report(self) -> SandboxReport:
        """Which backend it is, and what a run should say about it."""
        return self._sandbox.report

    def session(self) -> BlockingSession:
        """A stateful interpreter. Close it.

        Raises:
            SandboxError: No session became free, or none could be made.
        """
        timeout_s = self.config.max_wait_s + _MARGIN_S
        return BlockingSession(self, self.wait_for(self._sandbox.open_session(), timeout_s))

    def close(self) -> None:
        """End every session, the fork server and the thread."""
        if self._thread.is_alive():
            with contextlib.suppress(SandboxError):
                self.wait_for(self._exit.aclose(), _MARGIN_S)
            self._stop_loop()

    def wait_for(self, work: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
        """Run a coroutine in the sandbox's thread.

        Raises:
            SandboxError: It did not end in time, and was cancelled; or the sandbox is closed.
        """
        if self._loop.is_closed():
            work.close()
            raise SandboxError("the sandbox is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise SandboxError(f"the sandbox did not answer within {timeout_s:g} s") from None

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_MARGIN_S)
        self._loop.close()


class BlockingSession:
    """A `Session` whose methods block. Calls may come from any thread."""

    def __init__(self, sandbox: BlockingSandbox, session: Session) -> None:
        self._sandbox = sandbox
        self._session = session

    def run(self, code: str, limits: Limits | None = None) -> RunResult:
        """As `Session.run`; a sandbox that does not answer is an `INFRA_ERROR`."""
        config = self._sandbox.config
        timeout_s = (limits or config.limits).wall_s + config.max_wait_s + _MARGIN_S
        try:
            return self._sandbox.wait_for(self._session.run(code, limits), timeout_s)
        except SandboxError as error:
            return failed_result(error, timeout_s)

    def fork(self) -> BlockingSession:
        """As `Session.fork`."""
        timeout_s = self._sandbox.config.max_wait_s + _MARGIN_S
        branch = self._sandbox.wait_for(self._session.fork(), timeout_s)
        return BlockingSession(self._sandbox, branch)

    def close(self) -> None:
        """As `Session.close`; after the end of the sandbox there is nothing left to do."""
        with contextlib.suppress(SandboxError):
            self._sandbox.wait_for(self._session.close(), _MARGIN_S)


_shared: dict[tuple[int, SandboxConfig], BlockingSandbox] = {}
_shared_lock = threading.Lock()


def shared_sandbox(config: SandboxConfig) -> BlockingSandbox:
    """The sandbox of this process for this config, started by whoever asks first.

    Raises:
        SandboxRefused: This machine cannot hold a program in.
    """
    key = (os.getpid(), config)  # a forked child has no thread that would serve its parent's
    with _shared_lock:
        if key not in _shared:
            _shared[key] = sandbox = BlockingSandbox(config)
            atexit.register(sandbox.close)
        return _shared[key]

"""The sandbox for code that is not asynchronous, such as a Gymnasium environment.

A sandbox and its event loop live in one thread, which serves every thread of the process; callers
with the same config share one sandbox. It ends with the process. If the process is killed, the
kernel ends the jail with it.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from tir_alp.tools.background_loop import BackgroundLoop
from tir_alp.tools.sandbox.base import Sandbox, Session
from tir_alp.tools.sandbox.config import Limits, SandboxConfig
from tir_alp.tools.sandbox.create import create_sandbox
from tir_alp.tools.sandbox.result import RunResult, SandboxError, SandboxReport, failed_result
from tir_alp.tools.sandbox.script import EXIT_STATUS, Script, ScriptResult

_T = TypeVar("_T")
_START_TIMEOUT_S = 180.0
_MARGIN_S = 60.0
"""What a call may take beyond its wall limit and its wait, to have its interpreter rebuilt."""


class BlockingSandbox:
    """One sandbox and the thread that serves it. Get one from `shared_sandbox`."""

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        self._closing = threading.Lock()
        self._owner = os.getpid()
        self._is_closed = False
        with contextlib.ExitStack() as undo:
            self._loop = undo.enter_context(BackgroundLoop("sandbox"))
            opened = contextlib.AsyncExitStack()
            entering = opened.enter_async_context(create_sandbox(config))
            self._sandbox: Sandbox = self._wait_for(entering, _START_TIMEOUT_S)
            undo.callback(self._end, opened)
            self._exit = undo.pop_all()

    @property
    def report(self) -> SandboxReport:
        """Which backend was taken, and what a run should print about it."""
        return self._sandbox.report

    def session(self) -> BlockingSession:
        """A stateful interpreter. Close it.

        Raises:
            SandboxError: No session became free, or none could be made.
        """
        timeout_s = self.config.max_wait_s + _MARGIN_S
        return BlockingSession(self, self.wait_for(self._sandbox.open_session(), timeout_s))

    def close(self) -> None:
        """End every session, the sandbox and its thread. Closing twice is allowed.

        In a forked child this does nothing: the thread lives in the parent.
        """
        with self._closing:
            if not self._is_closed and os.getpid() == self._owner:
                self._is_closed = True
                self._exit.close()

    def wait_for(self, work: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
        """Run a coroutine in the sandbox's thread.

        Raises:
            SandboxError: It did not end in time and was cancelled, or the sandbox is closed.
        """
        if self._is_closed:
            work.close()
            raise SandboxError("the sandbox is closed")
        return self._wait_for(work, timeout_s)

    def _wait_for(self, work: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise SandboxError(f"the sandbox did not answer within {timeout_s:g} s") from None

    def _end(self, opened: contextlib.AsyncExitStack) -> None:
        with contextlib.suppress(SandboxError):
            self._wait_for(opened.aclose(), _MARGIN_S)


class BlockingSession:
    """A `Session` whose methods block. Calls may come from any thread."""

    def __init__(self, sandbox: BlockingSandbox, session: Session) -> None:
        self._sandbox = sandbox
        self._session = session

    def run(self, code: str, limits: Limits | None = None) -> RunResult:
        """As `Session.run`; a sandbox that does not answer is an `INFRA_ERROR`."""
        config = self._sandbox.config
        timeout_s = (limits or config.limits).wall_s + config.max_wait_s + _MARGIN_S
        started = time.perf_counter()
        try:
            return self._sandbox.wait_for(self._session.run(code, limits), timeout_s)
        except SandboxError as error:
            return failed_result(error, time.perf_counter() - started)

    def run_script(self, script: Script, limits: Limits | None = None) -> ScriptResult:
        """As `Session.run_script`; a sandbox that does not answer is an `INFRA_ERROR`."""
        config = self._sandbox.config
        timeout_s = (limits or config.limits).wall_s + config.max_wait_s + _MARGIN_S
        started = time.perf_counter()
        try:
            return self._sandbox.wait_for(self._session.run_script(script, limits), timeout_s)
        except SandboxError as error:
            result = failed_result(error, time.perf_counter() - started)
            return ScriptResult(result, EXIT_STATUS[result.outcome])

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
    """The sandbox of this process for this config; the first caller starts it.

    Raises:
        SandboxRefused: This machine cannot confine a program.
    """
    key = (os.getpid(), config)  # a forked child has no thread that would serve its parent's
    with _shared_lock:
        if key not in _shared:
            _shared[key] = sandbox = BlockingSandbox(config)
            atexit.register(sandbox.close)
        return _shared[key]

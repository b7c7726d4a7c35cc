"""A stateful Python session: runs cells, types how they ended, rebuilds a lost interpreter."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.config import Limits, SandboxConfig
from tir_alp.tools.sandbox.endings import Lost
from tir_alp.tools.sandbox.interpreters.interpreter import Interpreter
from tir_alp.tools.sandbox.machine.budget import NOTHING, Budget, Resources
from tir_alp.tools.sandbox.output import HeadTail, cut_middle
from tir_alp.tools.sandbox.result import RunResult, SandboxError

MakeProcess = Callable[[], Awaitable[Interpreter]]

_CORES = os.cpu_count() or 1
_MIN_PAUSE_S = 0.005


class PythonSession:
    """One live interpreter and, should the program lose it, its successors.

    Got from `Sandbox.session` or `fork`; calls on one session run one after the other.
    """

    def __init__(
        self,
        process: Interpreter,
        config: SandboxConfig,
        budget: Budget,
        *,
        restart: MakeProcess,
        admit: Callable[[MakeProcess], Awaitable[PythonSession]],
        on_close: Callable[[PythonSession], None],
    ) -> None:
        self._process = process
        self._config = config
        self._budget = budget
        self._restart = restart
        self._admit = admit
        self._on_close = on_close
        self._lock = asyncio.Lock()
        self._worst = Resources(memory_mb=config.memory_mb, processes=config.max_processes)
        self._has_state = False
        self._told_of: Lost | None = None
        self._closed = False

    @property
    def pid(self) -> int:
        """The interpreter's process, as the host numbers it."""
        return self._process.pid

    async def run(self, code: str, limits: Limits | None = None) -> RunResult:
        """Execute a cell; variables live on to the next one. Never raises for what `code` does.

        Args:
            code: Python source; the value of a last expression is shown as in a notebook.
            limits: Of this call; None takes those of the sandbox's config.
        """
        started = time.perf_counter()
        limits = limits or self._config.limits
        stdout, stderr = HeadTail(limits.output_chars), HeadTail(limits.output_chars)
        note, reply, began, cpu_s_before = "", _NO_REPLY, None, 0.0
        async with self._lock:
            try:
                await self._budget.reserve(self, self._worst)
                note = await self._ensure_interpreter()
                began = time.perf_counter()
                self._process.collect(stdout, stderr, limits.output_bytes)
                cpu_s_before = self._process.cpu_s()
                with _Watch(self._process, limits):
                    reply = await self._call(code, limits.output_chars)
                outcome, reason = _outcome_of(reply), ""
            except Lost:
                lost = await self._process.cause_of_death()
                self._told_of = lost
                outcome, reason = lost.outcome, f"[the interpreter was killed: {lost.reason}]\n"
            except SandboxError as error:
                outcome, reason = Outcome.INFRA_ERROR, f"[the sandbox failed: {error}]\n"
            except BaseException:
                self._process.lose(Outcome.CANCELLED, "the call was cancelled")
                self._told_of = self._process.lost
                raise
            finally:
                self._process.measure()
                cpu_s = 0.0 if began is None else self._process.cpu_s() - cpu_s_before
                note = " ".join(filter(None, (note, self._end_if_worn_out())))
                self._budget.settle(self, self._process.holds)
            ended = time.perf_counter()
        out, out_cut = stdout.text()
        err, err_cut = stderr.text()
        value, value_cut = reply.value, False
        if value is not None:
            value, value_cut = cut_middle(value, limits.output_chars)
        return RunResult(
            outcome=outcome,
            stdout=out,
            stderr=err + ("\n" if reason and err and not err.endswith("\n") else "") + reason,
            value=value,
            duration_s=ended - started,
            cpu_s=cpu_s,
            truncated=out_cut or err_cut or value_cut,
            queue_s=(began or ended) - started,
            output_bytes=stdout.total_bytes + stderr.total_bytes,
            peak_memory_mb=self._process.peak_memory_mb,
            note=note,
        )

    async def fork(self) -> PythonSession:
        """An independent live copy: same variables, same files, its own future.

        Threads are not copied, and files that are open stay shared, as in any fork. Close it.

        Raises:
            SandboxError: The interpreter is gone or cannot be copied.
        """
        async with self._lock:
            try:
                branch = await self._admit(self._process.branch)
            except Lost:
                lost = await self._process.cause_of_death()
                raise SandboxError(f"nothing left to fork: {lost.reason}") from lost
        branch._has_state = self._has_state
        return branch

    async def close(self) -> None:
        """Kill the interpreter. Closing twice is allowed."""
        if not self._closed:
            self._closed = True
            try:
                await self._process.kill()
            finally:  # even if whoever waits is cancelled
                self._budget.settle(self, NOTHING)
                self._on_close(self)

    async def __aenter__(self) -> PythonSession:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def _ensure_interpreter(self) -> str:
        """Replace a lost interpreter.

        Returns:
            A note for whoever reads the result, if variables were lost.

        Raises:
            SandboxError: They were lost by no fault of the program, and nobody has been told yet.
        """
        if self._closed:
            raise SandboxError("the session is closed")
        self._process.poll()
        if self._process.lost is None:
            return ""
        lost = await self._process.cause_of_death()
        await self._process.kill()
        self._process = await self._restart()
        had_state, self._has_state = self._has_state, False
        if had_state and lost.outcome.is_infrastructure and lost is not self._told_of:
            raise SandboxError(f"the variables were lost: {lost.reason}")
        return "The interpreter was restarted: earlier variables are lost." if had_state else ""

    def _end_if_worn_out(self) -> str:
        """Give up an interpreter that has come to its bounds, lest it grow further.

        Returns:
            A note for whoever reads the result, if variables are lost.
        """
        worn_out = self._process.worn_out(self._config.interpreter_lifetime)
        if not worn_out:
            return ""
        self._process.lose(Outcome.RESOURCE_LIMIT, worn_out)
        self._told_of = self._process.lost
        return f"The interpreter ended after this call, since {worn_out}: its variables are lost."

    async def _call(self, code: str, value_chars: int) -> _Reply:
        self._has_state = True
        number = secrets.randbits(62)
        answer = await self._process.call(
            {"id": number, "op": "run", "code": code, "value_chars": value_chars}
        )
        self._process.drain()
        try:
            if answer.pop("id") != number:
                raise ValueError("an answer to another question")
            reply = _Reply(**answer)
        except (KeyError, TypeError, ValueError):
            self._process.lose(Outcome.TOOL_ERROR, "it wrote to the sandbox's own channel")
        if self._process.lost is not None:
            raise self._process.lost
        return reply


@dataclass(frozen=True, slots=True)
class _Reply:
    """What the interpreter, or a program in its place, says about a cell."""

    ok: bool
    value: str | None
    limit: str

    def __post_init__(self) -> None:
        if not isinstance(self.value, str | None) or not isinstance(self.limit, str):
            raise TypeError


_NO_REPLY = _Reply(ok=False, value=None, limit="")


def _outcome_of(reply: _Reply) -> Outcome:
    if reply.ok is True:
        return Outcome.OK
    return Outcome.RESOURCE_LIMIT if reply.limit else Outcome.TOOL_ERROR


class _Watch:
    """Ends the interpreter when its call has used up its wall-clock or its processor time."""

    def __init__(self, process: Interpreter, limits: Limits) -> None:
        self._process = process
        self._limits = limits
        self._cpu_s_before = process.cpu_s()

    def __enter__(self) -> _Watch:
        self._loop = asyncio.get_running_loop()
        wall_s = self._limits.wall_s
        reason = f"it hit the time limit of {wall_s:g} s"
        self._wall_timer = self._loop.call_later(
            wall_s, self._process.lose, Outcome.TOOL_TIMEOUT, reason
        )
        self._cpu_timer: asyncio.TimerHandle | None = None
        if self._limits.cpu_s is not None:
            self._check_cpu(self._limits.cpu_s)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._wall_timer.cancel()
        if self._cpu_timer is not None:
            self._cpu_timer.cancel()

    def used_cpu_s(self) -> float:
        return max(0.0, self._process.cpu_s() - self._cpu_s_before)

    def _check_cpu(self, limit_s: float) -> None:
        left_s = limit_s - self.used_cpu_s()
        if left_s <= 0:
            reason = f"it hit the limit of {limit_s:g} s of processor time"
            self._process.lose(Outcome.TOOL_TIMEOUT, reason)
            return
        pause_s = max(_MIN_PAUSE_S, left_s / _CORES)
        self._cpu_timer = self._loop.call_later(pause_s, self._check_cpu, limit_s)

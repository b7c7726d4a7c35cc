"""A stateful Python session: runs cells, gives each an outcome, replaces a lost interpreter."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.config import Limits, SandboxConfig
from tir_alp.tools.sandbox.endings import Lost
from tir_alp.tools.sandbox.interpreters.interpreter import Interpreter
from tir_alp.tools.sandbox.machine.budget import NOTHING, Budget, Resources
from tir_alp.tools.sandbox.output import HeadTail, cut_middle
from tir_alp.tools.sandbox.result import RunResult, SandboxError
from tir_alp.tools.sandbox.script import EXIT_STATUS, Script, ScriptResult

MakeInterpreter = Callable[[], Awaitable[Interpreter]]

_CORES = os.cpu_count() or 1
_MIN_PAUSE_S = 0.005


class PythonSession:
    """One live interpreter and, if the program loses it, its successors.

    Made by `Sandbox.session` or `fork`. The calls of one session run one after the other.
    """

    def __init__(
        self,
        interpreter: Interpreter,
        config: SandboxConfig,
        budget: Budget,
        *,
        restart: MakeInterpreter,
        admit: Callable[[MakeInterpreter], Awaitable[PythonSession]],
        on_close: Callable[[PythonSession], None],
    ) -> None:
        self._interpreter = interpreter
        self._config = config
        self._budget = budget
        self._restart = restart
        self._admit = admit
        self._on_close = on_close
        self._lock = asyncio.Lock()
        self._worst = Resources(memory_mb=config.memory_mb, processes=config.max_processes)
        self._has_state = False
        self._reported: Lost | None = None
        self._closed = False

    @property
    def pid(self) -> int:
        """The interpreter's process, as the host numbers it."""
        return self._interpreter.pid

    async def run(self, code: str, limits: Limits | None = None) -> RunResult:
        """See `base.Session`."""
        limits = limits or self._config.limits
        message = {"op": "run", "code": code, "value_chars": limits.output_chars}
        result, _ = await self._run(message, limits)
        return result

    async def run_script(self, script: Script, limits: Limits | None = None) -> ScriptResult:
        """See `base.Session`."""
        code, stdin = (base64.b64encode(data).decode() for data in (script.code, script.stdin))
        message = {"op": "script", "code": code, "stdin": stdin}
        result, status = await self._run(message, limits or self._config.limits)
        if status is None or result.outcome not in (Outcome.OK, Outcome.TOOL_ERROR):
            return ScriptResult(result, EXIT_STATUS[result.outcome])
        outcome = Outcome.TOOL_ERROR if status else Outcome.OK
        return ScriptResult(dataclasses.replace(result, outcome=outcome), status)

    async def _run(self, message: dict[str, Any], limits: Limits) -> tuple[RunResult, int | None]:
        """Make one call; returns its result and the program's exit status, if there is one."""
        started = time.perf_counter()
        stdout, stderr = HeadTail(limits.output_chars), HeadTail(limits.output_chars)
        note, reply, began, cpu_s_before = "", _NO_REPLY, None, 0.0
        status = None
        async with self._lock:
            try:
                await self._budget.reserve(self, self._worst)
                note = await self._ensure_interpreter()
                began = time.perf_counter()
                self._interpreter.collect(stdout, stderr, limits.output_bytes)
                cpu_s_before = self._interpreter.cpu_s()
                with _CallTimers(self._interpreter, limits):
                    reply = await self._call(message)
                outcome, reason, status = _outcome_of(reply), "", reply.status
            except Lost:
                lost = await self._interpreter.cause_of_death()
                self._reported = lost
                outcome, status, reason = lost.outcome, lost.exit_status, _reason(message, lost)
            except SandboxError as error:
                outcome, reason = Outcome.INFRA_ERROR, f"[the sandbox failed: {error}]\n"
            except BaseException:
                self._interpreter.lose(Outcome.CANCELLED, "the call was cancelled")
                self._reported = self._interpreter.lost
                raise
            finally:
                self._interpreter.measure()
                cpu_s = 0.0 if began is None else self._interpreter.cpu_s() - cpu_s_before
                note = " ".join(filter(None, (note, self._end_if_worn_out())))
                self._budget.settle(self, self._interpreter.holds)
            ended = time.perf_counter()
        out, out_cut = stdout.text()
        err, err_cut = stderr.text()
        value, value_cut = reply.value, False
        if value is not None:
            value, value_cut = cut_middle(value, limits.output_chars)
        result = RunResult(
            outcome=outcome,
            stdout=out,
            stderr=err + ("\n" if reason and err and not err.endswith("\n") else "") + reason,
            value=value,
            duration_s=ended - started,
            cpu_s=cpu_s,
            truncated=out_cut or err_cut or value_cut,
            queue_s=(began or ended) - started,
            output_bytes=stdout.total_bytes + stderr.total_bytes,
            peak_memory_mb=self._interpreter.peak_memory_mb,
            note=note,
        )
        return result, status

    async def fork(self) -> PythonSession:
        """See `base.Session`. Threads are not copied, and open files are shared, as in any fork."""
        async with self._lock:
            try:
                branch = await self._admit(self._interpreter.branch)
            except Lost:
                lost = await self._interpreter.cause_of_death()
                raise SandboxError(f"nothing left to fork: {lost.reason}") from lost
        branch._has_state = self._has_state
        return branch

    async def close(self) -> None:
        """See `base.Session`."""
        if not self._closed:
            self._closed = True
            try:
                await self._interpreter.kill()
            finally:  # even if the caller is cancelled
                self._budget.settle(self, NOTHING)
                self._on_close(self)

    async def __aenter__(self) -> PythonSession:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def _ensure_interpreter(self) -> str:
        """Replace a lost interpreter.

        Returns:
            A note for the reader of the result if variables were lost; otherwise "".

        Raises:
            SandboxError: Variables were lost through no fault of the program, and no result has
                reported it yet.
        """
        if self._closed:
            raise SandboxError("the session is closed")
        self._interpreter.poll()
        if self._interpreter.lost is None:
            return ""
        lost = await self._interpreter.cause_of_death()
        await self._interpreter.kill()
        self._interpreter = await self._restart()
        had_state, self._has_state = self._has_state, False
        if had_state and lost.outcome.is_infrastructure and lost is not self._reported:
            raise SandboxError(f"the variables were lost: {lost.reason}")
        return "The interpreter was restarted: earlier variables are lost." if had_state else ""

    def _end_if_worn_out(self) -> str:
        """Give up an interpreter that has reached its bounds, so that it does not grow further.

        Returns:
            A note for the reader of the result if variables are lost; otherwise "".
        """
        worn_out = self._interpreter.worn_out(self._config.interpreter_lifetime)
        if not worn_out:
            return ""
        self._interpreter.lose(Outcome.RESOURCE_LIMIT, worn_out)
        self._reported = self._interpreter.lost
        return f"The interpreter ended after this call because {worn_out}: its variables are lost."

    async def _call(self, message: dict[str, Any]) -> _Reply:
        self._has_state = True
        number = secrets.randbits(62)
        answer = await self._interpreter.call(message | {"id": number})
        self._interpreter.drain()
        try:
            if answer.pop("id") != number:
                raise ValueError("the reply to another request")
            reply = _Reply(**answer)
        except (KeyError, TypeError, ValueError):
            self._interpreter.lose(Outcome.TOOL_ERROR, "it wrote to the sandbox's own channel")
        if self._interpreter.lost is not None:
            raise self._interpreter.lost
        return reply


@dataclass(frozen=True, slots=True)
class _Reply:
    """What the interpreter, or a program in its place, reports about a cell."""

    ok: bool
    value: str | None
    limit: str
    status: int | None = None
    """Exit status of a script; None for a cell."""

    def __post_init__(self) -> None:
        if not isinstance(self.value, str | None) or not isinstance(self.limit, str):
            raise TypeError
        if self.status is not None and self.status not in range(256):
            raise ValueError


_NO_REPLY = _Reply(ok=False, value=None, limit="")


def _outcome_of(reply: _Reply) -> Outcome:
    if reply.ok is True:
        return Outcome.OK
    return Outcome.RESOURCE_LIMIT if reply.limit else Outcome.TOOL_ERROR


def _reason(message: dict[str, Any], lost: Lost) -> str:
    """What stderr says about a lost interpreter; nothing if a script has ended its process."""
    if message["op"] == "script" and lost.status is not None:
        return ""
    return f"[the interpreter was killed: {lost.reason}]\n"


class _CallTimers:
    """Ends the interpreter when its call has used up its wall-clock or its processor time."""

    def __init__(self, interpreter: Interpreter, limits: Limits) -> None:
        self._interpreter = interpreter
        self._limits = limits
        self._cpu_s_before = interpreter.cpu_s()

    def __enter__(self) -> _CallTimers:
        self._loop = asyncio.get_running_loop()
        wall_s = self._limits.wall_s
        reason = f"it hit the time limit of {wall_s:g} s"
        self._wall_timer = self._loop.call_later(
            wall_s, self._interpreter.lose, Outcome.TOOL_TIMEOUT, reason
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
        return max(0.0, self._interpreter.cpu_s() - self._cpu_s_before)

    def _check_cpu(self, limit_s: float) -> None:
        left_s = limit_s - self.used_cpu_s()
        if left_s <= 0:
            reason = f"it hit the limit of {limit_s:g} s of processor time"
            self._interpreter.lose(Outcome.TOOL_TIMEOUT, reason)
            return
        pause_s = max(_MIN_PAUSE_S, left_s / _CORES)
        self._cpu_timer = self._loop.call_later(pause_s, self._check_cpu, limit_s)

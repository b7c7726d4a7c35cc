"""The request and reply formats of two older sandbox services, as functions of ours. No I/O.

SandboxFusion answers `/run_code` and `/run_jupyter`; the firejail service that SimpleTIR and the
first ALP release call answers `/faas/sandbox/`. Only Python is spoken here.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.result import RunResult
from tir_alp.tools.sandbox.script import ScriptResult

_LIMITED = (Outcome.TOOL_TIMEOUT, Outcome.RESOURCE_LIMIT)


class _Files(BaseModel):
    """The part of a request that moves files, which this service does not do."""

    files: dict[str, str | None] = {}
    fetch_files: list[str] = []

    @property
    def unsupported(self) -> str:
        """Why it cannot be served; empty if it can."""
        asked = [name for name in ("files", "fetch_files") if getattr(self, name)]
        return f"not supported by this service: {', '.join(asked)}" if asked else ""


class FusionRequest(_Files):
    """`/run_code` of SandboxFusion."""

    code: str
    language: Literal["python"]
    stdin: str | None = None
    compile_timeout: float = 10.0
    """Read and ignored: Python is not compiled beforehand."""
    run_timeout: float = Field(default=10.0, gt=0)


class FusionNotebook(_Files):
    """`/run_jupyter` of SandboxFusion."""

    cells: list[str]
    cell_timeout: float = Field(default=0.0, ge=0)
    """0: only the total counts."""
    total_timeout: float = Field(default=45.0, gt=0)
    kernel: Literal["python3"] = "python3"


class FaasRequest(BaseModel):
    """`/faas/sandbox/` of SimpleTIR and the first ALP release."""

    code: str
    language: Literal["python"] = "python"
    stdin: str | None = None
    compile_timeout: float = 1.0
    """Read and ignored."""
    run_timeout: float = Field(default=3.0, gt=0)


def fusion_reply(script: ScriptResult) -> dict[str, Any]:
    """What SandboxFusion says of a program."""
    result = script.result
    if result.outcome.is_infrastructure:
        return fusion_failure(result.stderr)
    return {
        "status": "Failed" if script.exit_status else "Success",
        "message": "",
        "compile_result": None,
        "run_result": _command(result, script.exit_status),
        "executor_pod_name": None,
        "files": {},
    }


def fusion_failure(message: str) -> dict[str, Any]:
    """What SandboxFusion says when it could not run a program."""
    return {
        "status": "SandboxError",
        "message": message,
        "compile_result": None,
        "run_result": None,
        "executor_pod_name": None,
        "files": {},
    }


def notebook_reply(results: list[RunResult]) -> dict[str, Any]:
    """What SandboxFusion says of a notebook, whose cells ran until one was stopped."""
    last = results[-1] if results else None
    if last is not None and last.outcome.is_infrastructure:
        failure = fusion_failure(last.stderr)
        return {k: failure[k] for k in ("status", "message", "files")} | _NO_CELLS
    stopped = last is not None and last.outcome in _LIMITED
    driver = _command(last, 0) if last else None
    return {
        "status": "Failed" if stopped else "Success",
        "message": "",
        "driver": driver,
        "cells": [_cell(result) for result in results],
        "executor_pod_name": None,
        "files": {},
    }


_NO_CELLS: dict[str, Any] = {"driver": None, "cells": [], "executor_pod_name": None}


def faas_reply(script: ScriptResult) -> dict[str, Any]:
    """What the firejail service says of a program; a failed sandbox is no reply but a 503."""
    result = script.result
    if result.outcome is Outcome.TOOL_TIMEOUT:
        status = "timeout"
    else:
        status = "runtime_error" if script.exit_status else "success"
    return {
        "status": status,
        "run_result": {"status": status, "stdout": result.stdout, "stderr": result.stderr},
        "created_at": datetime.now(UTC).isoformat(),
    }


def _command(result: RunResult, exit_status: int) -> dict[str, Any]:
    timed_out = result.outcome is Outcome.TOOL_TIMEOUT
    return {
        "status": "TimeLimitExceeded" if timed_out else "Finished",
        "execution_time": result.duration_s,
        "return_code": None if timed_out else exit_status,
        "stdout": result.stdout,
        "stderr": result.stderr,
    }


def _cell(result: RunResult) -> dict[str, Any]:
    error = []
    if result.outcome is not Outcome.OK:
        lines = result.stderr.splitlines()
        name, _, value = (lines[-1] if lines else str(result.outcome)).partition(": ")
        error = [{"ename": name, "evalue": value, "traceback": lines}]
    return {
        "stdout": result.stdout,
        "stderr": result.stderr,
        "display": [] if result.value is None else [{"text/plain": result.value}],
        "error": error,
    }

"""The request and reply formats of two older sandbox services. No I/O.

SandboxFusion answers `/run_code` and `/run_jupyter`; the firejail service that SimpleTIR and the
first ALP release call answers `/faas/sandbox/`. Only Python programs are supported.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Base64Bytes, BaseModel, BeforeValidator, FailFast, Field

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.result import RunResult
from tir_alp.tools.sandbox.script import ScriptResult
from tir_alp.tools.sandbox.service.files import Fetched

# A request is read in the event loop, so that it must not have parts without number.
_MAX_FILES = 1000
_MAX_FETCHED_FILES = 100
_MAX_CELLS = 1000
_LIMITED = (Outcome.TOOL_TIMEOUT, Outcome.RESOURCE_LIMIT)


def _inside(path: str) -> str:
    """Refuse anything but the path of a file in the working folder or below /tmp."""
    parts = PurePosixPath(path).parts
    leaves = ".." in parts or (path.startswith("/") and parts[:2] != ("/", "tmp"))
    if not path or path.endswith("/") or "\0" in path or leaves:
        raise ValueError("the path of a file in the working folder or below /tmp is needed")
    return path


_Path = Annotated[str, Field(max_length=1000), AfterValidator(_inside)]


def _few(files: Any) -> Any:
    """Refuse too many files before any of them is read."""
    if isinstance(files, Mapping) and len(files) > _MAX_FILES:
        raise ValueError(f"there are {len(files)} files, and at most {_MAX_FILES} are allowed")
    return files


class Files(BaseModel):
    """The fields of a request that move files."""

    files: Annotated[dict[_Path, Base64Bytes | None], BeforeValidator(_few)] = {}
    """Path -> content of the files that the program finds; None means no file, as in
    SandboxFusion."""
    fetch_files: list[_Path] = Field(default=[], max_length=_MAX_FETCHED_FILES)

    @property
    def moves_files(self) -> bool:
        """Whether there are any files to move."""
        return bool(self.files or self.fetch_files)

    @property
    def contents(self) -> dict[str, bytes]:
        """The files to write."""
        return {path: content for path, content in self.files.items() if content is not None}


class FusionRequest(Files):
    """`/run_code` of SandboxFusion."""

    code: str
    language: Literal["python"]
    stdin: str | None = None
    compile_timeout: float = 10.0
    """Read and ignored: Python is not compiled beforehand."""
    run_timeout: float = Field(default=10.0, gt=0)


class FusionNotebook(Files):
    """`/run_jupyter` of SandboxFusion."""

    cells: Annotated[list[str], Field(max_length=_MAX_CELLS), FailFast()]
    cell_timeout: float = Field(default=0.0, ge=0)
    """Seconds; 0 means that only the total counts."""
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


def fusion_reply(script: ScriptResult, fetched: Fetched) -> dict[str, Any]:
    """SandboxFusion's reply about a program."""
    result = script.result
    if result.outcome.is_infrastructure:
        return fusion_failure(result.stderr)
    return {
        "status": "Failed" if script.exit_status else "Success",
        "message": fetched.problem,
        "compile_result": None,
        "run_result": _command(result, script.exit_status),
        "executor_pod_name": None,
        "files": _encoded(fetched.files),
    }


def fusion_failure(message: str) -> dict[str, Any]:
    """SandboxFusion's reply if it could not run a program."""
    return {
        "status": "SandboxError",
        "message": message,
        "compile_result": None,
        "run_result": None,
        "executor_pod_name": None,
        "files": {},
    }


def notebook_reply(
    results: list[RunResult], displays: list[list[dict[str, Any]]], fetched: Fetched
) -> dict[str, Any]:
    """SandboxFusion's reply about a notebook, whose cells ran until one was stopped.

    Args:
        results: How each cell ended.
        displays: What each cell has shown: MIME type -> text or base64.
        fetched: The files, those of figures included.
    """
    last = results[-1] if results else None
    if last is not None and last.outcome.is_infrastructure:
        return notebook_failure(last.stderr)
    stopped = last is not None and last.outcome in _LIMITED
    driver = _command(last, 0) if last else None
    return {
        "status": "Failed" if stopped else "Success",
        "message": fetched.problem,
        "driver": driver,
        "cells": [_cell(*each) for each in zip(results, displays, strict=True)],
        "executor_pod_name": None,
        "files": _encoded(fetched.files),
    }


def notebook_failure(message: str) -> dict[str, Any]:
    """SandboxFusion's reply if it could not run a notebook."""
    return {
        "status": "SandboxError",
        "message": message,
        "driver": None,
        "cells": [],
        "executor_pod_name": None,
        "files": {},
    }


def faas_reply(script: ScriptResult) -> dict[str, Any]:
    """The firejail service's reply about a program; a failed sandbox is a 503 instead."""
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
        "cpu_time": result.cpu_s,
        "return_code": None if timed_out else exit_status,
        "stdout": result.stdout,
        "stderr": result.stderr,
    }


def _encoded(files: Mapping[str, bytes]) -> dict[str, str]:
    return {path: base64.b64encode(content).decode() for path, content in files.items()}


def _cell(result: RunResult, display: list[dict[str, Any]]) -> dict[str, Any]:
    last = [] if result.value is None else [{"text/plain": result.value}]
    error = []
    if result.outcome is not Outcome.OK:
        lines = result.stderr.splitlines()
        name, _, value = (lines[-1] if lines else str(result.outcome)).partition(": ")
        error = [{"ename": name, "evalue": value, "traceback": lines}]
    return {
        "stdout": result.stdout,
        "stderr": result.stderr,
        "display": [*display, *last],
        "error": error,
    }

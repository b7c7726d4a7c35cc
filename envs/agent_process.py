"""Runs one agent: a command in a folder and a process group of its own, or an async function.

Whatever a command started is gone when `run_command` returns: its process group, and any other
process that has the episode's mark in its environment. So is its folder, after its files are read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MARK = "TIR_ALP_EPISODE"
"""Environment variable with which every process of an episode is marked."""
TASK = "TIR_ALP_TASK"
"""Environment variable with the task as JSON."""
FOLDER = "TIR_ALP_FOLDER"
"""Environment variable with the folder of the agent's files."""
TASK_FILE = "task.json"
ANSWER_FILE = "answer.txt"

_KEPT = (
    *("PATH", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH"),
    "SSL_CERT_FILE",
)  # variables that an agent gets from this process; no others, which may be secrets
MAX_OUTPUT_BYTES = 64 << 20
"""Bytes that a command may print; one that prints more is ended, as one that failed."""

MAX_CHARS = 65536
"""Characters of its output and of each file that are kept, from the end."""

_OUT, _ERR = ".out", ".err"  # files in its folder
_POLL_S = 0.1
_GRACE_S = 1.0  # between the request to end and the kill
_ROUNDS = 20  # in which processes of the episode are looked for

AgentFunction = Callable[[Mapping[str, Any], Mapping[str, str]], Awaitable[Any]]
"""Is called with the task and the environment variables that a command would get; returns the
answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What an agent left when it had ended."""

    end: str = "exited"
    """"exited", "failed", "timeout" or "infrastructure"."""
    exit_code: int | None = None
    """Exit code of a command; negative: the signal that ended it."""
    answer: str | None = None
    """What it answered: its file `answer.txt`, or the last line of its output."""
    output: str = ""
    """The end of its standard output."""
    errors: str = ""
    """The end of its standard error, or the traceback of a function."""
    files: Mapping[str, str] = field(default_factory=dict)
    """The files that the environment asks for, by name; missing ones are left out."""

    def to_text(self) -> str:
        """Return the report as JSON, which `AgentEnv.step` takes."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> Report:
        """Return the report of a text; any other text is itself the answer."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError):
            return cls(answer=text)


def run_command(
    command: Sequence[str],
    task: Mapping[str, Any],
    variables: Mapping[str, str],
    timeout_s: float,
    is_stopped: Callable[[], bool] = lambda: False,
    files: Sequence[str] = (),
) -> Report:
    """Run a command to its end.

    Args:
        command: Words of the command.
        task: The task, which it finds in `TASK` and in its folder's `task.json`.
        variables: Environment variables by which it finds the model.
        timeout_s: Deadline in seconds.
        is_stopped: Whether it has to end before that; asked ten times per second.
        files: Names of files in its folder that the report is to contain.
    """
    mark, most = secrets.token_hex(8), MAX_OUTPUT_BYTES
    folder = Path(tempfile.mkdtemp(prefix="tir_alp_agent_"))
    text = json.dumps(task, ensure_ascii=False)
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    environment = {**kept, "HOME": str(folder), **variables, MARK: mark, TASK: text}
    environment[FOLDER] = str(folder)
    try:
        (folder / TASK_FILE).write_text(text, encoding="utf-8", errors="surrogatepass")
        with (folder / _OUT).open("wb") as out, (folder / _ERR).open("wb") as err:
            try:
                process = subprocess.Popen(
                    [*command],
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
            except OSError as error:
                return Report(end="infrastructure", errors=f"{command[0]!r}: {error}")
            try:
                code = _wait(process, timeout_s, lambda: is_stopped() or _num_bytes(folder) > most)
                end = "timeout" if code is None else "exited" if code == 0 else "failed"
                if code is None and _num_bytes(folder) > most:
                    end = "failed"
            finally:
                _end_all(process, mark)
        output = _tail(folder / _OUT)
        return Report(
            end=end,
            exit_code=code,
            answer=_answer(folder, output),
            output=output,
            errors=_tail(folder / _ERR),
            files={name: _tail(folder / name) for name in files if (folder / name).is_file()},
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_function(
    function: AgentFunction,
    task: Mapping[str, Any],
    variables: Mapping[str, str],
    timeout_s: float,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Report:
    """Call an async function in an event loop of its own; what it started there is cancelled."""

    async def limited() -> Report:
        deadline = time.monotonic() + timeout_s
        running = asyncio.ensure_future(function(task, variables))
        while not running.done() and time.monotonic() < deadline and not is_stopped():
            await asyncio.wait({running}, timeout=_POLL_S)
        if not running.done():
            running.cancel()
            await asyncio.wait({running}, timeout=_GRACE_S)
            return Report(end="timeout")
        answer = running.result()
        return Report(answer=None if answer is None else str(answer))

    try:
        return asyncio.run(limited())
    except Exception as error:  # an agent may raise anything
        return Report(end="failed", errors=f"{type(error).__name__}: {error}"[-MAX_CHARS:])


def _num_bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in (_OUT, _ERR))


def _wait(
    process: subprocess.Popen[bytes], timeout_s: float, is_stopped: Callable[[], bool]
) -> int | None:
    """Return the exit code of a process; None if it has to be ended."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and not is_stopped():
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(_POLL_S)
    return process.poll()


def _answer(folder: Path, output: str) -> str | None:
    if (folder / ANSWER_FILE).is_file():
        return _tail(folder / ANSWER_FILE).strip()
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else None


def _tail(path: Path) -> str:
    """Return the end of a file, whatever it contains. Links are not followed out of the folder."""
    if path.is_symlink() or not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4 * MAX_CHARS))
        return file.read().decode(errors="replace")[-MAX_CHARS:]


def _end_all(process: subprocess.Popen[bytes], mark: str) -> None:
    """End a process, its group, and whatever else has the mark; return when they are gone."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(_ROUNDS):
        found = marked_processes(mark)
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def marked_processes(mark: str) -> list[int]:
    """Return the ids of the living processes that have an episode's mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_marked = wanted in (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended, or belongs to somebody else
            continue
        if is_marked and state not in "ZX":
            found.append(int(folder.name))
    return found

"""Checks the arguments of a call against a tool's JSON schema, in bounded time.

Both may come from outside: the schema from an MCP server, the arguments from a model. With some
keywords a check may take any time, such as a `pattern` that backtracks. Such a check is made in a
process of its own, which is killed at its deadline; the others are made right here.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from tir_alp.tools.argument_rules import arguments_fault, schema_fault, takes_known_time

_PROCESS = Path(__file__).with_name("argument_rules.py")
_MOST_SCHEMA_CHARS = 1_000_000
_MOST_WORK = 1_000_000
"""Characters of the schema times those of the arguments, up to which a check is quick."""
_NUM_PROCESSES = 4
_START_DEADLINE_S = 60.0
_QUEUE_DEADLINE_S = 60.0


class ArgumentCheck:
    """Checks arguments against a schema, which is read once.

    Args:
        name: Name of the tool, for error messages.
        schema: JSON schema of an object, in the draft that it names or else 2020-12. Nothing is
            fetched for a `$ref`.
        deadline_s: Seconds for one check.
        schema_deadline_s: Seconds for the check of the schema itself.

    Raises:
        ValueError: It is not a JSON schema, or has more than a million characters.
    """

    def __init__(
        self,
        name: str,
        schema: Mapping[str, Any],
        deadline_s: float = 10.0,
        schema_deadline_s: float = 60.0,
    ) -> None:
        self._deadline_s = deadline_s
        try:
            self._schema = json.dumps(dict(schema))
        except (TypeError, ValueError, RecursionError) as error:
            fault = str(error) or type(error).__name__
        else:
            self._is_quick = takes_known_time(schema)
            fault = self._schema_fault(schema_deadline_s)
        if fault:
            raise ValueError(f"the parameters of the tool {name!r} are not a JSON schema: {fault}")

    def error(self, arguments: Mapping[str, Any]) -> str:
        """Describe what is wrong, for the model to read; empty if nothing is.

        Example: `"'code' is a required property"`.
        """
        try:
            sent = json.dumps(arguments)
        except (TypeError, ValueError, RecursionError) as failure:
            return f"the arguments cannot be checked: {type(failure).__name__}"
        if self._is_quick and len(self._schema) * len(sent) <= _MOST_WORK:
            return arguments_fault(self._schema, arguments)
        try:
            return _processes().ask(self._schema, sent, self._deadline_s)
        except _NoAnswer as failure:
            return f"the arguments cannot be checked: {failure}"

    def _schema_fault(self, deadline_s: float) -> str:
        size = len(self._schema)
        if size > _MOST_SCHEMA_CHARS:
            return f"it has {size} characters, and at most {_MOST_SCHEMA_CHARS} are allowed"
        if self._is_quick and size**2 <= _MOST_WORK:
            return schema_fault(self._schema)
        try:
            return _processes().ask(self._schema, "null", deadline_s)
        except _NoAnswer as failure:
            return f"it cannot be checked: {failure}"


class _NoAnswer(Exception):
    """A check did not end; the message is for the model."""


class _Processes:
    """The processes that check, for any number of threads; each starts when it is first needed."""

    def __init__(self) -> None:
        # A slot is the right to use one process: an idle one, or None if it has yet to be started.
        self._slots: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(_NUM_PROCESSES):
            self._slots.put(None)

    def ask(self, schema: str, arguments: str, deadline_s: float) -> str:
        """What is wrong with arguments, or with the schema if they are "null".

        Raises:
            _NoAnswer: The check took too long or too much memory.
        """
        try:
            process = self._slots.get(timeout=_QUEUE_DEADLINE_S)
        except queue.Empty:
            raise _NoAnswer("too many checks are under way") from None
        try:
            if process is None or not process.is_alive:
                process = _Process()
            return process.ask(schema, arguments, deadline_s)
        except BaseException:
            if process is not None:
                process.kill()
                process = None
            raise
        finally:
            self._slots.put(process)


class _Process:
    """One process, which makes one check at a time. It ends when its pipe is closed."""

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                # -P keeps the folder of the file off the path.
                [sys.executable, "-P", str(_PROCESS), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is meant for the trainer
            )
        try:
            self._answer(_START_DEADLINE_S)
        except BaseException:
            self.kill()
            raise

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, schema: str, arguments: str, deadline_s: float) -> str:
        request = f"[{json.dumps(schema)}, {arguments}, {json.dumps(deadline_s)}]"
        try:
            self._pipe.send_bytes(request.encode())
        except OSError:
            raise _NoAnswer("the process for it had died") from None
        return self._answer(deadline_s)

    def _answer(self, deadline_s: float) -> str:
        if not self._pipe.poll(deadline_s):
            raise _NoAnswer(f"that takes more than {deadline_s:g} s")
        try:
            return json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            status = self._process.wait()
            raise _NoAnswer(f"the process for it ended with status {status}") from None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()


_by_process: dict[int, _Processes] = {}


def _processes() -> _Processes:
    """Those of this process: a forked child must not use the pipes of its parent."""
    pid = os.getpid()
    if pid not in _by_process:
        _by_process.setdefault(pid, _Processes())
    return _by_process[pid]

"""Moves files into a program's working folder, and out of it again.

Files are written and read by cells of the session, with the rights of the program and within its
limits, so that a path or a link out of the sandbox leads nowhere. What is read is what the program
chooses to show, like everything that it prints.
"""

from __future__ import annotations

import ast
import base64
import binascii
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tir_alp.tools.outcome import Outcome
from tir_alp.tools.sandbox.base import Session
from tir_alp.tools.sandbox.config import Limits
from tir_alp.tools.sandbox.result import SandboxError

_CHUNK_BYTES = 720_000  # in base64 this is shorter than the longest value of a cell
HELPER_LIMITS = Limits(wall_s=10.0, output_chars=1_000_000)
"""Limits of a cell that only moves data."""

# Each cell runs in a namespace of its own, so that it leaves nothing in the program's.
_PUT = """
import base64, os, sys
for path, content in files:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as file:
        file.write(base64.b64decode(content))
sys.path.insert(0, "")  # as in a notebook, so that modules among the files can be imported
answer = os.getcwd()
"""
_FETCH = """
import base64, contextlib, gc, io, os
for each in gc.get_objects():  # a program that ends flushes what it has not closed
    if issubclass(type(each), io.IOBase):
        with contextlib.suppress(Exception):
            each.flush()
answer = None
if os.path.isfile(path):
    with open(path, "rb") as file:
        file.seek(start)
        answer = base64.b64encode(file.read(length)).decode()
"""


@dataclass(frozen=True, slots=True)
class Fetched:
    """The files that were requested, as far as they were found."""

    files: dict[str, bytes] = field(default_factory=dict)
    """Path, as requested -> content. Files that do not exist are missing."""
    problem: str = ""
    """Why a file that does exist is missing; empty if none is."""


async def put_files(session: Session, files: Mapping[str, bytes]) -> str:
    """Write files, and the folders that they need, into a session that has run nothing yet.

    Returns:
        The working folder, to which paths are relative.

    Raises:
        SandboxError: A file cannot be written: there is no space, or no right to.
    """
    encoded = [(path, base64.b64encode(content).decode()) for path, content in files.items()]
    result = await session.run(helper_cell(_PUT, files=encoded), HELPER_LIMITS)
    if result.outcome is not Outcome.OK or result.value is None:
        lines = result.stderr.splitlines() or ["no reason was given"]
        raise SandboxError(f"the files cannot be written: {lines[-1]}")
    return ast.literal_eval(result.value)


async def fetch_files(
    session: Session, folder: str, paths: Sequence[str], max_bytes: int
) -> Fetched:
    """Read files that a program has left.

    Args:
        session: The session that has run the program.
        folder: The working folder, as `put_files` returned it.
        paths: The files to read.
        max_bytes: Size of all files together.

    Returns:
        The files. Whatever the program is to blame for is a `problem`.

    Raises:
        SandboxError: The sandbox failed.
    """
    fetched, bytes_left = Fetched(), max_bytes
    for path in dict.fromkeys(paths):
        content = await _read(session, os.path.join(folder, path), bytes_left)
        if isinstance(content, str):
            return Fetched(fetched.files, f"not fetched: {path!r}: {content}")
        if content is not None:
            fetched.files[path] = content
            bytes_left -= len(content)
    return fetched


async def _read(session: Session, path: str, bytes_left: int) -> bytes | str | None:
    """The content, or the reason why it cannot be read, or None if there is no such file."""
    content = b""
    while True:
        cell = helper_cell(_FETCH, path=path, start=len(content), length=_CHUNK_BYTES)
        result = await session.run(cell, HELPER_LIMITS)
        if result.outcome.is_infrastructure:
            raise SandboxError(result.stderr)
        if result.note:  # checked first: the old folder may still exist, without access
            return "it is gone with the interpreter"
        if result.outcome is not Outcome.OK:
            return (result.stderr.splitlines() or [result.outcome.value])[-1]
        if result.value is None:
            return None
        try:
            chunk = base64.b64decode(result.value.strip("'"), validate=True)
        except (binascii.Error, ValueError):
            return "the program has broken its interpreter"
        content += chunk
        if len(content) > bytes_left:
            return f"it has more than the {bytes_left} bytes that may still be fetched"
        if len(chunk) < _CHUNK_BYTES:
            return content


def helper_cell(source: str, **names: object) -> str:
    """Source of an expression whose value is what `source` assigns to `answer`."""
    return f"(lambda names: exec({source!r}, names) or names['answer'])({names!r})"

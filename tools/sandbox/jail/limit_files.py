"""Reads the limits of control groups, of version 1 or 2.

A file that does not exist is no limit: the root group has none, and some groups lie outside of the
container that this process is in.
"""

from __future__ import annotations

from pathlib import Path

LIMIT_FILES = {
    "memory": ("memory", "memory.max", "memory.limit_in_bytes"),
    "processes": ("pids", "pids.max"),
}
"""Resource -> its controller, and the files that may hold the limit (version 2 first)."""
_NO_LIMIT = 1 << 60
"""Version 1 writes the largest number of pages instead of "max"."""


def read_number(folder: Path, *files: str) -> int | None:
    """The number in the first of these files that exists; None if there is none, or no limit."""
    for file in files:
        try:
            text = (folder / file).read_text().strip()
        except OSError:
            continue
        return None if text == "max" or int(text) >= _NO_LIMIT else int(text)
    return None

"""Notices that a file of tasks changed between the start of a run and its resumption.

A task follows from its number alone, so with another file a resumed run would train on other tasks
than its position says, and the audit could replay none of the earlier ones.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tir_alp.config import DataConfig

_FILE = "data.json"


def fingerprints(data: DataConfig) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of each file that a run takes its tasks from, by path."""
    paths = [source.path for source in data.mix or (data,) if source.path is not None]
    found = {}
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[str(path)] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def write_fingerprints(folder: Path, data: DataConfig) -> None:
    """Record the files of a new run in its folder; writes nothing if there are none."""
    if found := fingerprints(data):
        (folder / _FILE).write_text(json.dumps(found, indent=2) + "\n")


def check_fingerprints(folder: Path, data: DataConfig) -> None:
    """Compare the files of a run that is resumed with those that it began with.

    Raises:
        ValueError: One of them changed.
    """
    file = folder / _FILE
    if not file.is_file():
        return
    before = json.loads(file.read_text())
    for path, now in fingerprints(data).items():
        then = before.get(path)
        if then is not None and then != now:
            raise ValueError(
                f"{path} is not the file that {folder} began with: it had {then['bytes']} bytes, "
                f"and has {now['bytes']}, or other contents. Restore it, or start a new run"
            )

"""Notices that the data of a run changed between its start and its resumption.

A task follows from its number alone, so with another file a resumed run would train on other tasks
than its position says, and the audit could replay none of the earlier ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_FILE = "data.json"

Fingerprints = Mapping[str, Mapping[str, Any]]
"""Size and SHA-256 of files, by path; number of rows and SHA-256 of data sets, by name."""


def fingerprints(paths: Iterable[Path]) -> Fingerprints:
    """Read every file that a run takes its tasks from; about a second per GB.

    Raises:
        ValueError: A file cannot be read.
    """
    found = {}
    for path in paths:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from None
        found[str(path)] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def write_fingerprints(folder: Path, files: Fingerprints) -> None:
    """Record the files of a new run in its folder; writes nothing if there are none."""
    if files:
        (folder / _FILE).write_text(json.dumps(files, indent=2) + "\n")


def check_fingerprints(folder: Path, files: Fingerprints) -> None:
    """Compare the files of a run that is resumed with those that it began with.

    Raises:
        ValueError: One of them changed.
    """
    file = folder / _FILE
    if not file.is_file():
        return
    before = json.loads(file.read_text())
    for path, now in files.items():
        then = before.get(path)
        if then is not None and then != now:
            raise ValueError(
                f"{path} is not the data that {folder} began with: it had {_described(then)}, and "
                f"has {_described(now)}. Restore it, or start a new run"
            )


def _described(fingerprint: Mapping[str, Any]) -> str:
    size = " ".join(
        f"{fingerprint[unit]} {unit}" for unit in ("bytes", "rows") if unit in fingerprint
    )
    return f"{size} (sha256 {fingerprint['sha256'][:12]})"

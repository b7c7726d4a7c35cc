"""Checks that all actors of a run have the same code of tir_alp as the run itself.

An image or a node with another version would unpickle objects that it was not made for, or compute
slightly different numbers, and nobody would notice.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import tir_alp

_MOST_NAMES = 5  # in a message


class ReportsCode:
    """Base of every class that runs in an actor: it reports which code it runs."""

    def code(self) -> Mapping[str, str]:
        """`own_code` of the actor's process."""
        return own_code()


@functools.cache
def own_code() -> Mapping[str, str]:
    """`code_of` tir_alp, as of the first call: later edits of the files do not count."""
    return code_of(Path(tir_alp.__file__).parent)


def code_of(package: Path) -> Mapping[str, str]:
    """Digest of each module in a folder, by its path relative to the folder."""
    found = {}
    for folder, _, names in os.walk(package, followlinks=True):
        for name in names:
            if name.endswith(".py"):
                file = Path(folder, name)
                digest = hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()
                found[file.relative_to(package).as_posix()] = digest
    return found


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Names of the modules that differ, for a message; empty if none does."""
    names = sorted(
        name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    )
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more

"""What all actors of a run have in common: they run the code of tir_alp that the run itself has.

An image or a node with another version would unpickle what it was not made for, or compute what is
slightly different, and nobody would see it.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import tir_alp

_MOST_NAMES = 5  # in a message


class Host:
    """Base of what lives in an actor."""

    def code(self) -> Mapping[str, str]:
        """As `own_code`, of its process."""
        return own_code()


@functools.cache
def own_code() -> Mapping[str, str]:
    """As `code_of`, of tir_alp; what it was when it was first asked for, whoever edits it later."""
    return code_of(Path(tir_alp.__file__).parent)


def code_of(package: Path) -> Mapping[str, str]:
    """Digest of each module below a folder, by its path in it."""
    found = {}
    for folder, _, names in os.walk(package, followlinks=True):
        for name in names:
            if name.endswith(".py"):
                file = Path(folder, name)
                digest = hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()
                found[file.relative_to(package).as_posix()] = digest
    return found


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Which modules are not the same in both, for a message; empty if all are."""
    names = sorted(
        name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    )
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more

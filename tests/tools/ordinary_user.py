"""Runs a program as an ordinary user, from a test that root runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LENT_ENGINE = "TIR_ALP_TEST_ENGINE"
"""Environment variable with the address of an engine that is there already."""

_REPOSITORY = Path(__file__).parents[2]
# In a mount namespace of its own: folders that only root may enter are replaced by empty ones that
# everybody may enter, in which the interpreter's own folder is bound at its own path.
_AS_USER = """
set -e
exec 3<"$1"
if [ -n "$2" ]; then
    mount -t tmpfs -o mode=755 none "$2"
    mkdir -p "$1"
    mount --no-canonicalize --bind /proc/self/fd/3 "$1"
fi
shift 2
exec 3<&- setpriv --reuid 1001 --regid 1001 --clear-groups --bounding-set -all "$@"
"""


def run_python_as_user(
    *arguments: str, engine: str = "", timeout_s: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """Run this Python as user 1001, in the folder of the repository.

    Args:
        arguments: Of the interpreter.
        engine: Address of an engine to lend to its tests; empty: none.
        timeout_s: Deadline.
    """
    prefix = Path(sys.base_prefix)
    closed = [p for p in reversed(prefix.parents) if not p.stat().st_mode & 0o001]
    around = ["unshare", "--mount", "sh", "-c", _AS_USER, "sh", prefix, closed[0] if closed else ""]
    return subprocess.run(
        [*around, sys.executable, *arguments],
        cwd=_REPOSITORY,
        env={"PATH": os.environ["PATH"], "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}
        | {LENT_ENGINE: engine},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )

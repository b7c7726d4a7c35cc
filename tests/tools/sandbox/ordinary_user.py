"""Runs a program as an ordinary user, from a test that root runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LENT_ENGINE = "TIR_ALP_TEST_ENGINE"
"""Environment variable with the address of a container engine that runs already."""
USER = 1001

_REPOSITORY = Path(__file__).parents[3]
# In a mount namespace of its own, a folder that only root may enter is replaced by an empty one
# that everybody may enter, in which the interpreter's folder is bound to its own path.
_AS_USER = f"""
set -e
exec 3<"$1"
if [ -n "$2" ]; then
    mount -t tmpfs -o mode=755 none "$2"
    mkdir -p "$1"
    mount --no-canonicalize --bind /proc/self/fd/3 "$1"
fi
eval "$3"
shift 3
exec 3<&- setpriv --reuid {USER} --regid {USER} --clear-groups "$@"
"""
_NO_PRIVILEGES = ("--bounding-set", "-all")


def command_as_user(
    *command: str, before: str = "", may_use_setuid: bool = False, unshare: tuple[str, ...] = ()
) -> list[str]:
    """A command that runs another command as `USER`.

    Args:
        command: The command to run.
        before: Shell code that prepares its mount namespace, as root.
        may_use_setuid: Whether programs such as newuidmap may gain privileges.
        unshare: Further namespaces of its own, as options of unshare(1).
    """
    prefix = Path(sys.base_prefix)
    closed = [p for p in reversed(prefix.parents) if not p.stat().st_mode & 0o001]
    around = ["unshare", "--mount", *unshare, "sh", "-c", _AS_USER, "sh"]
    around += [str(prefix), str(closed[0]) if closed else "", before]
    return [*around, *(() if may_use_setuid else _NO_PRIVILEGES), *command]


def run_python_as_user(
    *arguments: str, engine: str = "", timeout_s: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """Run this Python as `USER`, in the folder of the repository.

    Args:
        arguments: Arguments of the interpreter.
        engine: Address of a container engine to lend to its tests; empty for none.
        timeout_s: Deadline in seconds.
    """
    return subprocess.run(
        command_as_user(sys.executable, *arguments),
        cwd=_REPOSITORY,
        env={"PATH": os.environ["PATH"], "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}
        | {LENT_ENGINE: engine},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
